"""The compute that tokens save, spent on more layers: at no more MACs than the plain ViT of the settings' depth.

Paper: "(21)" are 21 layers with the insertion after 10, beside 12 of the plain B/16: 85.21 and 84.73 % at 47.1 and 55.6
GMACs; "24+6 8-TL at 18" keeps the host and adds layers after it: 88.11 and 87.35 % at 274 and 363.
"""

from __future__ import annotations

from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.pictures import CIFAR10, Pictures, ViT, from_scratch
from tokenlearner.study.study import Study


def variants(settings: Pictures) -> dict[str, ViT]:
    deep, deep16 = (layers_for(tokens, settings) for tokens in (8, 16))
    late, more = settings.depth * 3 // 4, max(1, settings.depth // 4)
    return {
        "plain": ViT(f"plain ViT, {settings.depth} layers"),
        "half": ViT("8 tokens at ½, no layer more", tokens=8),
        "deep": ViT(f"{deep} layers, 8 tokens after {deep // 2}", tokens=8, at=deep // 2, depth=deep),
        "deep 16": ViT(f"{deep16} layers, 16 tokens after {deep16 // 2}", tokens=16, at=deep16 // 2, depth=deep16),
        "late": ViT(f"{settings.depth}+{more} layers, 8 tokens after {late}", tokens=8, at=late, extra_layers=more),
    }


def layers_for(tokens: int, settings: Pictures) -> int:
    """The paper's share, 21 of 12, which are 7 of 4; or fewer, if that would cost more than the plain ViT.

    16 tokens are a quarter of a grid of 8×8 and nearly nothing of the paper's 24×24.
    """
    share = tokens / (settings.side // settings.patch) ** 2
    deep = settings.depth * 21 // 12
    return next((n for n in range(deep, 0, -1) if n // 2 + (n - n // 2) * share <= settings.depth), settings.depth)


STUDY = Study(
    title="Saved compute into depth",
    question="Do more layers on fewer tokens beat the plain ViT at its cost?",
    run=from_scratch,
    variants=variants,
    sizes=CIFAR10,
    draw=bars,
    claims=(
        Claim(6, "Deeper with 8 tokens beats the plain ViT at no more MACs", "deep", "plain", "85.21 and 84.73 %"),
        Claim(6, "Deeper with 16 tokens beats the plain ViT", "deep 16", "plain", "85.45 and 84.73 %"),
        Claim(6, "Layers added after the host beat the plain ViT", "late", "plain", "88.11 and 87.35 %"),
    ),
)
