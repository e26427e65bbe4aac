"""Learned tokens against mean pooling of the grid to as many, as in table 5; and the grid shrunk step by step.

Paper (L/16, 512²): 16-TL at 12 87.68, 4×4 at 12 83.93, 8×8 at 12 and 2×2 at 18 86.41, 8×8 at 9 and 2×2 at 18 85.63 %.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.pictures import CIFAR10, Pictures, ViT, from_scratch
from tokenlearner.study.study import Study


def variants(settings: Pictures) -> dict[str, ViT]:
    """Grids of 4×4 and 2×2 are as many tokens as the paper's; its layers 9, 12 and 18 of 24 are shares of the depth."""
    early, half, late = (settings.depth * share // 24 for share in (9, 12, 18))
    return {
        "16 tokens": ViT(f"16 learned tokens after {half} layers", tokens=16),
        "4x4": ViT(f"4×4 pool after {half}", pooling=((half, 4),)),
        "4 tokens": ViT(f"4 learned tokens after {half}", tokens=4),
        "2x2": ViT(f"2×2 pool after {half}", pooling=((half, 2),)),
        "4x4 2x2": ViT(f"4×4 pool after {half}, 2×2 after {late}", pooling=((half, 4), (late, 2))),
        "4x4 2x2 early": ViT(f"4×4 pool after {early}, 2×2 after {late}", pooling=((early, 4), (late, 2))),
    }


STUDY = Study(
    title="Learned tokens and mean pooling",
    question="Is it the learning, or would any smaller grid do?",
    run=from_scratch,
    variants=variants,
    sizes=CIFAR10,
    draw=bars,
    claims=(
        Claim(4, "16 learned tokens beat a 4×4 pool at the same layer", "16 tokens", "4x4", "87.68 and 83.93 %"),
        Claim(
            4,
            "16 learned tokens beat pooling in two steps, which is cheaper here (in the paper a little dearer)",
            "16 tokens",
            "4x4 2x2",
            "87.68 and 86.41 % at 184.6 and 187.2 GMACs",
            decides=False,
        ),
        Claim(
            4,
            "16 learned tokens beat pooling in two steps from early on, which is cheaper",
            "16 tokens",
            "4x4 2x2 early",
            "87.68 and 85.63 %",
            decides=False,
        ),
        Claim(4, "4 learned tokens beat a 2×2 pool at the same layer", "4 tokens", "2x2", "not printed"),
    ),
)
