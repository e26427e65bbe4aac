"""Scikit-learn's handwritten digits: 1,797 real 8×8 scans that come with the package, so no download.

(Optical Recognition of Handwritten Digits, UCI, CC BY 4.0.) They are enlarged to 12×12, where patches of two pixels
make a 6×6 grid of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from tokenlearner.insertion.saving import Preprocessing

PREPROCESSING = Preprocessing(
    input_size=(3, 12, 12), mean=(0.305,) * 3, std=(0.376,) * 3, interpolation="bilinear", crop_pct=1.0
)
CLASSES = tuple("0123456789")


@dataclass(frozen=True)
class Digits:
    train: InMemoryImages
    test: InMemoryImages
    test_pictures: tuple[Image.Image, ...]


class InMemoryImages(Dataset[tuple[Tensor, int, int]]):
    """Preprocessed images (n, c, h, w) and labels; training ones are turned, shifted and scaled a little each time."""

    def __init__(self, images: Tensor, labels: Tensor, augment: v2.Transform | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        image = self.images[index]
        return self.augment(image) if self.augment else image, int(self.labels[index]), index


def load(held_out: float = 0.25, seed: int = 0) -> Digits:
    """The digits, split at random with every class in proportion."""
    data = load_digits()
    pictures = [Image.fromarray(np.uint8(image * (255 / 16))).convert("RGB") for image in data.images]
    transform = PREPROCESSING.transform()
    images = torch.stack([transform(picture) for picture in pictures])
    labels = torch.from_numpy(data.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=held_out, stratify=data.target, random_state=seed)
    black = [-mean / std for mean, std in zip(PREPROCESSING.mean, PREPROCESSING.std)]
    augment = v2.RandomAffine(
        degrees=11.5,
        translate=(0.06, 0.06),
        scale=(0.88, 1.12),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=black,
    )
    return Digits(
        train=InMemoryImages(images[train], labels[train], augment),
        test=InMemoryImages(images[test], labels[test]),
        test_pictures=tuple(pictures[i] for i in test),
    )
