"""Accuracy against cost: the models of ``placement``, ``tokens``, ``depth`` and ``pooling``, by MACs and by the clock;
and three of a smaller size.

The accuracies are those of these studies' runs, which are not done again. The speeds are measured here, once for every
seed: forward passes of all models in turn in one process, in float32, on the GPU if there is one. ``speedup`` is
against the plain model in the same rounds, which a machine that is busy with something else changes least; ``spread``
is half the interquartile range of the images per second over the rounds, and ``load`` how many processes wanted to run
in the minute before. Where a run was trained and where it was timed can be two machines: a row says both.

Paper (figure of few-shot accuracy, 224²): B/16 17.5, with 8 tokens at ½ 9.5 GMACs,
S/32 1.15, with tokens 0.7, deeper 1.15 GMACs. It prints no speeds.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenlearner.inspection.speed import measure_speed, usable_device
from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import scatter
from tokenlearner.study.pictures import CIFAR10, Pictures, ViT, build, from_scratch
from tokenlearner.study.study import Job, Study, built_upon, key_of, open_study

import torch

STUDIES = ("placement", "tokens", "depth", "pooling")
SIZES = {  # patches twice as wide, as S/32 beside B/16: plain, with tokens, and as deep as the saved compute allows
    "wide plain": ViT("plain ViT, patches twice as wide", patch=8),
    "wide 8 at 1/2": ViT("8 tokens at ½, patches twice as wide", tokens=8, patch=8),
    "wide deep": ViT("7 layers, 8 tokens after 3, patches twice as wide", tokens=8, at=3, depth=7, patch=8),
}
BATCH, CLASSES = 64, 10


@dataclass(frozen=True)
class Together:
    """Models that are timed in turn."""

    models: tuple[ViT, ...]


@functools.cache
def variants(settings: Pictures) -> dict[str, ViT]:
    """Those of all the studies, each model once, the plain one first."""
    found: dict[str, ViT] = {}
    seen: set[str] = set()
    for study in STUDIES:
        for name, variant in open_study(study, Path(__file__).parent).variants(settings).items():
            if (key := _key(variant, settings)) not in seen:
                seen.add(key)
                found[f"{study} {name}"] = variant
    return found | SIZES


def _key(variant: ViT, settings: Pictures) -> str:
    return key_of(from_scratch, variant, settings, 0)


def timed(job: Job) -> dict[str, Any]:
    """The speeds of all models of ``job``, whose weights don't matter for it."""
    settings, load = job.settings, os.getloadavg()[0]
    device = usable_device("auto")
    models = {_key(variant, settings): build(variant, settings, CLASSES).to(device) for variant in job.variant.models}
    speeds = measure_speed(models, torch.randn(BATCH, 3, settings.side, settings.side, device=device))
    return {"load": round(load, 2), "speeds": {speed.name: asdict(speed) for speed in speeds}}


def beside_accuracy(job: Job) -> dict[str, Any]:
    """The accuracy of the run that other studies have too, and the speed of its model among all the others."""
    _, run = built_upon(job, from_scratch, job.variant, job.settings)
    models = Together(tuple(variants(job.settings).values()))
    _, measured = built_upon(job, timed, models, job.settings)
    speed = measured["speeds"][_key(job.variant, job.settings)]
    return {
        **{name: run[name] for name in ("accuracy", "parameters", "macs", "tokens_per_layer")},
        "images_per_second": round(speed["images_per_second"], 1),
        "spread": round(speed["spread"], 1),
        "speedup": round(speed["ratio"], 4),
        "batch": speed["batch_size"],
        "load": measured["load"],
        "timed_on": measured["hardware"],
        "trained_on": run["hardware"],
    }


STUDY = Study(
    title="Accuracy against cost",
    question="Are the MACs that tokens save seconds saved, and at what accuracy?",
    run=beside_accuracy,
    variants=variants,
    sizes=CIFAR10,
    draw=(
        functools.partial(scatter, x="macs", scale=1e-6, xlabel="multiply-adds an image, million (the paper's GFLOPs)"),
        functools.partial(scatter, x="images_per_second", xlabel="images a second, measured", key=True),
    ),
    claims=(
        Claim(
            1,
            "Tokens at ¾ depth run faster than the plain ViT",
            "placement 8 at 3/4",
            "placement plain",
            "13.4 and 17.5 GMACs; no speeds",
            score="speedup",
        ),
        Claim(
            2,
            "Tokens at ½ depth run faster than the plain ViT",
            "placement 8 at 1/2",
            "placement plain",
            "9.2 and 17.5 GMACs; no speeds",
            score="speedup",
            decides=False,
        ),
        Claim(
            4,
            "16 learned tokens run about as fast as a 4×4 pool",
            "placement 16 at 1/2",
            "pooling 4x4",
            "184.6 and 184.4 GMACs; no speeds",
            "about",
            0.1,
            "speedup",
            decides=False,
        ),
        Claim(
            6,
            "Deeper with 8 tokens is at least as fast as the plain ViT",
            "depth deep",
            "placement plain",
            "47.1 and 55.6 GMACs; no speeds",
            "at least",
            0.05,
            "speedup",
            decides=False,
        ),
    ),
    seeds="one timing of all models, in turns",
)
