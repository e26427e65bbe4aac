"""The architectures of transformers that can be hosts, where each keeps its parts, and why others can't be.

This module also keeps the classes made for them, under their names: ``TokenLearner…`` of models and configs with an
insertion, ``Fused…`` of fused layers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from tokenlearner.insertion import huggingface_saving as saving
from tokenlearner.insertion.huggingface_layers import Position, fused_class, keep_indices_off_meta
from tokenlearner.insertion.layers import FusedLayer


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps what insertion needs. Paths are dotted, from the bare vision model on.

    ``hosts`` gives for each class the path to its bare vision model and the auto class that is to find it.
    """

    hosts: dict[str, tuple[str, str | None]]
    layer: str
    layers: str
    after: str
    patches: str
    prefix: int
    position: Position = "none"


_VIT_PATCHES = "embeddings.patch_embeddings.projection"


def _image(name: str, path: str) -> dict[str, tuple[str, str | None]]:
    return {f"{name}Model": ("", "model"), f"{name}ForImageClassification": (path, "image")}


def _video(name: str, path: str) -> dict[str, tuple[str, str | None]]:
    return {f"{name}Model": ("", "model"), f"{name}ForVideoClassification": (path, "video")}


_TOWER = "vision_model"
FAMILIES = {
    "vit": Family(_image("ViT", "vit"), "ViTLayer", "layers", "layernorm", _VIT_PATCHES, 1),
    "deit": Family(
        {**_image("DeiT", "deit"), "DeiTForImageClassificationWithTeacher": ("deit", "image")},
        "DeiTLayer",
        "layers",
        "layernorm",
        _VIT_PATCHES,
        2,
    ),
    "beit": Family(_image("Beit", "beit"), "BeitLayer", "layers", "layernorm", _VIT_PATCHES, 1, "bias"),
    "dinov2": Family(_image("Dinov2", "dinov2"), "Dinov2Layer", "encoder.layer", "layernorm", _VIT_PATCHES, 1),
    "dinov2_with_registers": Family(
        _image("Dinov2WithRegisters", "dinov2_with_registers"),
        "Dinov2WithRegistersLayer",
        "encoder.layer",
        "layernorm",
        _VIT_PATCHES,
        1,
    ),
    "dinov3_vit": Family(
        {"DINOv3ViTModel": ("", "model")},
        "DINOv3ViTLayer",
        "model.layer",
        "norm",
        "embeddings.patch_embeddings",
        1,
        "rope",
    ),
    "clip": Family(
        {
            "CLIPVisionModel": ("", "model"),
            "CLIPVisionModelWithProjection": (_TOWER, None),
            "CLIPForImageClassification": (_TOWER, "image"),
        },
        "CLIPEncoderLayer",
        "encoder.layers",
        "",  # its norm sees the class token alone
        "embeddings.patch_embedding",
        1,
    ),
    "siglip": Family(
        {"SiglipVisionModel": ("", "model"), "SiglipForImageClassification": (_TOWER, "image")},
        "SiglipEncoderLayer",
        "encoder.layers",
        "post_layernorm",
        "embeddings.patch_embedding",
        0,
    ),
    "vivit": Family(_video("Vivit", "vivit"), "VivitLayer", "layers", "layernorm", _VIT_PATCHES, 1),
    "videomae": Family(_video("VideoMAE", "videomae"), "VideoMAELayer", "encoder.layer", "layernorm", _VIT_PATCHES, 0),
    "vjepa2": Family(
        _video("VJEPA2", "vjepa2"),
        "VJEPA2Layer",
        "encoder.layer",
        "encoder.layernorm",
        "encoder.embeddings.patch_embeddings.proj",
        0,
        "index",
    ),
}

HOSTS: dict[type, tuple[Family, str]] = {}
"""The classes of transformers that are served, with the path to their bare vision model."""
FUSED: dict[type, type[FusedLayer]] = {}
"""For each layer class that of its fused layers."""


def _read_families() -> None:
    for name, family in FAMILIES.items():
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        layer_class = getattr(module, family.layer)
        FUSED[layer_class] = fused_class(layer_class, __name__)
        made: list[type] = [FUSED[layer_class]]
        for host, (path, auto) in family.hosts.items():
            HOSTS[getattr(module, host)] = family, path
            made += saving.register(getattr(module, host), auto, __name__)
        globals().update({kind.__name__: kind for kind in made})


_read_families()
keep_indices_off_meta()

# By the start of a class's name: why none of the architecture's models is served.
REFUSED = {
    "ViTMAE": "it keeps a random part of the patches in random order, which is no grid to learn tokens from; "
    "load its weights into a ViTModel or ViTForImageClassification for fine-tuning",
    "Timesformer": "its tokens run over time last, and its layers put them back on the grid to attend over time and "
    "space in turn, where learned tokens have no place; use a ViViT, VideoMAE or V-JEPA 2",
    "Siglip2": "it takes patches padded to one number and a mask over them, so that each image has a grid of its own; "
    "SigLIP 2 of a fixed size is a SiglipVisionModel, which is served",
    "CLIPModel": "it has two towers; insert into its vision_model",
    "SiglipModel": "it has two towers; insert into its vision_model",
}
