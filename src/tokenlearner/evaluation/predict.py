"""Image files to labels with probabilities, or to sheets of attention maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.data.images import Damaged, ImageFiles, LabelledImages, OnError, collate, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import needed_preprocessing
from tokenlearner.insertion.insert import attention_maps
from tokenlearner.inspection.maps import draw_sheet, picture_of


@dataclass(frozen=True)
class Prediction:
    """The likeliest labels of one file with their probabilities, or why it could not be read."""

    file: str
    labels: tuple[tuple[str, float], ...] = ()
    error: str | None = None


@torch.inference_mode()
def predict(
    model: nn.Module, files: Sequence[Path], *, top: int = 5, batch_size: int = 32, on_error: OnError = "skip"
) -> Iterator[Prediction]:
    """Yields one prediction per file, in order; damaged files come back with their error, or raise it."""
    if top < 1:
        raise InputError(f"top must be at least 1, not {top}")
    names = getattr(model, "label_names", None)
    for paths, x, damaged in batches(model, files, batch_size, on_error):
        probabilities = model(x).float().softmax(dim=-1) if len(x) else torch.empty(0)
        rows = iter(probabilities)
        for path in paths:
            if path in damaged:
                yield Prediction(str(path), error=damaged[path])
                continue
            values, indices = next(rows).topk(min(top, probabilities.shape[-1]))
            labels = tuple((names[i] if names else str(int(i)), float(v)) for v, i in zip(values, indices))
            yield Prediction(str(path), labels)


@dataclass(frozen=True)
class Sheet:
    path: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class Sheets:
    """What :func:`write_sheets` wrote."""

    sheets: tuple[Sheet, ...]
    damaged: tuple[Damaged, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sheets": [{"path": str(sheet.path), "files": list(sheet.files)} for sheet in self.sheets],
            "damaged": damaged_entries(self.damaged),
        }


def write_sheets(
    model: nn.Module,
    files: Sequence[Path],
    folder: Path,
    *,
    layer: int | None = None,
    columns: int = 8,
    on_error: OnError = "skip",
) -> Sheets:
    """Draws the maps of one learner (the first, or the one at ``layer``): a column a picture, a row a token.

    Writes ``maps.png`` to ``folder``, or ``maps-1.png`` and on where there are more than ``columns`` pictures.

    Raises:
        InputError: The model has no maps, there is no learner at ``layer``, or no file could be read.
    """
    preprocessing = needed_preprocessing(model)
    if columns < 1:
        raise InputError(f"columns must be at least 1, not {columns}")
    damaged: list[Damaged] = []
    readable: list[tuple[Path, Tensor]] = []
    for paths, x, reasons in batches(model, files, columns, on_error):
        damaged += [Damaged(str(path), reason) for path, reason in reasons.items()]
        readable += zip([path for path in paths if path not in reasons], x)
    if not readable:
        raise InputError(
            f"none of the {len(files)} files could be read; the first: {damaged[0].path}: {damaged[0].reason}"
        )
    sheets = []
    for start in range(0, len(readable), columns):
        shown = readable[start : start + columns]
        x = torch.stack([image for _, image in shown])
        name = "maps.png" if len(readable) <= columns else f"maps-{start // columns + 1}.png"
        path = draw_sheet(
            [picture_of(image, preprocessing) for image in x],
            _maps_at(model, x, layer),
            folder / name,
            [file.name for file, _ in shown],
        )
        sheets.append(Sheet(path, tuple(str(file) for file, _ in shown)))
    return Sheets(tuple(sheets), tuple(damaged))


def _maps_at(model: nn.Module, x: Tensor, layer: int | None) -> Float[Tensor, "b s h w"]:
    try:
        maps = attention_maps(model, x)
    except ValueError as error:
        raise InputError(str(error)) from error
    if layer is not None and layer not in maps:
        raise InputError(f"no TokenLearner at layer {layer}; there is one at {', '.join(map(str, maps))}")
    return maps[next(iter(maps)) if layer is None else layer]


def batches(
    model: nn.Module, files: Sequence[Path], batch_size: int, on_error: OnError
) -> Iterator[tuple[Sequence[Path], Tensor, dict[Path, str]]]:
    """Files in batches: their paths, the decoded ones as one tensor, and why the others could not be."""
    transform = needed_preprocessing(model).transform()
    dataset = ImageFiles(LabelledImages(tuple(files), (0,) * len(files), ("",)), transform, on_error)
    for start in range(0, len(files), batch_size):
        paths = files[start : start + batch_size]
        batch = collate([dataset[i] for i in range(start, start + len(paths))])
        reasons = {Path(d.path): d.reason for d in batch.damaged}
        yield paths, batch.images, reasons
