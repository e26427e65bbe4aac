"""Pre-training on pictures of several classes, then fine-tuning on other pictures at a higher resolution.

As in the paper, where JFT's labels are learned with a sigmoid each at 224², and the model is fine-tuned with a new head
at 384² or 512². Here four pictures of CIFAR-10, each at half its side, make a mosaic of up to four classes; flowers at
48² follow, with positions interpolated from 8×8 to 12×12 patches.

Paper (B/16, pre-trained, ImageNet at 384²): plain 84.73, 8 tokens at ½ 83.65 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenlearner.models.weights import load_vit_weights
from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.pictures import (
    CIFAR10,
    InMemory,
    Pictures,
    ViT,
    build,
    input_size,
    moved_and_flipped,
    sets_of,
)
from tokenlearner.study.settings import size_of
from tokenlearner.study.study import Job, Study
from tokenlearner.training.fit import fit

import lightning as L
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Tuned(ViT):
    """A variant: the ViT, and whether it is pre-trained."""

    pretrained: bool = True


@dataclass(frozen=True)
class TwoStages:
    """Settings of both stages; width, depth, heads and patch must be the same in both."""

    pretraining: Pictures
    finetuning: Pictures


class Mosaics(Dataset[Any]):
    """2×2 mosaics of ``pictures`` at half their side, one for each; labels (classes,) have a 1 for every class in it.

    The place says which picture comes first. The others are random where pictures are to be moved and flipped, else
    those a quarter, a half and three quarters of the set further.
    """

    def __init__(self, pictures: InMemory, classes: int) -> None:
        self.mean, self.std, self.padding = pictures.mean, pictures.std, pictures.padding // 2
        self.tiles = F.avg_pool2d(pictures.pixels.float(), 2).round().byte()
        self.targets = F.one_hot(pictures.labels, classes).float()

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, places: Sequence[int]) -> list[Any]:
        first, n = torch.as_tensor(places)[:, None], len(self)
        steps = torch.randint(n, (len(places), 3)) if self.padding else n * torch.tensor([[1, 2, 3]]) // 4
        chosen = torch.cat([first, (first + steps) % n], dim=1)
        x = (self.tiles[chosen.flatten()] / 255 - self.mean) / self.std
        if self.padding:
            x = moved_and_flipped(x, self.padding)
        x = rearrange(x, "(b p q) c h w -> b c (p h) (q w)", p=2, q=2)
        return list(zip(x, self.targets[chosen].amax(dim=1), places))


def two_stages(job: Job) -> dict[str, Any]:
    """Pre-trains where the variant says so, fine-tunes, and scores on the second stage's test set."""
    settings = job.settings.finetuning
    train_set, test_set, classes = sets_of(job.data, settings, settings.side)
    weights, precision = pretrained(job) if job.variant.pretrained else ({}, None)
    L.seed_everything(job.seed, workers=True, verbose=False)
    model = build(job.variant, settings, len(classes))
    if weights:
        load_vit_weights(model, weights)
    fitted = fit(
        model,
        train_set,
        test_set,
        settings.recipe(job.seed),
        job.folder / "finetuning",
        num_classes=len(classes),
        checkpoints=True,
        resume=True,
    )
    return {
        "accuracy": round(fitted.accuracy, 4),
        "pretraining_map": precision,
        "train_loss": fitted.history[-1]["train_loss"],
        **size_of(model, input_size(replace(job, settings=settings)), settings),
    }


def pretrained(job: Job) -> tuple[dict[str, Tensor], float]:
    """Weights of the first stage without its head, and the mean average precision on mosaics of the test pictures.

    The head's biases start at 0 and not, as for thousands of rare classes, at -10: every class is in a third of these.
    """
    settings = job.settings.pretraining
    train_set, test_set, classes = sets_of(job.data, settings, settings.side)
    L.seed_everything(job.seed, workers=True, verbose=False)
    model = build(job.variant, settings, len(classes))
    fitted = fit(
        model,
        Mosaics(train_set, len(classes)),
        Mosaics(test_set, len(classes)),
        settings.recipe(job.seed, loss="sigmoid"),
        job.folder / "pretraining",
        num_classes=len(classes),
        multilabel=True,
        checkpoints=True,
        resume=True,
    )
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    return weights, round(fitted.accuracy, 4)


SIZES = {
    "cpu": TwoStages(
        replace(CIFAR10["cpu"], epochs=2),
        replace(CIFAR10["cpu"], data="flowers", side=48, epochs=10, warmup_epochs=1.0),
    ),
    "gpu": TwoStages(
        replace(CIFAR10["gpu"], epochs=100, mixup=0.0, cutmix=0.0, label_smoothing=0.0),  # mosaics are mixed already
        replace(CIFAR10["gpu"], data="flowers", side=48, epochs=100, batch_size=128, lr=5e-4, ema=0.999),
    ),
}
VARIANTS = {
    "plain": Tuned("plain ViT, pre-trained"),
    "8 at 1/2": Tuned("8 tokens at ½, pre-trained", tokens=8),
    "plain from scratch": Tuned("plain ViT, not pre-trained", pretrained=False),
    "8 at 1/2 from scratch": Tuned("8 tokens at ½, not pre-trained", tokens=8, pretrained=False),
}

STUDY = Study(
    title="Multi-label pre-training at 32², fine-tuning on flowers at 48²",
    question="Do learned tokens cost accuracy after pre-training, and at a higher resolution?",
    run=two_stages,
    variants=lambda _: VARIANTS,
    sizes=SIZES,
    draw=bars,
    claims=(
        Claim(
            2,
            "Pre-trained and fine-tuned at a higher resolution, ½ depth is about as accurate",
            "8 at 1/2",
            "plain",
            "83.65 and 84.73 % (384², table 1)",
            "about",
            2.0,
        ),
        Claim(
            2,
            "Not pre-trained, at the higher resolution, ½ depth is about as accurate",
            "8 at 1/2 from scratch",
            "plain from scratch",
            "not printed",
            "about",
            2.0,
            decides=False,
        ),
    ),
)
