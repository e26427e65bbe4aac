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
    """Preprocessed images (n, c, h, w) and labels; ``augment`` changes a batch of training images each time."""

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
        """A batch at once, which is how a DataLoader asks where it can."""
        images = self.images[indices]
        if self.augment:
            images = self.augment(images)
        return [(image, int(self.labels[i]), i) for image, i in zip(images, indices)]


def jitter(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Turns each image by up to 11.5°, scales it by up to 12 % and shifts it by up to 6 %, on a black ground.

    torchvision's RandomAffine shifts by whole pixels, which is too coarse for pictures of twelve.
    """
    draws = 2 * torch.rand(4, len(images)) - 1
    angle, scale, x, y = draws * torch.tensor([[0.2], [0.12], [0.12], [0.12]])  # the picture is 2 wide
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    affine = torch.stack([cos, -sin, x, sin, cos, y], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images - BLACK, grid, align_corners=False) + BLACK


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
