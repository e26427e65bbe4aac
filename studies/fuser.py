"""What brings tokens back to the grid: TokenFuser, Unpool, Reproject, or nothing; 8 and 16 tokens from half depth on.

Paper (B/16, 384²): none 83.2 and 83.2, TokenFuser 83.7 and 83.9, Unpool 82.75 and 83.07, Reprojection 83.65 and
83.92 %.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.pictures import CIFAR10, ViT, from_scratch
from tokenlearner.study.study import Study

WAYS = {"none": None, "fuser": "fuser", "unpool": "unpool", "reproject": "reproject"}

STUDY = Study(
    title="Bringing the tokens back to the grid",
    question="Does TokenFuser add accuracy, and do its alternatives?",
    run=from_scratch,
    variants=lambda _: {
        f"{n} {name}": ViT(f"{n} tokens, {name}", tokens=n, fuser=fuser)
        for n in (8, 16)
        for name, fuser in WAYS.items()
    },
    sizes=CIFAR10,
    draw=bars,
    claims=(
        Claim(5, "TokenFuser adds accuracy, 8 tokens", "8 fuser", "8 none", "83.7 and 83.2 %"),
        Claim(5, "TokenFuser adds accuracy, 16 tokens", "16 fuser", "16 none", "83.9 and 83.2 %"),
        Claim(5, "TokenFuser beats Unpool, 8 tokens", "8 fuser", "8 unpool", "83.7 and 82.75 %"),
        Claim(5, "TokenFuser beats Unpool, 16 tokens", "16 fuser", "16 unpool", "83.9 and 83.07 %"),
        Claim(5, "Nothing is better than Unpool, 8 tokens", "8 none", "8 unpool", "83.2 and 82.75 %"),
        Claim(
            5,
            "TokenFuser takes about 1 % more multiply-adds",
            "8 fuser",
            "8 none",
            "28.5 and 28.3 GMACs, 1.01×",
            "at most",
            1.02,
            "macs",
        ),
        Claim(
            5,
            "Reprojection takes more multiply-adds than TokenFuser",
            "8 reproject",
            "8 fuser",
            "32.7 and 28.6 GMACs",
            score="macs",
        ),
        Claim(
            5,
            "Reprojection is about as good as TokenFuser",
            "8 reproject",
            "8 fuser",
            "83.65 and 83.7 %",
            "about",
            decides=False,
        ),
    ),
)
