"""Where to insert: 8 and 16 tokens before the first layer, after ¼, ½ and ¾ of them, and not at all.

Paper: the figure of locations (B/16, ImageNet 5-shot after JFT): 8 tokens 21.0, 59.0, 63.8, 68.0 %, 16 tokens 32.0,
61.5, 63.5, 68.0 %, none 63.0 %.
"""

from __future__ import annotations

from typing import Any

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import groups, mean_and_deviation
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

from matplotlib.axes import Axes

SHARES = {"0": 0.0, "1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
VARIANTS = {"plain": ViT("plain ViT")} | {
    f"{tokens} at {name}": ViT(f"{tokens} tokens at {name}", tokens=tokens, at=share)
    for tokens in (8, 16)
    for name, share in SHARES.items()
}

PLACES = ("0", "¼", "½", "¾", "none")
PAPER = {"8 tokens": (21.0, 59.0, 63.8, 68.0, 63.0), "16 tokens": (32.0, 61.5, 63.5, 68.0, 63.0)}


def ours(axis: Axes, summary: dict[str, Any]) -> None:
    series = {
        f"{n} tokens": [mean_and_deviation(summary, v) for v in (*(f"{n} at {name}" for name in SHARES), "plain")]
        for n in (8, 16)
    }
    groups(axis, PLACES, series, xlabel="share of the depth before the insertion")


def papers(axis: Axes, _: dict[str, Any]) -> None:
    series = {name: [(value, 0.0) for value in values] for name, values in PAPER.items()}
    groups(
        axis,
        PLACES,
        series,
        xlabel="share of the depth before the insertion",
        ylabel="ImageNet 5-shot, %",
        title="the paper: B/16 after JFT",
    )


STUDY = Study(
    title="Where to insert",
    question="How do accuracy and cost change with the layer that learned tokens start at?",
    run=from_scratch,
    variants=lambda _: VARIANTS,
    sizes=CIFAR10,
    draw=(ours, papers),
    claims=(
        Claim(
            1,
            "At ¾ depth TokenLearner is at least as accurate as the plain ViT",
            "8 at 3/4",
            "plain",
            "68.0 and 63.0 % (5-shot)",
            "at least",
        ),
        Claim(2, "At ½ depth it is about as accurate", "8 at 1/2", "plain", "63.8 and 63.0 % (5-shot)", "about", 2.0),
        Claim(
            2,
            "At ½ depth it takes about half the multiply-adds",
            "8 at 1/2",
            "plain",
            "9.2 and 17.5 GMACs, 0.53×",
            "at most",
            0.6,
            "macs",
        ),
        Claim(3, "At depth 0 it is clearly worse", "plain", "8 at 0", "63.0 and 21.0 % (5-shot)"),
    ),
)
