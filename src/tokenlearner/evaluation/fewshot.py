"""Few-shot linear transfer: ridge regression on frozen features, as in ViT (arXiv 2010.11929, section 4.1).

k images a class are drawn for training; the targets are +1 for an image's class and −1 for the others; the classifier
is the closed-form solution, so there is nothing to tune but the ridge's strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenlearner.data.images import Damaged, LabelledImages, OnError, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import batches_of, class_labels, nothing_decoded
from tokenlearner.evaluation.features import features_of
from tokenlearner.inspection.speed import usable_device


@dataclass(frozen=True)
class FewShot:
    """``top1`` (0 to 1) of each draw of ``shots`` images a class, and of the ridge strength ``l2`` used."""

    top1: tuple[float, ...]
    shots: int
    l2: float
    images: int
    damaged: tuple[Damaged, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.top1))

    def to_dict(self) -> dict[str, Any]:
        return {
            "top1": self.mean,
            "top1_of_draws": list(self.top1),
            "shots": self.shots,
            "l2": self.l2,
            "images": self.images,
            "damaged": damaged_entries(self.damaged),
        }


def few_shot(
    model: nn.Module,
    train: LabelledImages,
    test: LabelledImages,
    *,
    shots: int = 5,
    draws: int = 3,
    l2: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 2,
    on_error: OnError = "skip",
    device: str | torch.device = "cpu",
) -> FewShot:
    """Accuracy on ``test`` of ridge classifiers fitted to ``shots`` images a class of ``train``, for several draws.

    Damaged files are left out and named, not replaced: a draw with one has a shot less. The model is moved to
    ``device`` for the features; the classifiers are fitted on the CPU.

    Raises:
        InputError: A class has fewer images than ``shots``, a draw has no readable one, the two sets' classes differ,
            one is multi-label, there is no such device, or a setting makes no sense.
    """
    if shots < 1 or draws < 1 or l2 <= 0:
        raise InputError(f"shots and draws must be at least 1 and l2 above 0, not {shots}, {draws} and {l2}")
    if train.classes != test.classes:
        raise InputError(f"the two sets have different classes: {train.classes[:5]} … and {test.classes[:5]} …")
    class_labels(test)
    train_labels = class_labels(train)
    present = set(train_labels)
    if missing := [name for label, name in enumerate(train.classes) if label not in present]:
        raise InputError(f"{len(missing)} classes have no image to train on, the first: {missing[0]}")
    drawn = [draw_shots(train_labels, shots, np.random.default_rng((seed, draw))) for draw in range(draws)]
    needed = sorted({index for indices in drawn for index in indices})
    features, labels, kept, broken = extract(model, train.subset(needed), batch_size, workers, on_error, device)
    place = {needed[index]: row for row, index in enumerate(kept.tolist())}
    test_features, test_labels, _, test_broken = extract(model, test, batch_size, workers, on_error, device)
    scores = []
    for indices in drawn:
        rows = [place[index] for index in indices if index in place]
        if not rows:
            raise InputError(f"none of the {len(indices)} images of a draw could be decoded")
        weight, bias = ridge(features[rows], labels[rows], len(train.classes), l2)
        guesses = (test_features.double() @ weight + bias).argmax(dim=-1)
        scores.append(float((guesses == test_labels).double().mean()))
    return FewShot(tuple(scores), shots, l2, len(test_labels), broken + test_broken)


def draw_shots(labels: Sequence[int], shots: int, random: np.random.Generator) -> list[int]:
    """Indices of ``shots`` random items of every class.

    Raises:
        InputError: A class has fewer.
    """
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    for label, indices in members.items():
        if len(indices) < shots:
            raise InputError(f"class {label} has {len(indices)} images, fewer than the {shots} shots asked for")
    return [int(i) for label in sorted(members) for i in random.choice(members[label], shots, replace=False)]


def ridge(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int, l2: float
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Weight and bias minimising ‖X W + b − Y‖² + l2 ‖W‖², Y = ±1, in float64; the bias is not penalised."""
    X, Y = features.double(), 2.0 * F.one_hot(labels, num_classes).double() - 1.0
    mean_x, mean_y = X.mean(dim=0), Y.mean(dim=0)
    Xc, Yc = X - mean_x, Y - mean_y
    n, d = X.shape
    if n < d:  # the dual has n unknowns instead of d
        weight = Xc.T @ torch.linalg.solve(Xc @ Xc.T + l2 * torch.eye(n, dtype=X.dtype), Yc)
    else:
        weight = torch.linalg.solve(Xc.T @ Xc + l2 * torch.eye(d, dtype=X.dtype), Xc.T @ Yc)
    return weight, mean_y - mean_x @ weight


@torch.inference_mode()
def extract(
    model: nn.Module,
    images: LabelledImages,
    batch_size: int,
    workers: int,
    on_error: OnError = "skip",
    device: str | torch.device = "cpu",
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"], Int[Tensor, " n"], tuple[Damaged, ...]]:
    """What the classifier head would see of each readable image: features, labels, indices; and the damaged files.

    The model computes on ``device``; what is returned is on the CPU.
    """
    loader, device = batches_of(model, images, batch_size, workers, on_error), usable_device(device)
    model.to(device).eval()
    features, labels, indices, damaged = [], [], [], []
    for batch in loader:
        damaged += batch.damaged
        if len(batch.labels):
            features.append(features_of(model, batch.images.to(device)).float().cpu())
            labels.append(batch.labels)
            indices.append(batch.indices)
    if not features:
        raise nothing_decoded(damaged)
    return torch.cat(features), torch.cat(labels), torch.cat(indices), tuple(damaged)
