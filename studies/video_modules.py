"""The ten modules of tables 11 and 12 in the middle of the last three blocks of a small X(2+1)D.

Paper (mAP on Charades, 6 frames a second): Joint space-time MHSA 57.9, Conv2D + Joint 58.6, TokenLearner 58.8, Conv2D +
TokenLearner 59.6, Conv2D + Conv1D 56.6, Conv2D + MLPMixer 57.0, Conv2D + Temporal transformer 58.4, Spatial + Temporal
58.8, Conv2D + both 58.0, SpatialT + TokenLearner 58.9.
"""

from __future__ import annotations

from tokenlearner.models.bottleneck import MODULES
from tokenlearner.models.x2plus1d import PLAIN
from tokenlearner.study.claims import Claim
from tokenlearner.study.clips import X2PLUS1D, Middle, x2plus1d
from tokenlearner.study.figures import bars
from tokenlearner.study.study import Study

LEARNED, BOTH = "TokenLearner", "Conv2D + TokenLearner"
MODULE_NAMES = (PLAIN, *(name for name in MODULES if name != PLAIN))


def claim(first: str, second: str, numbers: str, *, better: bool = False) -> Claim:
    text = f"{first} {'beats' if better else 'is at least as good as'} {second}"
    return Claim(
        7,
        text,
        first,
        second,
        f"{numbers} mAP (Charades, 6 fps)",
        "better" if better else "at least",
        2.0,
        decides=False,
    )


STUDY = Study(
    title="Space-time modules in X(2+1)D",
    question="Which module in the last blocks of a video model tells the order of frames best?",
    run=x2plus1d,
    variants=lambda _: {name: Middle(name, name) for name in MODULE_NAMES},
    sizes=X2PLUS1D,
    draw=bars,
    claims=(
        claim(LEARNED, "Joint space-time MHSA", "58.8 and 57.9"),
        claim(BOTH, "Conv2D + Joint space-time MHSA", "59.6 and 58.6"),
        claim(LEARNED, "Spatial + Temporal transformer", "58.8 and 58.8"),
        claim(BOTH, PLAIN, "59.6 and 56.6", better=True),
        claim(BOTH, "Conv2D + MLPMixer", "59.6 and 57.0", better=True),
        claim(BOTH, "Conv2D + Temporal transformer", "59.6 and 58.4", better=True),
        claim(BOTH, "Conv2D + Spatial + Temporal transformer", "59.6 and 58.0", better=True),
    ),
)
