"""Scikit-learn's handwritten digits: 1,797 real 8×8 scans that come with the package, so no download.

(Optical Recognition of Handwritten Digits, UCI, CC BY 4.0.) They are enlarged to 12×12, where patches of two pixels
make a 6×6 grid of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from tokenlearner.insertion.saving import Preprocessing

PREPROCESSING = Preprocessing(
    input_size=(1, 12, 12), mean=(0.305,), std=(0.322,), interpolation="bilinear", crop_pct=1.0
)
BLACK = -PREPROCESSING.mean[0] / PREPROCESSING.std[0]
CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class Digits:
    train: InMemoryImages
    test: InMemoryImages
    test_pictures: tuple[Image.Image, ...]


class InMemoryImages(Dataset[tuple[Tensor, int, int]]):
    """Preprocessed images (n, c, h, w) and labels; training ones are turned, shifted and scaled a little each time."""

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.images[index]
        return self.augment(image) if self.augment else image, int(self.labels[index]), index


def jitter(image: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    """Turns by up to 11.5°, scales by up to 12 % and shifts by up to 6 %, on a black ground.

    torchvision's RandomAffine shifts by whole pixels, which is too coarse for pictures of twelve.
    """
    angle, scale, *shift = (2 * torch.rand(4) - 1) * torch.tensor([0.2, 0.12, 0.12, 0.12])  # 2 is the picture's width
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    affine = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]]).reshape(1, 2, 3)
    grid = F.affine_grid(affine, [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None] - BLACK, grid, align_corners=False)[0] + BLACK


def load(held_out: float = 0.25, seed: int = 0) -> Digits:
    """The digits, split at random with every class in proportion."""
    data = load_digits()
    pictures = [Image.fromarray(np.uint8(image * (255 / 16))).convert("RGB") for image in data.images]
    transform = PREPROCESSING.transform()
    images = torch.stack([transform(picture) for picture in pictures])
    labels = torch.from_numpy(data.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=data.target, random_state=seed)
    return Digits(
        train=InMemoryImages(images[train], labels[train], jitter),
        test=InMemoryImages(images[test], labels[test]),
        test_pictures=tuple(pictures[i] for i in test),
    )
