"""Runs on short clips: a small X(2+1)D or ViViT by one recipe, whatever is put into it.

Moving digits (:mod:`tokenlearner.data.moving_digits`) need no files: their label is the order of the frames, so that
nothing but time tells the classes apart, and noise over the frames keeps small models from telling all of them. On
UT-Interaction a model learns from one of the two sets and is scored on the other, and back. A run is
:func:`tokenlearner.training.fit.fit`, and what is scored are the weights after the last epoch: no epoch is picked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from tokenlearner.data import moving_digits
from tokenlearner.data.images import collate
from tokenlearner.evaluation.clips import logits_of
from tokenlearner.insertion.insert import insert
from tokenlearner.models.bottleneck import MODULES
from tokenlearner.models.frame_average import FrameAverageViT
from tokenlearner.models.opening import open_trained
from tokenlearner.models.vivit import ViViT, sincos_pos_embed
from tokenlearner.models.weights import inflate, load_vit_weights
from tokenlearner.models.x2plus1d import PLAIN, X2Plus1D
from tokenlearner.study.interactions import directions
from tokenlearner.study.settings import Training, size_of
from tokenlearner.study.study import Job
from tokenlearner.training.fit import fit

KERNEL = "patch_embed.proj.weight"
WATCHED = 64  # clips scored after every epoch, for the log alone


@dataclass(frozen=True)
class Middle:
    """A variant: the X(2+1)D with this module in the middle of its last three blocks."""

    label: str
    module: str = PLAIN
    kind: str = "conv1"
    """Of the TokenLearner, where the module has one."""


@dataclass(frozen=True)
class Slices:
    """A variant: the ViViT with ``tokens`` learned at half depth, or 0; or an image ViT's average over the frames."""

    label: str
    tokens: int = 0
    over: str = "slice"
    window: int | None = None
    frame_average: bool = False


@dataclass(frozen=True)
class Clips(Training):
    """Settings: the clips and the recipe."""

    data: str = "moving digits"
    """Or ``ut_interaction``, a folder of the data folder."""
    noise: float = 0.0
    """Of moving digits: deviation of what is added to every pixel, over that of the pixels themselves."""
    clips: int = 1024
    """Of moving digits, an epoch: each drawn anew."""
    test_clips: int = 1800
    """Of moving digits: four of every digit that is held out."""
    frames: int = 16
    """Of UT-Interaction, as the next three; moving digits have 8 frames of 20×20."""
    side: int = 64
    fps: float = 5.0
    views: tuple[int, int] = (2, 3)
    """Windows of a clip, and crops of each, that are scored."""
    epochs: int = 8
    batch_size: int = 32
    lr: float = 5e-3
    warmup_epochs: float = 0.5
    precision: str = "32-true"


@dataclass(frozen=True)
class X2Plus1DClips(Clips):
    widths: tuple[int, ...] = (16,)
    depths: tuple[int, ...] = (4,)
    head_width: int = 64
    drop: float = 0.0
    tokens: int = 8
    key_dim: int = 12
    heads: int = 4
    num_weights: int = 12


@dataclass(frozen=True)
class ViViTClips(Clips):
    width: int = 64
    depth: int = 4
    heads: int = 4
    patch: int = 4
    tubelet: int = 2
    init: str | None = None
    """An image ViT with weights to start from; from scratch if None."""


# The noise and the epochs leave the plain X(2+1)D at about two thirds of the clips. "gpu" is for real videos.
X2PLUS1D = {
    "cpu": X2Plus1DClips(noise=2.0),
    "gpu": X2Plus1DClips(
        data="ut_interaction",
        side=112,
        epochs=100,
        batch_size=8,
        lr=3e-3,
        warmup_epochs=5.0,
        label_smoothing=0.1,
        widths=(24, 48, 96),
        depths=(2, 3, 5),
        head_width=512,
        drop=0.2,
        key_dim=64,
        heads=8,
        num_weights=24,
    ),
}
VIVIT = {
    "cpu": ViViTClips(epochs=12, warmup_epochs=1.0, label_smoothing=0.1),
    "gpu": ViViTClips(
        data="ut_interaction",
        epochs=50,
        batch_size=6,
        lr=3e-3,
        warmup_epochs=5.0,
        label_smoothing=0.1,
        width=128,
        patch=8,
        init="tokenlearner_micro4_32_plain.cifar10",
    ),
}


class Noisy(Dataset[Any]):
    """Moving digits with noise over every pixel: new noise each time, or that of a clip's number."""

    def __init__(self, clips: moving_digits.Clips, noise: float, *, fixed: bool) -> None:
        self.clips, self.noise, self.fixed = clips, noise, fixed

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, places: list[int]) -> list[Any]:
        return [(clip + self._noise(clip, i), label, i) for clip, label, i in self.clips.__getitems__(places)]

    def _noise(self, clip: Tensor, i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i) if self.fixed else None
        return self.noise * torch.randn(clip.shape, generator=generator)


class Fold(NamedTuple):
    """A set to learn from and one to be scored on; ``input_size`` is (c, t, h, w)."""

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: int
    input_size: tuple[int, int, int, int]


def folds_of(settings: Clips, data: Path) -> list[Fold]:
    """Moving digits are one, UT-Interaction's directions two.

    Raises:
        InputError: UT-Interaction is not there.
    """
    if settings.data == "moving digits":
        size = (1, moving_digits.FRAMES, moving_digits.SIDE, moving_digits.SIDE)
        return [Fold("digits", *digits(settings), len(moving_digits.CLASSES), size)]
    found = directions(data, frames=settings.frames, side=settings.side, fps=settings.fps, views=settings.views)
    return [Fold(*of_set, (3, settings.frames, settings.side, settings.side)) for of_set in found]


