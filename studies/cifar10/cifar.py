"""CIFAR-10 from ``../shared/data/images``: decoded once, kept on the device as bytes, augmented there in whole batches.

A decoding worker per image would be slower than a model this small. The pixels are not quite the official ones: the
source had stored them as JPEG again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels in [0, 1]


class Images(NamedTuple):
    """``pixels`` uint8 (n, 3, h, w), ``labels`` int64 (n,), ``classes`` the names in order."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def part(self, start: int | None, stop: int | None) -> Images:
        return Images(self.pixels[start:stop], self.labels[start:stop], self.classes)


def read_npz(path: Path, limit: int | None = None) -> Images:
    """Decodes the first ``limit`` images (all if None); the files are shuffled already."""
    data = np.load(path)
    jpeg, offsets = data["jpeg"], data["offsets"]
    count = min(limit or len(offsets), len(offsets) - 1)
    pixels = [_decode(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in range(count)]
    labels = torch.from_numpy(data["labels"][:count].astype(np.int64))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Images(stacked, labels, tuple(str(name) for name in data["classes"]))


def _decode(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


@dataclass(frozen=True)
class Augmentation:
    """Per image: a crop of the padded picture and a flip always; the rest with probability one half each, if not 0."""

    padding: int = 4
    affine: float = 0.0
    """1 rotates up to 15°, shears and scales up to 15 %."""
    colour: float = 0.0
    """Brightness and contrast change by up to this share."""
    erase: int = 0
    """Side of a square that is blanked, in pixels."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Bytes (b, 3, h, w) → normalised floats."""
        x = normalise(crop_and_flip(pixels, self.padding, generator))
        if self.affine:
            x = random_affine(x, self.affine, generator)
        if self.colour:
            x = random_colour(x, self.colour, generator)
        if self.erase:
            x = random_erase(x, self.erase, generator)
        return x


def normalise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def crop_and_flip(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    b, _, h, w = x.shape
    x = F.pad(x, (padding, padding, padding, padding))
    top, left = (_whole(b, 2 * padding + 1, x, generator) for _ in range(2))
    columns = torch.arange(w, device=x.device).expand(b, w)
    columns = torch.where(_half(b, x, generator)[:, None], columns.flip(1), columns) + left[:, None]
    rows = torch.arange(h, device=x.device) + top[:, None]
    image = torch.arange(b, device=x.device)[:, None, None, None]
    channel = torch.arange(x.shape[1], device=x.device)[:, None, None]
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def random_affine(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    b = len(x)
    angle, shear, scale = (0.26 * strength * _spread(b, x, generator) for _ in range(3))  # 15° is 0.26
    cos, sin, zoom, zero = angle.cos(), angle.sin(), 1 + 0.6 * scale, torch.zeros_like(angle)
    change = torch.stack([zoom * cos, shear - sin, zero, sin, zoom * cos, zero], dim=1).view(b, 2, 3)
    same = torch.eye(2, 3, device=x.device)
    change = torch.where(_half(b, x, generator)[:, None, None], change, same)
    grid = F.affine_grid(change, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def random_colour(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    b = len(x)
    brightness, contrast = (strength * _spread(b, x, generator).view(b, 1, 1, 1) for _ in range(2))
    centre = x.mean(dim=(1, 2, 3), keepdim=True)
    changed = centre + (1 + contrast) * (x - centre) + 2 * brightness  # 2 deviations are about half the range
    return torch.where(_half(b, x, generator).view(b, 1, 1, 1), changed, x)


def random_erase(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    b, _, h, w = x.shape
    y0, x0 = (_whole(b, size, x, generator) - side // 2 for size in (h, w))  # the square may stick out
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
    inside = ((rows >= y0[:, None]) & (rows < y0[:, None] + side))[:, :, None] & (
        (columns >= x0[:, None]) & (columns < x0[:, None] + side)
    )[:, None, :]
    return x.masked_fill((inside & _half(b, x, generator)[:, None, None])[:, None], 0.0)


class Batches:
    """One epoch of (images, labels) after the other; what is drawn depends on ``seed`` alone."""

    def __init__(self, images: Images, size: int, augmentation: Augmentation | None = None, seed: int = 0) -> None:
        self.images, self.size, self.augmentation = images, size, augmentation
        self.generator = torch.Generator(images.pixels.device).manual_seed(seed)

    def __len__(self) -> int:
        """A shuffled epoch leaves its last, smaller batch out."""
        whole, rest = divmod(len(self.images.labels), self.size)
        return max(whole, 1) if self.augmentation else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels, _ = self.images
        if self.augmentation is None:
            for p, y in zip(pixels.split(self.size), labels.split(self.size)):
                yield normalise(p), y
            return
        order = torch.randperm(len(labels), generator=self.generator, device=labels.device)
        for chosen in order.split(self.size)[: len(self)]:
            yield self.augmentation(pixels[chosen], self.generator), labels[chosen]


def _whole(count: int, stop: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(stop, (count,), device=like.device, generator=generator)


def _spread(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [−1, 1]."""
    return 2 * torch.rand(count, device=like.device, generator=generator) - 1


def _half(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(count, device=like.device, generator=generator) < 0.5
