"""Mean average precision of a saved model where an image may have any number of classes.

The average precision of a class is Σₖ (Rₖ − Rₖ₋₁) Pₖ over its distinct scores from the highest down, with precision Pₖ
and recall Rₖ of the images that score at least the k-th; images with equal scores enter together. Only the order of the
scores counts, so the logits do as well as their sigmoids, and better: in float32 the sigmoids of 17 and 30 are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat

from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.images import Damaged, LabelledImages, OnError, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import batches_of, counted, nothing_decoded
from tokenlearner.evaluation.clips import VIEWS, Views, logits_of
from tokenlearner.inspection.speed import usable_device


@dataclass(frozen=True)
class MultilabelScore:
    """``average_precision`` (0 to 1) of every class that some of the ``images`` decoded images have; the mean is over
    those classes.
    """

    average_precision: dict[str, float]
    images: int
    which: str
    """What was scored, in words."""
    damaged: tuple[Damaged, ...]
    views: Views | None = None
    """Of clips: the windows of each, and the crops of each window."""
    by_chance: tuple[float, ...] = ()
    """The mean average precision of the same scores dealt out to the images at random, once for each shuffle."""

    @property
    def mean_average_precision(self) -> float:
        return sum(self.average_precision.values()) / len(self.average_precision)

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean_average_precision": self.mean_average_precision,
            "average_precision": self.average_precision,
            **counted(self.images, self.views),
            "which": self.which,
            "damaged": damaged_entries(self.damaged),
        }


@torch.inference_mode()
def evaluate_multilabel(
    model: nn.Module,
    images: LabelledImages | LabelledClips,
    *,
    which: str = "all images",
    batch_size: int = 64,
    workers: int = 2,
    on_error: OnError = "skip",
    device: str | torch.device = "cpu",
    views: Views = VIEWS,
    shuffles: int = 0,
) -> MultilabelScore:
    """Scores ``model``, whose output j is ``images.classes[j]``; damaged files are left out and named.

    All scores are kept until the end, on the CPU: 5 bytes for each image and class (a float and a bool), 0.4 GB for
    10,000 images of 8,000 classes. The model is moved to ``device``. Clips are scored in ``views``, as
    :func:`tokenlearner.evaluation.accuracy.evaluate` has them; Charades' rules (mean over the classes, videos without
    an action not scored) are met where the list was read by ``read_clips_to_score``. ``shuffles`` of the scores tell
    what chance gives.

    Raises:
        InputError: The images have one class each, no class has an image, the model has another number of outputs, one
            that is not a number, or no preprocessing, no image could be decoded, or there is no such device.
    """
    if not images.multilabel:
        raise InputError("every image has exactly one class here: score with --protocol top1")
    loader, device = batches_of(model, images, batch_size, workers, on_error, views), usable_device(device)
    classes = len(images.classes)
    scores = torch.empty(classes, len(images))
    targets = torch.zeros(classes, len(images), dtype=torch.bool)
    seen = torch.zeros(len(images), dtype=torch.bool)
    damaged: list[Damaged] = []
    model.to(device).eval()
    for batch in loader:
        damaged += batch.damaged
        if not len(batch.labels):
            continue
        logits = logits_of(model, batch.images.to(device), batch_size).float().cpu()
        if logits.shape[-1] != classes:
            raise InputError(f"the model has {logits.shape[-1]} outputs and the images {classes} classes")
        if bad := batch.indices[logits.isnan().any(dim=-1)].tolist():
            raise InputError(f"the model's output for {images.files[bad[0]]} is not a number")
        scores[:, batch.indices] = logits.T
        targets[:, batch.indices] = batch.labels.T.bool()
        seen[batch.indices] = True
    if not seen.any():
        raise nothing_decoded(damaged)
    shares = average_precisions(scores[:, seen], targets[:, seen])
    if not shares:
        raise InputError(f"none of the {int(seen.sum())} images has a class, so there is nothing to find")
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(int(seen.sum()), generator=generator) for _ in range(shuffles)]
    dealt = [average_precisions(scores[:, seen][:, order], targets[:, seen]) for order in orders]
    by_name = {images.classes[j]: share for j, share in shares.items()}
    clip_views = views if isinstance(images, LabelledClips) else None
    by_chance = tuple(sum(found.values()) / len(found) for found in dealt)
    return MultilabelScore(by_name, int(seen.sum()), which, tuple(damaged), clip_views, by_chance)


class MeanAveragePrecision(Metric):
    """The same of batches as they come, over all processes of a distributed run; NaN if no image has a class.

    ``update`` takes logits (b, classes) and targets (b, classes) of 0 and 1.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, scores: Float[Tensor, "b classes"], targets: Float[Tensor, "b classes"]) -> None:
        self.scores.append(scores.float())  # type: ignore[operator, union-attr]
        self.targets.append(targets.bool())  # type: ignore[operator, union-attr]

    def compute(self) -> Tensor:
        scores, targets = (dim_zero_cat(state).cpu().T for state in (self.scores, self.targets))  # type: ignore[arg-type]
        return torch.tensor(list(average_precisions(scores, targets).values())).mean()


def average_precisions(scores: Float[Tensor, "classes n"], targets: Bool[Tensor, "classes n"]) -> dict[int, float]:
    """By class, of those that some of the n images have."""
    return {j: average_precision(scores[j], targets[j]) for j in range(len(scores)) if targets[j].any()}


def average_precision(scores: Float[Tensor, " n"], targets: Bool[Tensor, " n"]) -> float:
    """Of one class, at least one of whose ``targets`` is true."""
    # torchmetrics takes the sigmoid of whatever leaves [0, 1], and two infinities for different scores; ranks are safe.
    ranks = scores.unique(return_inverse=True)[1].double() / len(scores)
    return float(binary_average_precision(ranks, targets.long(), validate_args=False))
