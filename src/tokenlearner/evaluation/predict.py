"""Image and video files to labels with probabilities, and images to sheets of attention maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.data.clips import ClipFiles, LabelledClips
from tokenlearner.data.images import (
    Damaged,
    ImageFiles,
    LabelledImages,
    OnError,
    collate,
    damaged_entries,
    find_images,
)
from tokenlearner.data.videos import FrameFolder, VideoSource, find_videos
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import check_inputs, needed_preprocessing
from tokenlearner.evaluation.clips import VIEWS, Views, clip_files, logits_of, takes_clips
from tokenlearner.insertion.insert import attention_maps
from tokenlearner.inspection.maps import draw_sheet, picture_of

SourceT = TypeVar("SourceT", bound=VideoSource)


def find_inputs(model: nn.Module, paths: Sequence[Path], frame_fps: float | None = None) -> list[VideoSource]:
    """The pictures at or under ``paths``; the videos, where ``model`` takes clips.

    With ``frame_fps``, folders of pictures are videos of so many frames a second.

    Raises:
        InputError: There is nothing of the kind.
    """
    if takes_clips(model):
        return [video for path in paths for video in find_videos(path, frame_fps)]
    return [image for path in paths for image in find_images(path)]


@dataclass(frozen=True)
class Prediction:
    """The likeliest labels of one file with their probabilities, or why it could not be read."""

    file: str
    labels: tuple[tuple[str, float], ...] = ()
    error: str | None = None


@torch.inference_mode()
def predict(
    model: nn.Module,
    files: Sequence[VideoSource],
    *,
    top: int = 5,
    batch_size: int = 32,
    on_error: OnError = "skip",
    views: Views = VIEWS,
) -> Iterator[Prediction]:
    """Yields one prediction per file, in order; damaged files come back with their error, or raise it.

    Args:
        model: Carries its preprocessing, and the names of its outputs where they have any.
        files: Images; videos (of any suffix, or folders of their frames) where the model takes clips.
        top: How many labels a prediction has at most, the likeliest first.
        batch_size: How many images or views the model is given at once.
        on_error: Whether a damaged file is skipped or raises.
        views: Of a video: how many windows, spread over it, and how many crops of each; its probabilities are those of
            the mean of the model's outputs.

    Raises:
        InputError: A size that makes no sense, a model that doesn't say how its inputs are prepared, a folder of frames
            for a model of images, or a damaged file with ``on_error="raise"``.
    """
    if top < 1:
        raise InputError(f"top must be at least 1, not {top}")
    names = getattr(model, "label_names", None)
    for sources, x, damaged in batches(model, files, batch_size, on_error, views):
        probabilities = logits_of(model, x, batch_size).float().softmax(dim=-1) if len(x) else torch.empty(0)
        rows = iter(probabilities)
        for source in sources:
            if source in damaged:
                yield Prediction(str(source), error=damaged[source])
                continue
            values, indices = next(rows).topk(min(top, probabilities.shape[-1]))
            labels = tuple((names[i] if names else str(int(i)), float(v)) for v, i in zip(values, indices))
            yield Prediction(str(source), labels)


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
        InputError: The model has no maps or takes clips, there is no learner at ``layer``, or no file could be read.
    """
    check_inputs(model, clips=False)
    preprocessing = needed_preprocessing(model)
    if columns < 1:
        raise InputError(f"columns must be at least 1, not {columns}")
    damaged: list[Damaged] = []
    readable: list[tuple[Path, Tensor]] = []
    for paths, x, reasons in batches(model, files, columns, on_error):
        damaged += [Damaged(str(path), reason) for path, reason in reasons.items()]
        readable += zip([path for path in paths if path not in reasons], x)
    if not readable:
        raise nothing_read(damaged)
    sheets = []
    for start in range(0, len(readable), columns):
        shown = readable[start : start + columns]
        x = torch.stack([image for _, image in shown])
        name = "maps.png" if len(readable) <= columns else f"maps-{start // columns + 1}.png"
        path = draw_sheet(
            [picture_of(image, preprocessing) for image in x],
            maps_at(model, x, layer),
            folder / name,
            [file.name for file, _ in shown],
        )
        sheets.append(Sheet(path, tuple(str(file) for file, _ in shown)))
    return Sheets(tuple(sheets), tuple(damaged))


def nothing_read(damaged: Sequence[Damaged]) -> InputError:
    """What to raise where all files are ``damaged``, or there were none."""
    first = f"; the first: {damaged[0].path}: {damaged[0].reason}" if damaged else ""
    return InputError(f"none of the {len(damaged)} files could be read{first}")


def maps_at(model: nn.Module, x: Tensor, layer: int | None) -> Float[Tensor, "b *slices s h w"]:
    """The maps of one learner for a batch as the model takes it: the first learner, or the one at ``layer``.

    Raises:
        InputError: The model has no maps, or no learner there.
    """
    try:
        maps = attention_maps(model, x)
    except ValueError as error:
        raise InputError(str(error)) from error
    if layer is not None and layer not in maps:
        raise InputError(f"no TokenLearner at layer {layer}; there is one at {', '.join(map(str, maps))}")
    return maps[next(iter(maps)) if layer is None else layer]


def batches(
    model: nn.Module, files: Sequence[SourceT], batch_size: int, on_error: OnError, views: Views = VIEWS
) -> Iterator[tuple[Sequence[SourceT], Tensor, dict[SourceT, str]]]:
    """Files in batches: their paths, the decoded ones as one tensor, and why the others could not be.

    The tensor is (b, c, h, w), and (b, v, c, t, h, w) where the model takes clips, of which ``batch_size`` then counts
    the views.
    """
    dataset: ClipFiles | ImageFiles
    if takes_clips(model):
        dataset = clip_files(model, LabelledClips(tuple(files), (0,) * len(files), ("",)), views, on_error)
        batch_size = max(1, batch_size // math.prod(views))
    else:
        check_inputs(model, clips=any(isinstance(file, FrameFolder) for file in files))
        images = LabelledImages(tuple(file for file in files if isinstance(file, Path)), (0,) * len(files), ("",))
        dataset = ImageFiles(images, needed_preprocessing(model).transform(), on_error)
    for start in range(0, len(files), batch_size):
        sources = files[start : start + batch_size]
        samples = [dataset[i] for i in range(start, start + len(sources))]
        reasons = {
            source: reason_of(sample, source) for source, sample in zip(sources, samples) if isinstance(sample, Damaged)
        }
        yield sources, collate(samples).images, reasons


def reason_of(damaged: Damaged, source: VideoSource) -> str:
    """Why ``source`` can't be read; of a folder of frames this also says which picture is damaged."""
    return damaged.reason if damaged.path == str(source) else f"{Path(damaged.path).name}: {damaged.reason}"
