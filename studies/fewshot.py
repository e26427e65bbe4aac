"""Few-shot: frozen features of the models trained for ``placement``, and a linear classifier on five pictures a class.

The sets are those of the data folder, and scikit-learn's digits. CIFAR-10, which the models were trained on, is scored
too and left out of the average. Hand gestures are frames of a few videos, so that test pictures have near-duplicates
among the shots: a high score there means little.

Paper (224², after JFT): ViT-B/16 81.8 %, with 8 tokens at ½ 81.2 % on average over nine sets, at 17.5 and 9.5 GMACs;
on ImageNet 63.0 and 63.8, at ¾ 68.0 %.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlearner.data.images import LabelledImages, scan_class_folders
from tokenlearner.evaluation.fewshot import few_shot
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars, scatter
from tokenlearner.study.pictures import (
    CIFAR10,
    Pictures,
    ViT,
    from_scratch,
    input_size,
    moments_of,
    parts_of,
    reopened,
)
from tokenlearner.study.settings import size_of
from tokenlearner.study.study import Job, Study, built_upon

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = "digits"


@dataclass(frozen=True)
class FewShotLinear:
    """Settings: how the models are trained, and the protocol."""

    training: Pictures
    shots: int = 5
    draws: int = 10
    """Of the shots; the accuracy is the mean over them."""
    l2: float = 1.0


def linear(job: Job) -> dict[str, Any]:
    """The accuracy on every set there is, and the average of those not trained on; the seed draws the shots too."""
    settings, training = job.settings, job.settings.training
    base, _ = built_upon(job, from_scratch, job.variant, training)
    model: Any = reopened(base)
    mean, std = (tuple(values.flatten().tolist()) for values in moments_of(job.data, training))
    model.preprocessing = Preprocessing((3, training.side, training.side), mean, std, crop_pct=1.0)
    protocol = {"shots": settings.shots, "draws": settings.draws, "l2": settings.l2, "seed": job.seed}
    scores = {}
    for name, (train, test) in sets_of(job).items():
        found = few_shot(model, train, test, **protocol, batch_size=256, workers=0, on_error="raise")
        scores[name] = round(found.mean, 4)
    others = [name for name in scores if name != training.data]
    average = round(statistics.mean(scores[name] for name in others), 4)
    return {"average": average, "average_of": " ".join(others), **scores, **size_of(model, input_size(base), training)}


def sets_of(job: Job) -> dict[str, tuple[LabelledImages, LabelledImages]]:
    """Of every set: the pictures that shots are drawn from, and those that are scored."""
    folders = {folder.name: parts_of(folder) for folder in sorted(job.data.iterdir())}
    found = {
        name: (scan_class_folders(parts[0]), scan_class_folders(parts[1])) for name, parts in folders.items() if parts
    }
    return {**found, DIGITS: digits_in(job.folder.parent / DIGITS)}


def digits_in(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """Scikit-learn's digits as pictures of 8×8, written where they are not there; a quarter is scored."""
    if not folder.is_dir():
        data, unfinished = load_digits(), Path(tempfile.mkdtemp(prefix=DIGITS, dir=folder.parent))
        for i, (image, label) in enumerate(zip(data.images, data.target)):
            path = unfinished / str(label) / f"{i:04}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.uint8(image * (255 / 16))).save(path)
        unfinished.rename(folder)
    return scan_class_folders(folder).split(0.25, seed=0)


VARIANTS = {"plain": ViT("plain ViT")} | {
    f"{tokens} at {name}": ViT(f"{tokens} tokens at {name}", tokens=tokens, at=share)
    for tokens in (8, 16)
    for name, share in (("1/2", 0.5), ("3/4", 0.75))
}

STUDY = Study(
    title="5-shot linear, average of the sets not trained on",
    question="Are frozen features of models with learned tokens as good as the plain one's?",
    run=linear,
    variants=lambda _: VARIANTS,
    sizes={size: FewShotLinear(training) for size, training in CIFAR10.items()},
    draw=(
        functools.partial(bars, ylabel="5-shot accuracy, %"),
        functools.partial(scatter, x="macs", scale=1e-6, xlabel="multiply-adds an image, million", key=True),
    ),
    score="average",
    claims=(
        Claim(
            1,
            "5-shot, tokens at ¾ depth are at least as good as the plain ViT",
            "8 at 3/4",
            "plain",
            "68.0 and 63.0 % (ImageNet)",
            "at least",
        ),
        Claim(
            2,
            "5-shot, tokens at ½ depth are about as good",
            "8 at 1/2",
            "plain",
            "81.2 and 81.8 % (average of nine sets)",
            "about",
            2.0,
        ),
    ),
    same=("average_of",),
)
