"""What scoring clips needs beyond images: their windows and crops, and one output for all views of a clip."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.data.class_names import read_as
from tokenlearner.data.clip_sources import Listing, clip_name, read_clips_to_score
from tokenlearner.data.clips import ClipFiles, ClipTransform, LabelledClips
from tokenlearner.data.images import HELD_OUT, LabelledImages, OnError
from tokenlearner.errors import InputError
from tokenlearner.insertion.saving import Preprocessing

Images = Literal["auto", "all", "held-out"]
LabelledT = TypeVar("LabelledT", LabelledImages, LabelledClips)
Views = tuple[int, int]
VIEWS: Views = (4, 3)  # windows and crops of each, the paper's for Kinetics


def takes_clips(model: nn.Module) -> bool:
    """Whether the inputs of ``model`` are clips (b, c, t, h, w), as it says by ``takes_clips``."""
    return bool(getattr(getattr(model, "_orig_mod", model), "takes_clips", False))


def clip_transform(preprocessing: Preprocessing, short_side: int | None = None) -> ClipTransform:
    """Prepares clips for evaluation. ``short_side`` is where it differs from the crop's share that
    ``preprocessing`` has.

    Raises:
        InputError: Frames that are not square, or of neither one nor three channels.
    """
    channels, height, width = preprocessing.input_size
    if height != width or channels not in (1, 3):
        raise InputError(
            f"clips are prepared as squares of 1 or 3 channels, and the model takes {channels}×{height}×{width}"
        )
    side = short_side or math.floor(height / preprocessing.crop_pct)
    return ClipTransform(height, max(side, height), mean=preprocessing.mean, std=preprocessing.std)


def clip_files(model: nn.Module, clips: LabelledClips, views: Views = VIEWS, on_error: OnError = "skip") -> ClipFiles:
    """``clips`` as ``model`` wants them, several views each.

    Raises:
        InputError: The model doesn't say how its clips are prepared.
    """
    preprocessing = Preprocessing.of(model)
    if preprocessing is None or preprocessing.frames is None or preprocessing.fps is None:
        raise InputError(
            "the model does not say how its clips are prepared; save it again with "
            "save(model, folder, preprocessing=Preprocessing(..., frames=..., fps=...))"
        )
    transform, frames, fps = clip_transform(preprocessing), preprocessing.frames, preprocessing.fps
    return ClipFiles(clips, transform, frames=frames, fps=fps, views=views, on_error=on_error)


def logits_of(
    model: nn.Module, x: Float[Tensor, "b *v c t h w"], most: int | None = None
) -> Float[Tensor, "b classes"]:
    """What ``model`` says of images or clips; of clips in several views, (b, v, c, t, h, w), the mean over these.

    ``most`` is how many views go through the model at once.
    """
    if x.ndim < 6:
        return model(x)
    parts = [model(part) for part in x.flatten(0, 1).split(most or len(x) * x.shape[1])]
    return torch.cat(parts).unflatten(0, x.shape[:2]).mean(dim=1)


def clips_to_score(
    model: nn.Module,
    folder: Path,
    data: Path,
    which: Images = "auto",
    listing: Listing | None = None,
) -> tuple[LabelledClips, str]:
    """The clips of ``data`` a model saved in ``folder`` should be scored on, and which those are in words.

    As :func:`images_to_score` chooses images.

    Raises:
        InputError: Classes that don't match the model's labels, or "held-out" without a note of what was.
    """
    names = getattr(model, "label_names", None)
    if names is None:
        raise InputError(f"{folder} names no labels, so classes can't be matched with its outputs")
    clips, part, is_all = read_as(
        names, lambda classes: read_clips_to_score(data, classes, listing), lambda it: it[0].classes
    )
    if not is_all:
        return clips, f"the clips in {part}"
    names_of_files = [clip_name(file, data, listing) for file in clips.files]
    return what_training_held_out(clips, names_of_files, folder, data, which, "clips")


def what_training_held_out(
    labelled: LabelledT, files: Sequence[str], folder: Path, data: Path, which: Images, noun: str
) -> tuple[LabelledT, str]:
    """Those of ``labelled`` that the run in ``folder`` held out, and which these are in words; all where none is.

    ``files`` are the names that ``held_out.json`` has for them. ``InputError`` where "held-out" is asked for in vain.
    """
    note = folder / HELD_OUT
    held_out = set(json.loads(note.read_text())["files"]) if note.is_file() else set()
    chosen = [i for i, name in enumerate(files) if name in held_out]
    if which == "held-out" and not chosen:
        raise InputError(f"{note} names no file of {data}; score everything with --images all")
    if which == "all" or not chosen:
        return labelled, f"all {noun}"
    return labelled.subset(chosen), f"the {len(chosen)} {noun} held out in training (of {len(labelled)})"
