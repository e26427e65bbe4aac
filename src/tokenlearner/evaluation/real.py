"""ImageNet ReaL: top-1 against the reassessed labels of the validation set (Beyer et al., arXiv 2006.07159).

An image may have several right labels, and counts as right if the prediction is among them; one with none is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenlearner.data.images import Damaged, OnError, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.evaluation.predict import batches
from tokenlearner.inspection.speed import usable_device

_NAME = re.compile(r"ILSVRC2012_val_(\d{8})(?:[._]|$)")  # some copies append _n01440764


@dataclass(frozen=True)
class RealAccuracy:
    """``top1`` is a share (0 to 1) of ``images``; ``unlabelled`` images have no ReaL label and are not among them."""

    top1: float
    images: int
    unlabelled: int
    damaged: tuple[Damaged, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "images": self.images,
            "unlabelled": self.unlabelled,
            "damaged": damaged_entries(self.damaged),
        }


def read_real_labels(path: str | Path) -> list[list[int]]:
    """The list of label lists in ``real.json``, in the order ILSVRC2012_val_00000001, …

    Raises:
        InputError: The file is not such a list.
    """
    try:
        labels = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable as ReaL labels: {error}") from error
    if not isinstance(labels, list) or not all(
        isinstance(entry, list) and all(type(label) is int and label >= 0 for label in entry) for entry in labels
    ):
        raise InputError(f"{path} is not a list of lists of class indices, as ReaL's real.json is")
    return labels


def real_index(file: str | Path) -> int:
    """Position in the ReaL list of a validation image, by its name: ``ILSVRC2012_val_00000001.JPEG`` is 0.

    Raises:
        InputError: The name is not one of the validation set's.
    """
    found = _NAME.match(Path(file).name)
    if not found or int(found[1]) == 0:
        raise InputError(f"{file} has no place in ReaL's list: names look like ILSVRC2012_val_00000001.JPEG")
    return int(found[1]) - 1


@torch.inference_mode()
def evaluate_real(
    model: nn.Module,
    files: Sequence[Path],
    labels: Sequence[Sequence[int]],
    *,
    batch_size: int = 64,
    on_error: OnError = "skip",
    device: str | torch.device = "cpu",
) -> RealAccuracy:
    """Scores ``model`` (1,000 outputs in ImageNet's order, with its preprocessing) on ImageNet validation files.

    The model is moved to ``device``.

    Raises:
        InputError: A file that is none of the validation set's, none that could be scored, or there is no such device.
    """
    device = usable_device(device)
    places = {file: real_index(file) for file in files}
    if beyond := [file for file, place in places.items() if place >= len(labels)]:
        raise InputError(f"{beyond[0]} is past the end of the {len(labels)} ReaL labels")
    labelled = [file for file in files if labels[places[file]]]
    model.to(device).eval()
    right = scored = 0
    damaged: list[Damaged] = []
    for paths, x, reasons in batches(model, labelled, batch_size, on_error):
        damaged += [Damaged(str(path), reason) for path, reason in reasons.items()]
        guesses = model(x.to(device)).argmax(dim=-1).tolist() if len(x) else []
        readable = [path for path in paths if path not in reasons]
        right += sum(guess in labels[places[path]] for path, guess in zip(readable, guesses))
        scored += len(guesses)
    if not scored:
        raise InputError(f"none of the {len(files)} files could be scored: {len(damaged)} damaged, the rest unlabelled")
    return RealAccuracy(right / scored, scored, len(files) - len(labelled), tuple(damaged))
