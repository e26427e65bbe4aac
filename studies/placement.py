"""Where to insert: 8 and 16 tokens before the first layer, after ¼, ½ and ¾ of them, and not at all.

Paper: the figure of locations (B/16, ImageNet 5-shot after JFT): 8 tokens 21.0, 59.0, 63.8, 68.0 %, 16 tokens 32.0,
61.5, 63.5, 68.0 %, none 63.0 %.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import against
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

SHARES = {"0": 0.0, "1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
VARIANTS = {"plain": ViT("plain ViT")} | {
    f"{tokens} at {name}": ViT(f"{tokens} tokens at {name}", tokens=tokens, at=share)
    for tokens in (8, 16)
    for name, share in SHARES.items()
}

STUDY = Study(
    title="Where to insert",
    question="How do accuracy and cost change with the layer that learned tokens start at?",
    run=from_scratch,
    variants=lambda _: VARIANTS,
    sizes=CIFAR10,
    draw=lambda axis, summary: against(
        axis,
        summary,
        {f"{n} tokens": [(share, f"{n} at {name}") for name, share in SHARES.items()] for n in (8, 16)},
        xlabel="share of the depth before the insertion",
        level="plain",
    ),
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
        Claim(3, "At depth 0 it is clearly worse", "plain", "8 at 0", "63.0 and 21.0 % (5-shot)"),
    ),
)
