"""What is minimised: cross-entropy or one sigmoid per class, on hard, smoothed, mixed or multi-label targets."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor, nn

HEAD_BIAS = -10.0  # of a new head under the sigmoid loss, as the official configurations set it


class Targets(nn.Module):
    """Labels of a training batch → target distributions, the images mixed along with them where asked for.

    Args:
        multilabel: Labels are (b, classes) of 0.0 and 1.0; smoothing then moves both towards one half.
        mixup: α of mixup, 0 for none.
        cutmix: α of cutmix, 0 for none.
        label_smoothing: Share of the target spread evenly over the classes.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        multilabel: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"multi_label": True} if multilabel else {}
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        mixing = mixup or cutmix
        self.mixing = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes, **self.options)
            if mixing
            else None
        )

    def forward(
        self, images: Float[Tensor, "b ..."], labels: Int[Tensor, " b"] | Float[Tensor, "b classes"]
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b classes"]]:
        """The images, mixed, and their targets."""
        pairs = len(images) // 2 * 2 if self.mixing else 0  # timm mixes pairs; a damaged file can leave one over
        targets = mixup_target(labels[pairs:], self.num_classes, smoothing=self.label_smoothing, **self.options)
        if self.mixing and pairs:
            # Of clips (b, c, t, h, w), all frames are mixed and cut alike: timm cuts along the last two of four axes.
            flat = images[:pairs].clone().flatten(1, -3)
            mixed, mixed_targets = self.mixing(flat, labels[:pairs])
            mixed = mixed.view_as(images[:pairs])
            images, targets = torch.cat([mixed, images[pairs:]]), torch.cat([mixed_targets, targets])
        return images, targets


def loss_of(
    logits: Float[Tensor, "b classes"], targets: Float[Tensor, "b classes"], kind: Literal["cross_entropy", "sigmoid"]
) -> Float[Tensor, ""]:
    """Mean over the images. ``sigmoid`` adds the classes up, as the official multi-label loss does."""
    if kind == "cross_entropy":
        return F.cross_entropy(logits, targets.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum") / len(logits)
