"""Tiny models of every family that is exported, carrying what ``tokenlearner.load`` gives a model.

A new host is a line of :data:`FAMILIES`: a function without arguments that gives such a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from insertion.clips import tiny_vivit
from insertion.hosts import inserted, shake, tiny
from tokenlearner import Preprocessing
from tokenlearner.models import X2Plus1D

PICTURES = Preprocessing(input_size=(3, 32, 32))
CLIPS = Preprocessing(input_size=(3, 16, 16), frames=6, fps=6.0)
LABELS = tuple("abcde")


def ready(model: nn.Module, preprocessing: Preprocessing = PICTURES) -> nn.Module:
    model.preprocessing, model.label_names = preprocessing, LABELS
    return model.eval()


def image_model(kind: str = "mlp", cls: type[VisionTransformer] = VisionTransformer, **options: object) -> nn.Module:
    """A ViT of two layers, the second on four tokens, or fused with ``fuser``; the rest are the host's options."""
    fuser = options.pop("fuser", None)
    return ready(inserted(tiny(cls, depth=2, **options), 4, 1, kind, fuser))


def clip_model(**options: object) -> nn.Module:
    """A ViViT of two layers on 3 slices of 2×2; ``options`` go to ``insert``."""
    return ready(inserted(tiny_vivit(depth=2, img_size=16), 4, 1, **options), CLIPS)


def x2plus1d() -> nn.Module:
    small = {"widths": (8, 16), "depths": (1, 2), "swapped": 1, "head_width": 16, "num_weights": 6}
    model = X2Plus1D("TokenLearner", 5, num_frames=6, img_size=16, **small).eval()
    shake(*model.parameters())
    return ready(model, CLIPS)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT without TokenLearner": lambda: ready(tiny(depth=2)),
    "mlp": image_model,
    "conv, fuser, registers": partial(image_model, "conv", fuser="fuser", reg_tokens=2),
    "conv1, reproject": partial(image_model, "conv1", fuser="reproject"),
    "gate, unpool": partial(image_model, "gate", fuser="unpool"),
    "grid": partial(image_model, "grid"),
    "dense, distilled DeiT": partial(image_model, "dense", VisionTransformerDistilled),
    "average, no class token": partial(image_model, "average", class_token=False, global_pool="avg"),
    "ViViT, fuser by slice": partial(clip_model, fuser="fuser"),
    "ViViT, fuser by clip": partial(clip_model, kind="conv", fuser="fuser", mix="clip"),
    "ViViT, neighbours": partial(clip_model, over="neighbours"),
    "ViViT, window": partial(clip_model, over="window", window=3),
    "X(2+1)D with TokenLearner": x2plus1d,
}
