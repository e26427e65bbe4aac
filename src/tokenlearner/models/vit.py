"""The presets as models of timm: ``timm.create_model("tokenlearner_b16_384_8at6", num_classes=10)``.

Whatever timm's VisionTransformer takes is passed on (for the video presets, what ViViT takes); ``kind``, ``pool``,
``hidden_dim`` and ``dropout`` go to the TokenLearner, ``mix`` to its fuser. Presets learn tokens as the paper's
experiments did (``kind="conv"``, v1.0); ``kind="mlp"`` is v1.1.

Two things are timm's and not Flax's, so that a ViT's weights give the same numbers here as in timm: the GELU is exact
(``act_layer="gelu_tanh"`` is the official one), and so is how weights start (``weight_init="jax"``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner.core.learner import Kind, Pool
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.spec import FuserKind
from tokenlearner.models.pooling import PooledViT
from tokenlearner.models.presets import PRESETS, WEIGHTS, Preset
from tokenlearner.models.video_presets import VIDEO_PRESETS, VideoPreset
from tokenlearner.models.vivit import ViViT
from tokenlearner.models.weights import fit_positions, some

__all__ = ["tokenlearner_vit"]  # register_model adds each preset's name

_OPTIONS = ("kind", "pool", "hidden_dim", "dropout", "mix")
_NO_WEIGHTS: dict[str, Any] = dict.fromkeys(("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"))


def _cfg(resolution: int, num_classes: int = 1000, **more: Any) -> dict[str, Any]:
    """What timm wants to know of a model (of clips: of a frame); pixel values are scaled to [-1, 1] as officially."""
    return {
        "input_size": (3, resolution, resolution),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 0.9 if resolution <= 224 else 1.0,
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "num_classes": num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **more,
    }


def default_cfgs_of(presets: Mapping[str, Preset], weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """timm's ``default_cfgs``: one entry for each weights file, and one without weights for a preset that has none."""
    folder = Path(__file__).parent / "weights"
    cfgs: dict[str, Any] = {"tokenlearner_vit": _cfg(224)}
    for name, preset in presets.items():
        tagged = {key: dict(entry) for key, entry in weights.items() if key.split(".")[0] == name}
        for key, entry in tagged.items():
            entry["file"] = str(folder / entry["file"])  # an absolute path stays what it is
            cfgs[key] = _cfg(preset.resolution, **entry)
        if not tagged:
            cfgs[name] = _cfg(preset.resolution, preset.num_classes)
    return dict(generate_default_cfgs(cfgs))


_ALL: dict[str, Preset] = {**PRESETS, **VIDEO_PRESETS}
default_cfgs = default_cfgs_of(_ALL, WEIGHTS)


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
    return _create(name, build, pretrained, kwargs)


def preset_entry(preset: Preset) -> Callable[..., nn.Module]:
    """The function timm calls to make the model of a preset; its name is the model's."""

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        if options and preset.tokens is None:
            raise InputError(f"{preset.name} has no TokenLearner, so there is nothing for {', '.join(options)} to set")
        build = functools.partial(_build, preset, options)
        return _create(preset.name, build, pretrained, {**preset.host_arguments(), **kwargs})

    entry.__name__ = entry.__qualname__ = preset.name
    entry.__doc__ = f"The paper's {preset}."
    return entry


def _build(preset: Preset, options: dict[str, Any], **arguments: Any) -> nn.Module:
    if preset.pooling:
        return PooledViT(pooling=preset.pooling, **arguments)
    model = ViViT(**arguments) if isinstance(preset, VideoPreset) else VisionTransformer(**arguments)
    if preset.tokens is None:
        return model
    options = {"kind": preset.kind, **options}
    return insert(model, preset.tokens, preset.at, fuser=preset.fuser, extra_layers=preset.extra_layers, **options)


def _create(name: str, build: Callable[..., nn.Module], pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        cfg = resolve_pretrained_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not (cfg.has_weights or cfg.state_dict):
            raise InputError(
                f"nobody has published weights for {name}: use pretrained=False and train it, or put a plain ViT's "
                f"weights in with tokenlearner.models.{'inflate' if name in VIDEO_PRESETS else 'load_vit_weights'}"
                "(model, state_dict)"
            )
        if cfg.file and not Path(cfg.file).exists():
            raise InputError(f"the weights of {name} are not where they should be, at {cfg.file}")
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    model: Any = build_model_with_cfg(
        build, name, pretrained, pretrained_filter_fn=_checked, feature_cfg=feature_cfg, **kwargs
    )
    labels = model.pretrained_cfg.get("label_names")
    if pretrained and labels and len(labels) == getattr(model, "num_classes", None):
        model.label_names = tuple(labels)
    return model


def _checked(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Trained weights as ``model`` takes them. With another number of classes timm loads what fits and is silent about
    the rest, and a TokenLearner must not be left at random unnoticed.
    """
    adapted = fit_positions(state, model, class_token="cls_token" in state)
    differing = [key for key in model.state_dict().keys() ^ adapted.keys() if not key.startswith("head.")]
    if differing:
        raise InputError(f"the weights are of another model: only one of the two has {some(differing)}")
    return adapted


globals().update({name: register_model(preset_entry(preset)) for name, preset in _ALL.items()})
