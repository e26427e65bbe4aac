"""How many tokens: 1 to 32 at half depth. The paper uses 8 and 16 and finds 16 little better (tables 1 and 4)."""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import against
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

NUMBERS = (1, 2, 4, 8, 16, 32)

STUDY = Study(
    title="How many tokens",
    question="How many learned tokens at half depth does it take?",
    run=from_scratch,
    variants=lambda _: (
        {"plain": ViT("plain ViT")} | {str(n): ViT(f"{n} tokens" if n > 1 else "1 token", tokens=n) for n in NUMBERS}
    ),
    sizes=CIFAR10,
    draw=lambda axis, summary: against(
        axis, summary, {"tokens at ½": [(n, str(n)) for n in NUMBERS]}, xlabel="learned tokens", level="plain"
    ),
    claims=(
        Claim(
            2, "16 tokens are about as good as 8", "16", "8", "83.2 and 83.2 % (table 4)", "about", 2.0, decides=False
        ),
    ),
)
