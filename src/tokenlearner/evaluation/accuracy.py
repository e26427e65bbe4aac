"""Top-1, top-5 and mean class accuracy of a saved model on labelled images or clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from tokenlearner.data.class_names import read_as
from tokenlearner.data.clips import ClipFiles, LabelledClips
from tokenlearner.data.images import (
    Damaged,
    ImageFiles,
    LabelledImages,
    OnError,
    Sample,
    collate,
    damaged_entries,
)
from tokenlearner.data.sources import find_parts, name_of
from tokenlearner.errors import InputError
from tokenlearner.evaluation.clips import (
    VIEWS,
    Images,
    Views,
    clip_files,
    logits_of,
    takes_clips,
    what_training_held_out,
)
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.speed import usable_device


@dataclass(frozen=True)
class Accuracy:
    """``top1``, ``top5`` and ``per_class`` are shares (0 to 1) of ``images`` decoded images or clips."""

    top1: float
    top5: float | None
    per_class: dict[str, float]
    images: int
    which: str
    """What was scored, in words."""
    damaged: tuple[Damaged, ...]
    views: Views | None = None
    """Of clips: the windows of each, and the crops of each window."""
    by_chance: float | None = None
    """What the same predictions would score on average, had they been dealt out to the images at random."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_per_class": sum(self.per_class.values()) / len(self.per_class),
            "per_class": self.per_class,
            **counted(self.images, self.views),
            "which": self.which,
            "damaged": damaged_entries(self.damaged),
        }


def counted(number: int, views: Views | None) -> dict[str, Any]:
    """How a JSON document says what was scored."""
    return {"images": number} if views is None else {"clips": number, "views": list(views)}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: LabelledImages | LabelledClips,
    *,
    which: str = "all images",
    batch_size: int = 64,
    workers: int = 2,
    on_error: OnError = "skip",
    device: str | torch.device = "cpu",
    views: Views = VIEWS,
) -> Accuracy:
    """Scores ``model`` (with the preprocessing it carries) on ``images``; damaged files are left out and named.

    Clips are scored by the mean of the model's outputs over ``views``: windows evenly spread over the clip, and crops
    of each along the longer side. The model is moved to ``device``, which :func:`usable_device` explains, and stays
    there. ``batch_size`` is how many images or views it is given at once.

    Raises:
        InputError: The model carries no preprocessing, or is not for clips where ``images`` are, or the other way
            round; the images are multi-label, none could be decoded, or there is no such device.
    """
    class_labels(images)
    loader, device = batches_of(model, images, batch_size, workers, on_error, views), usable_device(device)
    classes = len(images.classes)
    top1 = MulticlassAccuracy(classes, average="micro").to(device)
    top5 = MulticlassAccuracy(classes, average="micro", top_k=5).to(device) if classes > 5 else None
    per_class = MulticlassAccuracy(classes, average="none").to(device)
    damaged: list[Damaged] = []
    seen, said = torch.zeros(2, classes, dtype=torch.long)
    model.to(device).eval()
    for batch in loader:
        damaged += batch.damaged
        if not len(batch.labels):
            continue
        logits, labels = logits_of(model, batch.images.to(device), batch_size).float(), batch.labels.to(device)
        for metric in (top1, top5, per_class):
            if metric is not None:
                metric.update(logits, labels)
        seen += torch.bincount(batch.labels, minlength=classes)
        said += torch.bincount(logits.argmax(dim=-1).cpu(), minlength=classes)
    if not seen.sum():
        raise nothing_decoded(damaged)
    shares = per_class.compute()
    return Accuracy(
        top1=float(top1.compute()),
        top5=float(top5.compute()) if top5 else None,
        per_class={name: float(shares[i]) for i, name in enumerate(images.classes) if seen[i]},
        images=int(seen.sum()),
        which=which,
        damaged=tuple(damaged),
        views=views if isinstance(images, LabelledClips) else None,
        by_chance=float((seen / seen.sum()) @ (said / said.sum())),
    )


def images_to_score(model: nn.Module, folder: Path, data: Path, images: Images = "auto") -> tuple[LabelledImages, str]:
    """The images of ``data`` a model saved in ``folder`` should be scored on, and which those are in words.

    An evaluation part of ``data`` (a ``val`` folder, say) comes first; then, under "auto" and "held-out", the images
    the model's own training run held out, if that run was on this data; else all. Classes may have other names than
    the model's labels, as :func:`read_as` understands them.

    Raises:
        InputError: Classes that don't match the model's labels, or "held-out" without a note of what was.
    """
    names = getattr(model, "label_names", None)
    if names is None:
        raise InputError(f"{folder} names no labels, so classes can't be matched with its outputs")
    part, val_part = find_parts(data)
    scanned = read_as(names, (val_part or part).read, lambda it: it.classes)
    if val_part is not None:
        return scanned, f"the images in {val_part.name}"
    names_of_files = [name_of(file, data) for file in scanned.files]
    return what_training_held_out(scanned, names_of_files, folder, data, images, "images")


def batches_of(
    model: nn.Module,
    images: LabelledImages | LabelledClips,
    batch_size: int,
    workers: int,
    on_error: OnError,
    views: Views = VIEWS,
) -> DataLoader[Sample | Damaged]:
    """``images`` in order, prepared as the model says, in the batches that ``collate`` makes.

    Of clips, ``batch_size`` counts the views.

    Raises:
        InputError: The model carries no preprocessing, is for images where these are clips or the other way round, or
            a size makes no sense.
    """
    if batch_size < 1 or workers < 0:
        raise InputError(f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}")
    check_inputs(model, isinstance(images, LabelledClips))
    if isinstance(images, LabelledClips):
        dataset: ClipFiles | ImageFiles = clip_files(model, images, views, on_error)
        batch_size = max(1, batch_size // math.prod(views))
    else:
        dataset = ImageFiles(images, needed_preprocessing(model).transform(), on_error)
    return DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)


def check_inputs(model: nn.Module, clips: bool) -> None:
    """``InputError`` where a model of images is given clips, or a model of clips images."""
    if takes_clips(model) and not clips:
        raise InputError(f"{type(model).__name__} takes clips, and these are images: give videos")
    if clips and not takes_clips(model):
        raise InputError(
            f"{type(model).__name__} takes images, and these are videos: give pictures, or a model of clips"
        )


def class_labels(images: LabelledImages | LabelledClips) -> Sequence[int]:
    """The one class of each image; ``InputError`` if they are multi-label."""
    if images.multilabel:
        raise InputError("an image may have several classes here, so there is no top-1: score with --protocol map")
    return cast("Sequence[int]", images.labels)


def nothing_decoded(damaged: Sequence[Damaged]) -> InputError:
    first = f"; the first: {damaged[0].path}: {damaged[0].reason}" if damaged else ""
    return InputError(f"none of the {len(damaged)} images could be decoded{first}")


def needed_preprocessing(model: nn.Module) -> Preprocessing:
    preprocessing = Preprocessing.of(model)
    if preprocessing is None:
        raise InputError(
            "the model does not say how its images are prepared; save it again with "
            "save(model, folder, preprocessing=Preprocessing(...))"
        )
    return preprocessing
