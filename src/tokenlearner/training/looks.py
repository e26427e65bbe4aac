"""What a trained model's tokens look at, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenlearner.insertion.insert import attention_maps
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import overlay, picture_of
from tokenlearner.inspection.report import Look


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
        if label.ndim:
            said, true = (", ".join(names[i] for i in part.nonzero()) or "nothing" for part in (scores > 0, label > 0))
        else:
            said, true = names[int(scores.argmax())], names[int(label)]
        looks.append(Look(picture, caption(said, true), [overlay(picture, a) for a in attention]))
    return looks


def caption(said: str, true: str) -> str:
    """What a model said of a picture, and what it is where that is something else."""
    return said if said == true else f"{said}, is {true}"