def digits(settings: Clips) -> tuple[Noisy, Noisy]:
    """Moving digits to learn from, and of the digits held out ``test_clips``, each digit's in different orders."""
    drawn = moving_digits.load(settings.clips)
    numbers = torch.arange(settings.test_clips)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(moving_digits.FRAMES, (len(numbers),), generator=generator)
    test = moving_digits.Clips(drawn.test.digits, numbers % len(moving_digits.CLASSES), starts)
    return Noisy(drawn.train, settings.noise, fixed=False), Noisy(test, settings.noise, fixed=True)


def build_x2plus1d(variant: Middle, settings: X2Plus1DClips, fold: Fold) -> nn.Module:
    channels, frames, side, _ = fold.input_size
    options: dict[str, Any] = {}
    if "tokenlearner" in MODULES[variant.module]:
        options = {"num_tokens": settings.tokens, "kind": variant.kind, "num_weights": settings.num_weights}
        if variant.kind == "dense":
            cells = math.ceil(side / 2 ** (len(settings.widths) + 1))  # the stem and every stage halve the frame
            options["grid"] = (cells, cells)
    return X2Plus1D(
        variant.module,
        fold.classes,
        channels,
        num_frames=frames,
        img_size=side,
        drop_rate=settings.drop,
        drop_path_rate=settings.drop_path,
        widths=settings.widths,
        depths=settings.depths,
        head_width=settings.head_width,
        key_dim=settings.key_dim,
        num_heads=settings.heads,
        **options,
    )


def build_vivit(variant: Slices, settings: ViViTClips, fold: Fold) -> nn.Module:
    channels, frames, side, _ = fold.input_size
    size: dict[str, Any] = {"img_size": side, "patch_size": settings.patch, "in_chans": channels}
    shape: dict[str, Any] = {"embed_dim": settings.width, "depth": settings.depth, "num_heads": settings.heads}
    more: dict[str, Any] = {"num_classes": fold.classes, "drop_path_rate": settings.drop_path, "class_token": False}
    model: VisionTransformer
    if variant.frame_average:
        model = FrameAverageViT(global_pool="avg", fc_norm=False, **size, **shape, **more)
        grid = (1, *model.patch_embed.grid_size)
    else:
        model = ViViT(num_frames=frames, tubelet_size=settings.tubelet, **size, **shape, **more)
        grid = model.patch_embed.grid_size
    if settings.init is not None:
        image_model: Any = open_trained(settings.init)
        state, of_image = image_model.state_dict(), image_model.patch_embed.grid_size
        if variant.frame_average:
            kernel = resample_patch_embed(state[KERNEL], [settings.patch, settings.patch])  # as inflate does it
            load_vit_weights(model, {**state, KERNEL: kernel}, grid=of_image)
        else:
            inflate(model, state, grid=of_image)
    else:
        with torch.no_grad():
            cast(nn.Parameter, model.pos_embed).copy_(sincos_pos_embed(grid, settings.width))
    if variant.tokens:
        options: dict[str, Any] = {"over": variant.over, "window": variant.window}
        insert(model, variant.tokens, 0.5, "mlp", **options)
    return model


def x2plus1d(job: Job) -> dict[str, Any]:
    """Trains and scores the X(2+1)D of a job, whose variant is a :class:`Middle`: its numbers."""
    return _trained_and_scored(job, build_x2plus1d)


def vivit(job: Job) -> dict[str, Any]:
    """Trains and scores the ViViT of a job, whose variant is a :class:`Slices`: its numbers."""
    return _trained_and_scored(job, build_vivit)


def _trained_and_scored(job: Job, build: Callable[[Any, Any, Fold], nn.Module]) -> dict[str, Any]:
    """The mean accuracy over the folds, each with a model of its own."""
    settings, scores, losses = job.settings, [], []
    folds = folds_of(settings, job.data)
    for fold in folds:
        L.seed_everything(job.seed, workers=True, verbose=False)
        model = build(job.variant, settings, fold)
        fitted = fit(
            model,
            fold.train,
            Subset(fold.test, range(min(WATCHED, len(fold.test)))),  # type: ignore[arg-type]
            settings.recipe(job.seed),
            job.folder / fold.name,
            num_classes=fold.classes,
            checkpoints=True,
            resume=True,
        )
        scores.append(accuracy(model, fold.test, settings.batch_size))
        losses.append(fitted.history[-1]["train_loss"])
    return {
        "accuracy": round(statistics.mean(scores), 4),
        **({f"from_{f.name}": round(score, 4) for f, score in zip(folds, scores)} if len(folds) > 1 else {}),
        "train_loss": statistics.mean(losses),
        **size_of(model, folds[-1].input_size, settings),
    }


@torch.inference_mode()
def accuracy(model: nn.Module, clips: Dataset[Any], batch_size: int) -> float:
    """The share of ``clips`` whose class the model, in eval mode, gives; of several views by their mean."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    right = total = 0
    for batch in DataLoader(clips, batch_size, collate_fn=collate):
        said = logits_of(model, batch.images.to(device), batch_size).argmax(dim=-1)
        right, total = right + int((said.cpu() == batch.labels).sum()), total + len(said)
    model.cpu()
    return right / total
