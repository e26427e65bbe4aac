"""What is compared and how it is trained: the models, and a recipe for each data set and machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Variant:
    """``inserted`` are the arguments of tokenlearner.insert; None is the plain ViT."""

    label: str
    inserted: dict[str, Any] | None = None


MODELS = {
    "plain": Variant("plain ViT"),
    "tl8-half": Variant("8 tokens from ½ depth on", {"num_tokens": 8, "at": 0.5}),
    "tl8-three-quarters": Variant("8 tokens from ¾ depth on", {"num_tokens": 8, "at": 0.75}),
    "tl8-half-fuser": Variant("8 tokens and fuser from ½ depth on", {"num_tokens": 8, "at": 0.5, "fuser": "fuser"}),
}


@dataclass(frozen=True)
class Settings:
    size: int = 32
    """Pixels a side of what the model sees."""
    patch: int = 4
    width: int = 192
    depth: int = 12
    heads: int = 3
    epochs: int = 150
    batch: int = 512
    optimizer: str = "adamw"
    lr: float = 1.5e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.08
    beta2: float = 0.999
    warmup: float = 5.0
    clip: float = 1.0
    label_smoothing: float = 0.1
    drop_path: float = 0.1
    mixup: float = 0.4
    cutmix: float = 1.0
    crop: float = 0.0
    """Smallest share of the photo in a crop; 0 moves the photo by up to 4 pixels instead."""
    affine: float = 1.0
    colour: float = 0.3
    erase: int = 0
    ema: float = 0.9995
    """Largest weight of the past in the average; starts small."""
    compile: int = 1


# The smallest honest version, for one thread without a GPU: minutes a run.
_CPU = Settings(
    width=128,
    depth=4,
    heads=4,
    epochs=4,
    batch=64,
    optimizer="muon",
    lr=3e-3,
    weight_decay=0.05,
    warmup=0.5,
    label_smoothing=0.0,
    drop_path=0.0,
    mixup=0.0,
    cutmix=0.0,
    affine=0.0,
    colour=0.0,
    ema=0.99,
    compile=0,
)
RECIPES = {
    "cifar10": {"gpu": Settings(), "cpu": _CPU},
    "flowers": {
        "gpu": Settings(size=128, patch=8, epochs=300, batch=128, crop=0.35, affine=0.0),
        "cpu": replace(_CPU, size=64, patch=8, epochs=12, warmup=1.0),  # README.md says what else was tried
    },
}
