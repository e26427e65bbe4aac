"""Resolution and patch size: what 8 tokens at half depth cost and save as the grid grows.

The paper's gain grows with the grid: at 224² (14×14) a ViT-B/16 is 1.9 times as cheap, at 384² (24×24) 1.95, and L/8 at
512² (64×64) runs only so. Flower photos are stored at 128², CIFAR-10's at 32², so flowers show it.
"""

from __future__ import annotations

from dataclasses import replace

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import against
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

GRIDS = {"4x4": (32, 8), "8x8": (64, 8), "12x12": (96, 8), "16x16": (128, 8)}  # side and patch
FLOWERS = {
    "cpu": replace(CIFAR10["cpu"], data="flowers", epochs=12, warmup_epochs=1.0, ema=0.99),
    "gpu": replace(CIFAR10["gpu"], data="flowers", epochs=300, batch_size=128),
}
VARIANTS = {
    f"{name} {grid}": ViT(f"{name}, {grid.replace('x', '×')} patches", tokens=tokens, side=side, patch=patch)
    for grid, (side, patch) in GRIDS.items()
    for name, tokens in (("plain", 0), ("8 tokens", 8))
}

STUDY = Study(
    title="The grid grows: flowers at 32² to 128², patches of 8²",
    question="Does the difference to the plain ViT change with the number of patches?",
    run=from_scratch,
    variants=lambda _: VARIANTS,
    sizes=FLOWERS,
    draw=lambda axis, summary: against(
        axis,
        summary,
        {name: [(int(g.split("x")[0]) ** 2, f"{name} {g}") for g in GRIDS] for name in ("plain", "8 tokens")},
        xlabel="patches",
    ),
    claims=(
        Claim(
            2,
            "At 16×16 patches 8 tokens at ½ are about as accurate",
            "8 tokens 16x16",
            "plain 16x16",
            "83.65 and 84.73 % (24×24 patches, table 1)",
            "about",
            2.0,
        ),
    ),
)
