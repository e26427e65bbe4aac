"""Runs on sets of small pictures: a ViT from scratch, by one recipe, whatever is inserted into it.

The ViT has no class token, averages at the end and starts with 2-D sine-cosine positions, as the paper's. Pictures are
decoded once and kept as bytes; a run is :func:`tokenlearner.training.fit.fit` on them, and what is scored are the
averaged weights of the last epoch on the whole test set: no epoch is picked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from tokenlearner.data.images import LabelledImages, read_picture, scan_class_folders
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert
from tokenlearner.models.pooling import PooledViT
from tokenlearner.study.settings import Training, size_of
from tokenlearner.study.study import Job
from tokenlearner.training.fit import Fitted, fit
from tokenlearner.training.recipe import AugmentRecipe, Recipe

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class ViT:
    """A variant: the ViT of a size, with what is inserted. Numbers that are None are the settings'."""

    label: str
    tokens: int = 0
    at: int | float = 0.5
    """A layer, or a share of the depth."""
    kind: str = "mlp"
    fuser: str | None = None
    extra_layers: int = 0
    pooling: tuple[tuple[int, int], ...] = ()
    """(layer, side) pairs: the grid is averaged to side × side before that layer."""
    side: int | None = None
    patch: int | None = None
    depth: int | None = None


@dataclass(frozen=True)
class Pictures(Training):
    """Settings: a set, the ViT and the recipe. ``most`` is of training pictures, all if None."""

    data: str = "cifar10"
    """A folder of the data folder, with ``train`` and ``val`` (or ``test``) folders of classes."""
    side: int = 32
    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 2
    ema: float = 0.99
    padding: int = 4
    """Pixels that a picture of 32 is moved by at most; grows with the side."""
    mixup: float = 0.0
    cutmix: float = 0.0
    most: int | None = None

    def recipe(self, seed: int, **more: Any) -> Recipe:
        augment = AugmentRecipe(mixup=self.mixup, cutmix=self.cutmix)  # crops and flips are InMemory's
        return super().recipe(seed, **{"ema": self.ema, "augment": augment, **more})


# For one thread without a GPU: a minute a run. "gpu" is meant for a plain ViT of more than 90 % on CIFAR-10.
CIFAR10 = {
    "cpu": Pictures(),
    "gpu": Pictures(
        width=192,
        depth=12,
        heads=3,
        epochs=150,
        batch_size=512,
        optimizer="adamw",
        lr=1.5e-3,
        warmup_epochs=5.0,
        weight_decay=0.08,
        ema=0.9995,
        mixup=0.4,
        cutmix=1.0,
        label_smoothing=0.1,
        drop_path=0.1,
    ),
}


class InMemory(Dataset[Any]):
    """Pictures as bytes (n, 3, h, w), moved and flipped at random where ``padding`` is not 0; whole batches at once."""

    def __init__(
        self, pixels: UInt8[Tensor, "n 3 h w"], labels: Tensor, mean: Tensor, std: Tensor, padding: int
    ) -> None:
        self.pixels, self.labels, self.padding = pixels, labels, padding
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        chosen = torch.as_tensor(places)
        x = self.pixels[chosen].float().sub_(255 * self.mean).div_(255 * self.std)
        if self.padding:
            x = moved_and_flipped(x, self.padding)
        return list(zip(x, self.labels[chosen], places))


def moved_and_flipped(x: Float[Tensor, "b c h w"], padding: int) -> Float[Tensor, "b c h w"]:
    """Each picture moved by up to ``padding`` pixels both ways, over zeros, and flipped or not."""
    b, _, h, w = x.shape
    x = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, b, 1))
    columns = torch.arange(w).expand(b, w)
    columns = torch.where(torch.rand(b, 1) < 0.5, columns.flip(1), columns) + left
    rows = torch.arange(h) + top
    picture, channel = torch.arange(b)[:, None, None, None], torch.arange(x.shape[1])[:, None, None]
    return x[picture, channel, rows[:, None, :, None], columns[:, None, None, :]]


@functools.lru_cache(maxsize=4)
def decoded(folder: Path, side: int, most: int | None) -> tuple[UInt8[Tensor, "n 3 h w"], Tensor, tuple[str, ...]]:
    """The pictures of class folders at side × side, their labels and the classes; ``most`` of them, the same each time.

    Raises:
        InputError: No such folder, or a picture that can't be read.
    """
    images = scan_class_folders(folder)
    if most is not None:
        images = images.subset(sorted(np.random.default_rng(0).permutation(len(images))[:most].tolist()))
    return pixels_of(images, side), torch.tensor(images.labels), tuple(images.classes)


