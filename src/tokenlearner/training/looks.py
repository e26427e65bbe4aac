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
    labels: Int[Tensor, " b"],
    preprocessing: Preprocessing,
    names: Sequence[str],
) -> list[Look]:
    """One look per image: the picture with its prediction, and the first learner's maps over it."""
    maps = next(iter(attention_maps(model, images).values()))
    predicted = model(images).argmax(dim=-1)
    looks = []
    for image, label, guess, attention in zip(images, labels, predicted, maps):
        picture = picture_of(image, preprocessing)
        caption = names[guess] if guess == label else f"{names[guess]}, is {names[label]}"
        looks.append(Look(picture, caption, [overlay(picture, a) for a in attention]))
    return looks
