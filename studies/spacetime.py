"""Tokens of one slice of a clip against tokens that see more, in a small ViViT, at half depth.

The paper learns its tokens from one frame at a time and names that as its limit, so it has no number for the others:
maps that see the slices around theirs too, and tokens learned from several slices together. "16 tokens for 2 slices"
are as many as 8 a slice, "8 tokens for 2 slices" as 4 a slice.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.clips import VIVIT, Slices, vivit
from tokenlearner.study.figures import bars
from tokenlearner.study.study import Study

VARIANTS = {
    "slice": Slices("8 tokens a slice", tokens=8),
    "neighbours": Slices("8, maps see 3 slices", tokens=8, over="neighbours", window=3),
    "window 16": Slices("16 tokens for 2 slices", tokens=16, over="window", window=2),
    "window 32": Slices("32 tokens for 4 slices", tokens=32, over="window", window=4),
    "slice 4": Slices("4 tokens a slice", tokens=4),
    "window 8": Slices("8 tokens for 2 slices", tokens=8, over="window", window=2),
    "plain": Slices("plain ViViT"),
    "frames": Slices("average over frames", frame_average=True),
}

STUDY = Study(
    title="Tokens of a slice, and of more than one",
    question="Does it help that tokens are learned over space and time together?",
    run=vivit,
    variants=lambda _: VARIANTS,
    sizes=VIVIT,
    draw=bars,
    claims=(
        Claim(
            2,
            "In a ViViT 8 tokens a slice at ½ depth are at least as accurate as the plain one",
            "slice",
            "plain",
            "83.5 and 83.4 % (Kinetics-400, 16 tokens)",
            "at least",
            2.0,
        ),
    ),
)