def pixels_of(images: LabelledImages, side: int) -> UInt8[Tensor, "n 3 h w"]:
    """The pictures at side × side."""
    pixels = np.stack([_square(images, i, side) for i in range(len(images))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _square(images: LabelledImages, i: int, side: int) -> np.ndarray:
    picture = read_picture(images.files[i])
    return np.asarray(picture if picture.size == (side, side) else picture.resize((side, side), 3))  # 3 is bicubic


def sets_of(data: Path, settings: Pictures, side: int) -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """To learn from, to be scored on, and the classes."""
    parts = parts_of(data / settings.data)
    if parts is None:
        raise InputError(
            f"the data folder {data} must hold the set as {settings.data}/train and {settings.data}/test (or val), "
            "a folder a class; studies/npz_to_folders.py writes them"
        )
    train, held_out = parts
    pixels, labels, classes = decoded(train, side, settings.most)
    mean, std = moments(pixels)
    test_pixels, test_labels, test_classes = decoded(held_out, side, None)
    if test_classes != classes:
        raise InputError(f"{held_out} has other classes than {train}")
    padding = round(settings.padding * side / 32)
    return InMemory(pixels, labels, mean, std, padding), InMemory(test_pixels, test_labels, mean, std, 0), classes


def parts_of(folder: Path) -> tuple[Path, Path] | None:
    """The folders of a set to learn from and to be scored on; None if one is missing."""
    held_out = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    return (folder / "train", held_out) if held_out and (folder / "train").is_dir() else None


@functools.lru_cache(maxsize=4)
def moments_of(data: Path, settings: Pictures) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """What pictures of ``settings`` are normed by: moments of those that are learned from."""
    return moments(decoded(data / settings.data / "train", settings.side, settings.most)[0])


def moments(pixels: UInt8[Tensor, "n 3 h w"]) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Mean and deviation of every channel, of values from 0 to 1."""
    part = pixels[:10_000].float() / 255
    return part.mean(dim=(0, 2, 3))[:, None, None], part.std(dim=(0, 2, 3))[:, None, None]


def build(variant: ViT, settings: Pictures, classes: int) -> nn.Module:
    side, patch = variant.side or settings.side, variant.patch or settings.patch
    kind: Any = PooledViT if variant.pooling else VisionTransformer
    model = kind(
        img_size=side,
        patch_size=patch,
        num_classes=classes,
        embed_dim=settings.width,
        depth=variant.depth or settings.depth,
        num_heads=settings.heads,
        class_token=False,
        global_pool="avg",
        drop_path_rate=settings.drop_path,
        **({"pooling": variant.pooling} if variant.pooling else {}),
    )
    with torch.no_grad():
        model.pos_embed.copy_(build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=settings.width))
    if variant.tokens:
        options: dict[str, Any] = {"kind": variant.kind, "fuser": variant.fuser, "extra_layers": variant.extra_layers}
        insert(model, variant.tokens, variant.at, **options)
    return model


def trained(job: Job) -> tuple[nn.Module, Fitted]:
    """The model of ``job`` after its training, whose weights are then in the job's folder for :func:`reopened`."""
    train_set, test_set, classes = sets_of(job.data, job.settings, input_size(job)[1])
    L.seed_everything(job.seed, workers=True, verbose=False)
    model = build(job.variant, job.settings, len(classes))
    recipe = job.settings.recipe(job.seed)
    fitted = fit(
        model, train_set, test_set, recipe, job.folder, num_classes=len(classes), checkpoints=True, resume=True
    )
    torch.save(model.state_dict(), job.folder / WEIGHTS)
    return model, fitted


def from_scratch(job: Job) -> dict[str, Any]:
    """Trains and scores the ViT of a job: its numbers."""
    model, fitted = trained(job)
    return {
        "accuracy": round(fitted.accuracy, 4),
        "train_loss": fitted.history[-1]["train_loss"],
        **size_of(model, input_size(job), job.settings),
    }


def reopened(job: Job) -> nn.Module:
    """The model of a job that :func:`from_scratch` has done, with the weights that were scored, in eval mode.

    Raises:
        InputError: The weights are no longer there.
    """
    path = job.folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path} is gone, though the run is done: delete {job.folder} to do it again")
    state = torch.load(path, weights_only=True)
    model = build(job.variant, job.settings, len(state["head.bias"]))
    model.load_state_dict(state)
    return model.eval()


def input_size(job: Job) -> tuple[int, int, int]:
    """Of the job's pictures, (c, h, w)."""
    side = job.variant.side or job.settings.side
    return 3, side, side
