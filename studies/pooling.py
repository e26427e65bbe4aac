"""Learned tokens against mean pooling of the grid to as many, as in table 5; and the grid shrunk step by step.

Paper (L/16, 512²): 16-TL at 12 87.68, 4×4 at 12 83.93, 8×8 at 12 and 2×2 at 18 86.41, 8×8 at 9 and 2×2 at 18 85.63 %.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.pictures import CIFAR10, Pictures, ViT, from_scratch
from tokenlearner.study.study import Study


def variants(settings: Pictures) -> dict[str, ViT]:
    """A grid of 8×8 has the paper's 32×32 ÷ 4: its 8×8, 4×4 and 2×2 are 4×4 and 2×2 here."""
    half, three_quarters, three_eighths = (settings.depth * n // 8 for n in (4, 6, 3))
    return {
        "16 tokens": ViT("16 learned tokens at ½", tokens=16),
        "4x4": ViT("4×4 pool at ½", pooling=((half, 4),)),
        "4 tokens": ViT("4 learned tokens at ½", tokens=4),
        "2x2": ViT("2×2 pool at ½", pooling=((half, 2),)),
        "4x4 2x2": ViT("4×4 pool at ½, 2×2 at ¾", pooling=((half, 4), (three_quarters, 2))),
        "4x4 2x2 early": ViT("4×4 pool at ⅜, 2×2 at ¾", pooling=((three_eighths, 4), (three_quarters, 2))),
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
        Claim(4, "16 learned tokens beat pooling in two steps", "16 tokens", "4x4 2x2", "87.68 and 86.41 %"),
        Claim(4, "4 learned tokens beat a 2×2 pool at the same layer", "4 tokens", "2x2", "not printed"),
    ),
)
