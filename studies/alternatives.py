"""What α is in the bottleneck block, "Conv2D + TokenLearner": convolutions, as in the paper, or none.

Paper (mAP on Charades, 6 frames a second): convolutions 59.6, a fixed grid 58.8, averages 58.6, one dense layer over
the positions 56.6. ``alpha_forms`` has the same forms in an image ViT.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.clips import X2PLUS1D, Middle, x2plus1d
from tokenlearner.study.figures import bars
from tokenlearner.study.study import Study

FORMS = {"conv": "conv1", "grid": "grid", "average": "average", "dense": "dense"}  # ours for the paper's names

STUDY = Study(
    title="α in the bottleneck block, 8 tokens a frame",
    question="Does it matter in the video model that the maps are learned from the input?",
    run=x2plus1d,
    variants=lambda _: {name: Middle(name, "Conv2D + TokenLearner", kind) for name, kind in FORMS.items()},
    sizes=X2PLUS1D,
    draw=bars,
    claims=(
        Claim(7, "α by convolutions beats a fixed grid", "conv", "grid", "59.6 and 58.8 mAP"),
        Claim(
            7, "A fixed grid is at least as good as averages", "grid", "average", "58.8 and 58.6 mAP", "at least", 2.0
        ),
        Claim(7, "Averages beat one dense layer over positions", "average", "dense", "58.6 and 56.6 mAP"),
    ),
)
