"""The photos of ``../shared/data/images``: decoded once, kept on the device as bytes, augmented there in whole batches.

A decoding worker per photo would be slower than models this small. The pixels of CIFAR-10 are not quite the official
ones: the source had stored them as JPEG again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """``mean`` and ``std`` are of the training pixels in [0, 1]; ``side`` is that of the stored photos."""

    title: str
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATASETS = {
    "cifar10": Dataset("CIFAR-10", 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "flowers": Dataset("Flowers", 128, (0.4581, 0.4181, 0.3077), (0.2668, 0.2404, 0.2567)),
}


class Images(NamedTuple):
    """``pixels`` uint8 (n, 3, h, w), ``labels`` int64 (n,), ``classes`` the names in order."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def part(self, start: int | None, stop: int | None) -> Images:
        return Images(self.pixels[start:stop], self.labels[start:stop], self.classes)

    def to(self, device: str) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device), self.classes)


def load(
    dataset: str, folder: Path, side: int, *, tune: bool = False, limit: int | None = None
) -> tuple[Images, Images]:
    """What to train on and what to score on, ``limit`` photos of each at most.

    Scored on is the test set. With ``tune`` it is ``val`` where the set has one; else the last tenth of the training
    photos, which are not trained on then.
    """
    if dataset == "flowers":
        path = folder / "flowers128.npz"
        return read_npz(path, limit, "train", side), read_npz(path, limit, "val" if tune else "test", side)
    train = read_npz(folder / "cifar10_train.npz", limit, side=side)
    if tune:
        held_out = len(train.labels) // 10
        return train.part(None, -held_out), train.part(-held_out, None)
    return train, read_npz(folder / "cifar10_test.npz", limit, side=side)


def read_npz(path: Path, limit: int | None = None, split: str | None = None, side: int | None = None) -> Images:
    """Decodes the first ``limit`` photos (all if None) of ``split``, to side × side; the files are shuffled already."""
    with np.load(path) as data:
        jpeg, offsets, labels = data["jpeg"], data["offsets"], data["labels"]
        classes = tuple(str(name) for name in data["classes"])
        chosen = np.flatnonzero(data["split"] == split) if split else np.arange(len(labels))
    chosen = chosen[:limit]
    pixels = np.stack([_decode(jpeg[offsets[i] : offsets[i + 1]].tobytes(), side) for i in chosen])
    return Images(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(labels[chosen].astype(np.int64)),
        classes,
    )


def _decode(jpeg: bytes, side: int | None) -> np.ndarray:
    picture = Image.open(io.BytesIO(jpeg)).convert("RGB")
    if side and picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)  # Pillow's is antialiased
    return np.asarray(picture)


@dataclass(frozen=True)
class Augmentation:
    """Per photo: a crop and a flip always; the rest with probability one half each, if not 0."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 0.0
    """The smallest share of the photo that a crop covers (stretched by up to 3:4); 0 crops the padded photo instead."""
    padding: int = 4
    affine: float = 0.0
    """1 rotates up to 15°, shears and scales up to 15 %."""
    colour: float = 0.0
    """Brightness and contrast change by up to this share."""
    erase: int = 0
    """Side of a square that is blanked, in pixels."""

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Bytes (b, 3, h, w) → normalised floats."""
        if self.crop:
            x = resized_crop_and_flip(normalise(pixels, self.mean, self.std), self.crop, generator)
        else:
            x = normalise(crop_and_flip(pixels, self.padding, generator), self.mean, self.std)
        if self.affine:
            x = random_affine(x, self.affine, generator)
        if self.colour:
            x = random_colour(x, self.colour, generator)
        if self.erase:
            x = random_erase(x, self.erase, generator)
        return x


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    return (pixels.float() / 255 - shift) / scale


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


def resized_crop_and_flip(x: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """A rectangle of the photo, its share uniform in [smallest, 1] and its sides' ratio in [3/4, 4/3], at full size."""
    b = len(x)
    share = smallest + (1 - smallest) * (1 + _spread(b, x, generator)) / 2
    ratio = (math.log(4 / 3) * _spread(b, x, generator)).exp()
    width, height = ((share * r).sqrt().clamp(max=1.0) for r in (ratio, 1 / ratio))
    right, down = ((1 - size) * _spread(b, x, generator) for size in (width, height))  # of the centre, 1 is the edge
    width, zero = torch.where(_half(b, x, generator), -width, width), torch.zeros_like(width)
    change = torch.stack([width, zero, right, zero, height, down], dim=1).view(b, 2, 3)
    grid = F.affine_grid(change, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


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
    """(photos, labels) of all ``images``: as they are; with a ``seed`` shuffled and augmented, as it alone decides."""

    def __init__(self, images: Images, size: int, augmentation: Augmentation, seed: int | None = None) -> None:
        self.images, self.size, self.augmentation, self.shuffled = images, size, augmentation, seed is not None
        self.generator = torch.Generator(images.pixels.device).manual_seed(seed or 0)

    def __len__(self) -> int:
        """A shuffled epoch leaves its last, smaller batch out."""
        whole, rest = divmod(len(self.images.labels), self.size)
        return max(whole, 1) if self.shuffled else whole + bool(rest)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pixels, labels, _ = self.images
        if not self.shuffled:
            for p, y in zip(pixels.split(self.size), labels.split(self.size)):
                yield normalise(p, self.augmentation.mean, self.augmentation.std), y
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
