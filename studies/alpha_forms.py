"""The forms of α, 8 tokens at half depth.

Paper (Charades at 6 fps, the bottleneck model): conv 59.6, grid 58.8, average 58.6, dense 56.6 mAP. ``mlp`` is the
authors' later form; ``conv1`` is the bottleneck model's, ``gate`` the one its review spells out.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

FORMS = ("mlp", "conv", "conv1", "gate", "grid", "dense", "average")

STUDY = Study(
    title="Forms of α, 8 tokens at ½ depth",
    question="Does it matter how the maps are made, and that they are learned from the input?",
    run=from_scratch,
    variants=lambda _: {form: ViT(form, tokens=8, kind=form) for form in FORMS},
    sizes=CIFAR10,
    draw=bars,
    claims=(
        Claim(
            7,
            "In an image ViT conv maps beat a fixed grid",
            "conv",
            "grid",
            "not printed for images; in the bottleneck model 59.6 and 58.8 mAP",
            decides=False,
        ),
        Claim(
            7,
            "In an image ViT a fixed grid is at least as good as averages",
            "grid",
            "average",
            "not printed for images; in the bottleneck model 58.8 and 58.6 mAP",
            "at least",
            decides=False,
        ),
        Claim(
            7,
            "In an image ViT averages beat one dense layer over positions",
            "average",
            "dense",
            "not printed for images; in the bottleneck model 58.6 and 56.6 mAP",
            decides=False,
        ),
    ),
)
