"""Tiny models of every family that is exported, carrying what ``tokenlearner.load`` gives a model.

A new host is a line of :data:`FAMILIES`: a function without arguments that gives such a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from insertion.clips import tiny_vivit
from insertion.hosts import TINY, inserted, shake, tiny
from tokenlearner import Preprocessing
from tokenlearner.models import X2Plus1D

PICTURES = Preprocessing(input_size=(3, 32, 32))
CLIPS = Preprocessing(input_size=(3, 16, 16), frames=6, fps=6.0)
LABELS = tuple("abcde")


def ready(model: nn.Module, preprocessing: Preprocessing = PICTURES) -> nn.Module:
    model.preprocessing, model.label_names = preprocessing, LABELS
    return model.eval()


def image_model(kind: str = "mlp", cls: type[VisionTransformer] = VisionTransformer, **options: object) -> nn.Module:
    """A ViT of one layer on four tokens, or fused with ``fuser``; the rest are the host's options."""
    fuser = options.pop("fuser", None)
    return ready(inserted(tiny(cls, depth=1, **options), 4, 0, kind, fuser))


def clip_model(**options: object) -> nn.Module:
    """A ViViT of two layers on 3 slices of 2×2; ``options`` go to ``insert``."""
    return ready(inserted(tiny_vivit(depth=2, img_size=16), 4, 1, **options), CLIPS)


def x2plus1d() -> nn.Module:
    small = {"widths": (8, 16), "depths": (1, 2), "swapped": 1, "head_width": 16, "num_weights": 6}
    model = X2Plus1D("TokenLearner", 5, num_frames=6, img_size=16, **small).eval()
    shake(*model.parameters())
    return ready(model, CLIPS)


def of_timm(architecture: str, kind: str = "mlp", fuser: str | None = None, **options: object) -> nn.Module:
    """As :func:`image_model`, of a host by its name."""
    host = timm.create_model(architecture, **{**TINY, "depth": 1, **options}).eval()
    shake(*host.parameters())
    return ready(inserted(host, 4, 0, kind, fuser))


def on_convolutions(architecture: str, side: int) -> nn.Module:
    """Of a host by its name, whose stem is that of its size: two layers on 4×4 features of a network before it."""
    host = timm.create_model(architecture, img_size=side, depth=2, num_classes=5).eval()
    shake(*host.parameters())
    return ready(inserted(host, 4, 1), Preprocessing(input_size=(3, side, side)))


def of_transformers(name: str, config: str, *, clips: bool = False, **options: object) -> nn.Module:
    import transformers

    sizes: dict[str, object] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
    sizes |= {"intermediate_size": 32, "image_size": 16 if clips else 32, "num_labels": 5}
    host = getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **options})).eval()
    shake(*host.parameters())
    return ready(inserted(host, 4, 0), CLIPS if clips else PICTURES)


# What follows the layer that learns is handed the grid's masks and biases too, so some have a second layer.
TWO: dict[str, object] = {"num_hidden_layers": 2}
V_JEPA = {"crop_size": 16, "frames_per_clip": 6, "mlp_ratio": 2, "pred_hidden_size": 24}
V_JEPA |= {"pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
BEIT = ("BeitForImageClassification", "BeitConfig")
OF_TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "transformers ViT": partial(of_transformers, "ViTForImageClassification", "ViTConfig", **TWO),
    "transformers DeiT": partial(of_transformers, "DeiTForImageClassificationWithTeacher", "DeiTConfig"),
    "transformers BEiT": partial(of_transformers, *BEIT, use_relative_position_bias=True),
    "transformers BEiT, one bias": partial(of_transformers, *BEIT, use_shared_relative_position_bias=True, **TWO),
    "transformers DINOv2": partial(of_transformers, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "transformers DINOv3": partial(of_transformers, "DINOv3ViTModel", "DINOv3ViTConfig"),
    "transformers CLIP": partial(of_transformers, "CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "transformers SigLIP": partial(of_transformers, "SiglipVisionModel", "SiglipVisionConfig"),
    "transformers ViViT": partial(
        of_transformers, "VivitForVideoClassification", "VivitConfig", clips=True, num_frames=6, tubelet_size=[2, 8, 8]
    ),
    "transformers VideoMAE": partial(
        of_transformers, "VideoMAEForVideoClassification", "VideoMAEConfig", clips=True, num_frames=6
    ),
    "transformers V-JEPA 2": partial(of_transformers, "VJEPA2Model", "VJEPA2Config", clips=True, **V_JEPA),
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT without TokenLearner": lambda: ready(tiny(depth=2)),
    "mlp": image_model,
    "conv, fuser, registers": partial(image_model, "conv", fuser="fuser", reg_tokens=2),
    "dense, distilled DeiT": partial(image_model, "dense", VisionTransformerDistilled),
    "ViViT, fuser by slice": partial(clip_model, fuser="fuser"),
    "ViViT, fuser by clip": partial(clip_model, kind="conv", fuser="fuser", mix="clip"),
    "ViViT, neighbours": partial(clip_model, over="neighbours"),
    "ViViT, window": partial(clip_model, over="window", window=3),
    "X(2+1)D with TokenLearner": x2plus1d,
    "EVA-02": partial(of_timm, "eva02_tiny_patch14_224", depth=2),
    "DINOv3, conv1, reproject": partial(of_timm, "vit_small_patch16_dinov3", "conv1", "reproject"),
    "rotation of each layer": partial(of_timm, "vit_small_patch16_rope_mixed_224", embed_dim=64),
    "BEiT v2": partial(of_timm, "beitv2_base_patch16_224"),
    "relative positions, one table": partial(
        of_timm, "vit_relpos_base_patch16_clsgap_224", rel_pos_type="bias", shared_rel_pos=True
    ),
    "relative positions, gate, unpool": partial(of_timm, "vit_relpos_small_patch16_224", "gate", "unpool"),
    "NaFlex, grid": partial(of_timm, "naflexvit_base_patch16_gap", "grid"),
    "CaiT, average": partial(of_timm, "cait_xxs24_224", "average"),
    "on a ResNet": partial(on_convolutions, "vit_tiny_r_s16_p8_224", 128),
    "ViTamin": partial(on_convolutions, "vitamin_small_224", 64),
    "SigLIP, headless": partial(of_timm, "vit_base_patch16_siglip_224", num_classes=0),
    **OF_TRANSFORMERS,
}
