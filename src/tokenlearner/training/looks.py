"""What a trained model's tokens look at, for the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenlearner.evaluation.films import draw_film, free_name
from tokenlearner.insertion.insert import attention_maps
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import overlay, picture_of
from tokenlearner.inspection.report import FilmLook, Look

LONGEST_NAME = 60  # letters of a file's name; a clip of many classes would have more than a disk takes


@torch.inference_mode()
def looks_at(
    model: nn.Module,
    images: Float[Tensor, "b c height width"],
    labels: Int[Tensor, " b"] | Float[Tensor, "b classes"],
    preprocessing: Preprocessing,
    names: Sequence[str],
) -> list[Look]:
    """One look per image: the picture with its prediction, and the first learner's maps over it.

    Of multi-label images, whose ``labels`` are (b, classes) of 0.0 and 1.0, every class above one half is predicted.
    """
    maps = next(iter(attention_maps(model, images).values()))
    logits = model(images)
    looks = []
    for image, label, scores, attention in zip(images, labels, logits, maps):
        picture = picture_of(image, preprocessing)
        looks.append(
            Look(picture, caption(*_said_and_true(scores, label, names)), [overlay(picture, a) for a in attention])
        )
    return looks


@torch.inference_mode()
def film_looks(
    model: nn.Module,
    clips: Float[Tensor, "b c t h w"],
    labels: Int[Tensor, " b"] | Float[Tensor, "b classes"],
    preprocessing: Preprocessing,
    names: Sequence[str],
    folder: Path,
) -> list[FilmLook]:
    """One look per clip: a sheet and a film of the first learner's maps, in ``folder`` by the name of the true class.

    Args:
        model: Takes clips.
        clips: Held-out ones, prepared as the model takes them. They go through it one at a time.
        labels: Of multi-label clips (b, classes) of 0.0 and 1.0; then every class above one half is predicted.
        preprocessing: What was done to the clips; says their frames a second.
        names: Of the classes.
        folder: Made if it is not there.

    Raises:
        InputError: The model has no maps, or ``preprocessing`` has no ``fps``.
    """
    looks, taken = [], list[str]()
    for clip, label in zip(clips, labels, strict=True):
        said, true = _said_and_true(model(clip[None])[0], label, names)
        taken.append(free_name(re.sub(r"\W+", "-", true)[:LONGEST_NAME].strip("-") or "clip", folder, taken))
        drawn = draw_film(model, clip, preprocessing, folder, taken[-1])
        looks.append(FilmLook(drawn.video, drawn.sheet, caption(said, true)))
    return looks


def _said_and_true(
    scores: Float[Tensor, " classes"], label: Int[Tensor, ""] | Float[Tensor, " classes"], names: Sequence[str]
) -> tuple[str, str]:
    """The classes a model says, and those that are there."""
    if not label.ndim:
        return names[int(scores.argmax())], names[int(label)]
    said, true = (", ".join(names[i] for i in part.nonzero()) or "nothing" for part in (scores > 0, label > 0))
    return said, true


def caption(said: str, true: str) -> str:
    """What a model said of a picture, and what it is where that is something else."""
    return said if said == true else f"{said}, is {true}"


def one_of_each(labels: Int[Tensor, " b"]) -> list[int]:
    """Where each class comes first, in the order of the classes."""
    return [int((labels == label).nonzero()[0]) for label in labels.unique()]
