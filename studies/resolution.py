"""Resolution and patch size: what 8 tokens at half depth cost and save as the grid grows.

Flower photos, which are stored at 128² where CIFAR-10's are 32²: patches of 8² on pictures of 32² to 128², and patches
of 16², 8² and 4² on pictures of 64². So grids of 4×4 and 16×16 come about both ways.

The paper's gain grows with the grid: a ViT-B/16 is 1.9 times as cheap at 224² (14×14) and 1.95 at 384² (24×24), where
it loses 1.1 points; L/8 at 512² (64×64) runs only so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import against
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

from matplotlib.axes import Axes

GRIDS = {  # side and patch
    "4x4": (32, 8),
    "8x8": (64, 8),
    "12x12": (96, 8),
    "16x16": (128, 8),
    "64/16": (64, 16),
    "64/4": (64, 4),
}
BY_SIDE, BY_PATCH = ("4x4", "8x8", "12x12", "16x16"), ("64/16", "8x8", "64/4")
FLOWERS = {
    "cpu": replace(CIFAR10["cpu"], data="flowers", epochs=12, warmup_epochs=1.0, ema=0.99),
    "gpu": replace(CIFAR10["gpu"], data="flowers", epochs=300, batch_size=128),
}
NAMES = (("plain", 0), ("8 tokens", 8))


def label(name: str, grid: str) -> str:
    side, patch = GRIDS[grid]
    text = f"{name}, {side // patch}×{side // patch} patches"
    return text if grid in BY_SIDE else f"{text} of {patch}² at {side}²"


VARIANTS = {
    f"{name} {grid}": ViT(label(name, grid), tokens=tokens, side=side, patch=patch)
    for grid, (side, patch) in GRIDS.items()
    for name, tokens in NAMES
}
PATCHES = {grid: (side // patch) ** 2 for grid, (side, patch) in GRIDS.items()}


def accuracies(axis: Axes, summary: dict[str, Any]) -> None:
    series = {
        f"{name}, {how}": [(PATCHES[grid], f"{name} {grid}") for grid in grids]
        for name, _ in NAMES
        for how, grids in (("larger pictures", BY_SIDE), ("smaller patches", BY_PATCH))
    }
    against(axis, summary, series, xlabel="patches")


def shares(axis: Axes, summary: dict[str, Any]) -> None:
    """What is left of the plain model's multiply-adds."""
    found = summary["variants"]
    there = [grid for grid in BY_SIDE if {f"plain {grid}", f"8 tokens {grid}"} <= set(found)]
    macs = [found[f"8 tokens {grid}"]["macs"] / found[f"plain {grid}"]["macs"] for grid in there]
    axis.plot([PATCHES[grid] for grid in there], macs, marker="o")
    axis.set_ylim(0, 1)
    axis.set_xlabel("patches")
    axis.set_ylabel("multiply-adds with 8 tokens, of the plain model's")


def about_as_accurate(grid: str) -> Claim:
    return Claim(
        2,
        f"At {grid.replace('x', '×')} patches 8 tokens at ½ are about as accurate",
        f"8 tokens {grid}",
        f"plain {grid}",
        "83.65 and 84.73 % (24×24 patches, table 1)" if grid == "16x16" else "not printed for so few patches",
        "about",
        2.0,
        decides=grid == "16x16",
    )


STUDY = Study(
    title="The grid grows: flowers at 32² to 128², patches of 4² to 16²",
    question="Does the difference to the plain ViT change with the number of patches?",
    run=from_scratch,
    variants=lambda _: VARIANTS,
    sizes=FLOWERS,
    draw=(accuracies, shares),
    claims=(
        *map(about_as_accurate, reversed(BY_SIDE)),
        Claim(
            2,
            "At 16×16 patches it takes about half the multiply-adds",
            "8 tokens 16x16",
            "plain 16x16",
            "28.3 and 55.6 GMACs, 0.51× (24×24 patches)",
            "at most",
            0.6,
            "macs",
        ),
        Claim(
            2,
            "At 16×16 patches, of 4² on pictures of 64², 8 tokens at ½ are about as accurate",
            "8 tokens 64/4",
            "plain 64/4",
            "not printed",
            "about",
            2.0,
            decides=False,
        ),
    ),
)
