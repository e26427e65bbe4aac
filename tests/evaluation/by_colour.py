"""A model whose every answer is known: it ranks its classes by how near their brightness is to the picture's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from tokenlearner.insertion.saving import Preprocessing

SIDE = 8
STEP = 30  # grey levels from one class to the next
SHARPNESS = 40.0
PREPROCESSING = Preprocessing((3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, interpolation="nearest", crop_pct=1.0)


def level(position: int) -> int:
    """Grey level of pictures of the class at ``position``: a little above its own, so that no two are equally near."""
    return STEP * position + 4


def by_colour(names: Sequence[str]) -> nn.Module:
    """Logit j is -SHARPNESS·(g - c_j)² for mean grey g in [0, 1] and c_j = STEP·j/255, less what all j share."""
    centres = torch.arange(len(names)) * STEP / 255
    linear = nn.Linear(3 * SIDE * SIDE, len(names))
    with torch.no_grad():
        linear.weight.copy_((2 * SHARPNESS * centres / (3 * SIDE * SIDE))[:, None].expand_as(linear.weight))
        linear.bias.copy_(-SHARPNESS * centres**2)
    model = nn.Sequential(nn.Flatten(), linear)
    model.preprocessing, model.label_names = PREPROCESSING, tuple(names)
    return model


def nearest(position: int, names: Sequence[str]) -> list[str]:
    """The classes from likeliest to least likely for a picture of the class at ``position``."""
    return sorted(names, key=lambda name: abs(STEP * names.index(name) - level(position)))


def draw(path: Path, position: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((SIDE, SIDE, 3), level(position), np.uint8)).save(path)
    return path
