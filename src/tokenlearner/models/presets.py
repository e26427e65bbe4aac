"""Every image model of the paper as data, its baselines included, and the ones that come with weights.

A name says all there is to know, read from left to right: ``tokenlearner_<size><patch>_<resolution>_<what>``, where
*what* is ``plain`` (no TokenLearner), ``8at6`` (8 tokens before layer 6) or ``pool8at9_2at18`` (mean pooling to an 8×8
grid before layer 9 and to 2×2 before layer 18). After it may come ``_of21`` (21 layers instead of the size's own; the
paper's "(21)"), ``_plus11`` (11 layers more, as in "24+11"), ``_mlp`` (another α than the paper's ``conv``) and
``_fuser``, ``_unpool`` or ``_reproject``.

Resolutions are those of the tables: 224 for pre-training and few-shot, 384, 504, 510 or 512 after fine-tuning. L/10
stands at 220 too, since 10 does not divide 224. Any other size is ``img_size=``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenlearner.core.learner import Kind
from tokenlearner.insertion.spec import FuserKind


@dataclass(frozen=True)
class Size:
    """A width and depth of ViT; the MLP is four times as wide."""

    width: int
    layers: int
    heads: int
    norm_last: bool = False
    """Norm after the mean over tokens, as timm's pooled ViTs do, and not before it, as the official code does."""


SIZES = {
    "ti": Size(192, 12, 3),
    "s": Size(384, 12, 6),
    "b": Size(768, 12, 12),
    "l": Size(1024, 24, 16),
    "h": Size(1280, 32, 16),
    "micro": Size(128, 4, 4, norm_last=True),  # ours, for pictures of few pixels; the paper has no such model
}


@dataclass(frozen=True)
class Preset:
    """One model. ``tokens`` None is a plain ViT, or one with ``pooling``: (layer, side of the grid it pools to)."""

    size: str
    patch: int
    resolution: int
    tokens: int | None = None
    at: int = 0
    fuser: FuserKind | None = None
    layers: int | None = None
    """Layers of the host where they are not the size's own."""
    extra_layers: int = 0
    pooling: tuple[tuple[int, int], ...] = ()
    kind: Kind = "conv"
    """v1.0, as in all the paper's experiments on images."""
    num_classes: int = 1000

    @property
    def name(self) -> str:
        what = f"{self.tokens}at{self.at}" if self.tokens else "plain"
        if self.pooling:
            what = "pool" + "_".join(f"{side}at{at}" for at, side in self.pooling)
        layers = f"_of{self.layers}" if self.layers else ""
        extra = f"_plus{self.extra_layers}" if self.extra_layers else ""
        kind = f"_{self.kind}" if self.kind != "conv" else ""
        fuser = f"_{self.fuser}" if self.fuser else ""
        return f"tokenlearner_{self.size}{self.patch}_{self.resolution}_{what}{layers}{extra}{kind}{fuser}"

    def host_arguments(self) -> dict[str, Any]:
        """The VisionTransformer to insert into: no class token, the head on the mean of all tokens."""
        size = SIZES[self.size]
        return {
            "img_size": self.resolution,
            "patch_size": self.patch,
            "embed_dim": size.width,
            "depth": self.layers or size.layers,
            "num_heads": size.heads,
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": size.norm_last,
        }


def _presets() -> list[Preset]:
    plain = [("s", 32), ("s", 16), ("b", 32), ("b", 16)]
    return [
        # Baselines.
        *(Preset(size, patch, resolution) for size, patch in plain for resolution in (224, 384)),
        *(
            Preset("l", patch, r)
            for patch, r in ((16, 224), (16, 512), (14, 504), (10, 220), (10, 510), (8, 224), (8, 512))
        ),
        Preset("h", 14, 224),
        # Table 1 at 384, the few-shot figure at 224.
        *(Preset("s", patch, r, 8, 6) for patch in (32, 16) for r in (224, 384)),
        *(Preset("b", 16, r, tokens, 6) for tokens in (8, 16, 32) for r in (224, 384)),
        *(Preset("s", 32, r, 8, 11, layers=22) for r in (224, 384)),
        *(Preset("b", 32, r, 8, 10, layers=20) for r in (224, 384)),
        *(Preset("b", 16, r, tokens, 10, layers=21) for tokens in (8, 16) for r in (224, 384)),
        # The figure of locations.
        *(Preset("b", 16, 224, tokens, at) for tokens in (8, 16) for at in (0, 3, 9)),
        # Tables 2 and 3.
        Preset("l", 16, 512, 16, 12, extra_layers=11),
        Preset("l", 16, 512, 8, 18, extra_layers=6),
        Preset("l", 14, 504, 16, 18, extra_layers=11),
        Preset("l", 10, 220, 16, 18, extra_layers=11),
        *(Preset("l", 8, r, 16, 18, extra_layers=11) for r in (224, 512)),
        # Table 4, and the figure that compares the ways back to the full grid.
        *(Preset("b", 16, 384, tokens, 6, fuser) for tokens in (8, 16) for fuser in ("fuser", "unpool", "reproject")),
        *(Preset("l", 16, 512, 16, 12, fuser) for fuser in (None, "fuser")),
        *(Preset("l", 16, 512, 8, 18, fuser) for fuser in (None, "fuser")),
        *(Preset("l", 10, 510, 16, 18, fuser, extra_layers=11) for fuser in (None, "fuser")),
        # Table 5. Its names give the grid that is left, not the window: 32×32 → 8×8 → 2×2.
        Preset("l", 16, 512, pooling=((9, 8), (18, 2))),
        Preset("l", 16, 512, pooling=((12, 8), (18, 2))),
        Preset("l", 16, 512, pooling=((12, 4),)),
        # Ours, with weights: what studies/photos trains on CIFAR-10.
        Preset("micro", 4, 32),
        *(Preset("micro", 4, 32, 8, at, kind="mlp") for at in (2, 3)),
    ]


PRESETS: dict[str, Preset] = {preset.name: preset for preset in _presets()}

# Size → how its pixels are prepared, where that is not as in creating.py: the micro models all take CIFAR-10's mean and
# deviation, and use a small picture to its edges.
PIXELS: dict[str, dict[str, Any]] = {
    "micro": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616), "crop_pct": 1.0}
}

# "name.tag" → what timm's pretrained_cfg of those weights says beyond the defaults in creating.py: `file` in the folder
# weights/ beside this file, `num_classes`, `label_names`, `mean`, `std`, `crop_pct`, `license`, `description`. The
# first tag of a name is what pretrained=True takes.
_CIFAR10 = {
    "num_classes": 10,
    "label_names": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    **PIXELS["micro"],
    "license": "apache-2.0",
}
WEIGHTS: dict[str, dict[str, Any]] = {
    f"tokenlearner_micro4_32_{what}.cifar10": {"file": f"tokenlearner_micro4_32_{what}.cifar10.safetensors", **_CIFAR10}
    for what in ("plain", "8at2_mlp", "8at3_mlp")
}
# What studies/ut_interaction trains; frames and their rate stand in the files themselves.
_UT_INTERACTION = {
    "num_classes": 6,
    "label_names": ("shake_hands", "hug", "kick", "point", "punch", "push"),
    "license": "other",  # the videos are for research
}
WEIGHTS |= {
    f"{name}.ut_interaction": {"file": f"{name}.ut_interaction.safetensors", **_UT_INTERACTION}
    for name in ("x2plus1d_micro", "x2plus1d_micro_tokenlearner")
}
