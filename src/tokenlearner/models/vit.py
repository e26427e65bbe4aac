"""The presets as models of timm: ``timm.create_model("tokenlearner_b16_384_8at6", num_classes=10)``.

Beside them stand plain ViViTs, under names as timm gives ViTs: ``timm.create_model("vivit_base_patch16x2_224")``.

Whatever timm's VisionTransformer takes is passed on (for the video presets, what ViViT takes); ``kind``, ``pool``,
``hidden_dim``, ``dropout``, ``over`` and ``window`` go to the TokenLearner, ``mix`` to its fuser. Presets learn tokens
as the paper's experiments did (``kind="conv"``, v1.0); ``kind="mlp"`` is v1.1.

Two things are timm's and not Flax's, so that a ViT's weights give the same numbers here as in timm: the GELU is exact
(``act_layer="gelu_tanh"`` is the official one), and so is how weights start (``weight_init="jax"``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import timm
from timm.models import get_pretrained_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner.core.learner import Kind, Pool
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.spec import FuserKind
from tokenlearner.models.creating import create, default_cfgs_of, model_cfg
from tokenlearner.models.pooling import PooledViT
from tokenlearner.models.presets import PIXELS, PRESETS, WEIGHTS, Preset
from tokenlearner.models.video_presets import VIDEO_HOSTS, VIDEO_PRESETS, VideoPreset
from tokenlearner.models.vivit import ViViT

__all__ = ["tokenlearner_vit"]  # register_model adds each preset's name

_OPTIONS = ("kind", "pool", "hidden_dim", "dropout", "mix", "over", "window")
_NO_WEIGHTS: dict[str, Any] = dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"))


def preset_cfg(preset: Preset) -> dict[str, Any]:
    """What timm wants to know of a preset's model, beside its weights."""
    return model_cfg(preset.resolution, preset.num_classes, **PIXELS.get(preset.size, {}))


_ALL: dict[str, Preset] = {**PRESETS, **VIDEO_PRESETS, **VIDEO_HOSTS}
default_cfgs = default_cfgs_of(
    {"tokenlearner_vit": model_cfg(224, 1000), **{name: preset_cfg(preset) for name, preset in _ALL.items()}}, WEIGHTS
)


@register_model
def tokenlearner_vit(
    pretrained: bool = False,
    *,
    host: str = "",
    tokens: int = 8,
    at: int | float = 0.5,
    kind: Kind = "mlp",
    fuser: FuserKind | None = None,
    extra_layers: int = 0,
    pool: Pool | None = None,
    hidden_dim: int = 64,
    dropout: float = 0.0,
    **kwargs: Any,
) -> nn.Module:
    """Any timm VisionTransformer with a TokenLearner: ``timm.create_model("tokenlearner_vit", host=…, tokens=8)``.

    The arguments are those of :func:`tokenlearner.insert`; the rest goes to the host.

    Raises:
        InputError: No such host, or ``pretrained=True`` without weights of this very model.
        TypeError: The host is no VisionTransformer.
    """
    if not (isinstance(host, str) and timm.is_model(host)) or host.startswith("tokenlearner_"):
        raise InputError(f"tokenlearner_vit takes a ViT of timm as in host='vit_base_patch16_224', not host={host!r}")

    def build(**arguments: Any) -> nn.Module:
        return insert(
            timm.create_model(host, **arguments),
            tokens,
            at,
            kind,
            fuser,
            extra_layers,
            pool=pool,
            hidden_dim=hidden_dim,
            dropout=dropout,
        )

    name = "tokenlearner_vit"
    if not kwargs.get("pretrained_cfg") and (of_host := get_pretrained_cfg(host)):
        # How the host wants its images, and never where its weights are.
        bare = {**_NO_WEIGHTS, "architecture": name, "tag": None, "custom_load": False}
        kwargs["pretrained_cfg"] = dataclasses.replace(of_host, **bare)
    return create(name, build, pretrained, kwargs)


def preset_entry(preset: Preset) -> Callable[..., nn.Module]:
    """The function timm calls to make the model of a preset; its name is the model's."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        if options and preset.tokens is None:
            raise InputError(f"{preset.name} has no TokenLearner, so there is nothing for {', '.join(options)} to set")
        build = functools.partial(_build, preset, options)
        loader = "inflate" if isinstance(preset, VideoPreset) else "load_vit_weights"
        return create(preset.name, build, pretrained, {**preset.host_arguments(), **kwargs}, loader=loader)

    entry.__name__ = entry.__qualname__ = preset.name
    entry.__doc__ = f"The model of {preset}."
    return entry


def _build(preset: Preset, options: dict[str, Any], **arguments: Any) -> nn.Module:
    if preset.pooling:
        return PooledViT(pooling=preset.pooling, **arguments)
    model = ViViT(**arguments) if isinstance(preset, VideoPreset) else VisionTransformer(**arguments)
    if preset.tokens is None:
        return model
    options = {"kind": preset.kind, **options}
    return insert(model, preset.tokens, preset.at, fuser=preset.fuser, extra_layers=preset.extra_layers, **options)


globals().update({name: register_model(preset_entry(preset)) for name, preset in _ALL.items()})
