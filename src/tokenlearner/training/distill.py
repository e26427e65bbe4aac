"""Learning from another model besides the labels: from its probabilities, and from the features its head reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.training.losses import loss_of
from tokenlearner.training.module import Classifier
from tokenlearner.training.recipe import DistillRecipe, Recipe


class Seen(NamedTuple):
    """What a model makes of a batch: ``features`` is what its head reads, None where it has none."""

    logits: Float[Tensor, "b classes"]
    features: Float[Tensor, "b d"] | None


class Taught(Classifier):
    """A :class:`Classifier` with a ``teacher``, which sees the same mixed images.

    The teacher stays in eval mode and is none of this module's children: no optimizer, average or checkpoint has it. It
    is on this module's device while that is trained, and on the CPU again after it.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, num_classes: int, *, teacher: nn.Module, **options: Any
    ) -> None:
        super().__init__(model, recipe, num_classes, **options)
        self._teacher = (teacher.eval().requires_grad_(False),)  # in a tuple, or it would become a child

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def on_fit_start(self) -> None:
        self.teacher.to(self.device)

    def on_fit_end(self) -> None:
        self.teacher.cpu()


class Distilled(Taught):
    """Trained on the labels, and towards what the teacher makes of the images."""

    def __init__(self, model: nn.Module, recipe: Recipe, num_classes: int, **options: Any) -> None:
        super().__init__(model, recipe, num_classes, **options)
        if recipe.distill.features:
            classifier_of(model)  # refuses now what has none

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        wanted = self.recipe.distill
        with torch.no_grad():
            taught = seen_by(self.teacher, images, wanted)
        seen = seen_by(self.model, images, wanted)
        labels = loss_of(seen.logits, targets, self.recipe.loss)
        return wanted.labels * labels + distance(seen, taught, wanted, self.recipe.loss)


def seen_by(model: nn.Module, images: Tensor, wanted: DistillRecipe) -> Seen:
    """What ``model`` makes of ``images``, with its features where ``wanted`` compares them."""
    with watched(classifier_of(model) if wanted.features else None) as kept:
        return Seen(model(images), kept[0] if kept else None)


def distance(seen: Seen, taught: Seen, wanted: DistillRecipe, kind: str) -> Float[Tensor, ""]:
    """How far a model is from its teacher: KL of the softened probabilities and 1 − cosine of the features, weighted.

    Under the sigmoid loss each class is a distribution of its own, and the classes are added up.
    """
    T = wanted.temperature
    total = seen.logits.new_zeros((), dtype=torch.float32)
    if wanted.logits:
        student, teacher = seen.logits.float() / T, taught.logits.float() / T
        if kind == "sigmoid":
            soft = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="sum") / len(student)
        else:
            soft = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)
        total = total + wanted.logits * T**2 * soft
    if wanted.features and seen.features is not None and taught.features is not None:
        if seen.features.shape != taught.features.shape:
            raise InputError(
                f"distill.features compares features, and the model's have {seen.features.shape[-1]} numbers where the "
                f"teacher's have {taught.features.shape[-1]}: set it to 0"
            )
        cosine = F.cosine_similarity(seen.features.float(), taught.features.float(), dim=-1)
        total = total + wanted.features * (1 - cosine).mean()
    return total


def classifier_of(model: nn.Module) -> nn.Module:
    """The head of ``model``, whose input are its features.

    Raises:
        InputError: It has none.
    """
    getter: Any = getattr(model, "get_classifier", None)
    head = getter() if getter is not None else getattr(model, "head", None)
    if not isinstance(head, nn.Module) or isinstance(head, nn.Identity):
        raise InputError(f"{type(model).__name__} has no classifier to take features from: set distill.features to 0")
    return head


@contextmanager
def watched(head: nn.Module | None) -> Iterator[list[Tensor]]:
    """What ``head`` is given, in a list, as soon as it has run."""
    kept: list[Tensor] = []
    if head is None:
        yield kept
        return
    handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        yield kept
    finally:
        handle.remove()
