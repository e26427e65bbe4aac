"""What our models need to be timm's: their ``default_cfgs``, and building with or without published weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, resolve_pretrained_cfg
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.models.weights import fit_positions, some

Cfg = dict[str, Any]


def model_cfg(resolution: int, num_classes: int, **more: Any) -> Cfg:
    """What timm wants to know of a model (of clips: of a frame); pixel values are scaled to [-1, 1] as officially.

    Args:
        resolution: Height and width that the model is made for.
        num_classes: Classes of its head.
        more: Entries to add, or to have instead of those set here, which are a ViT's.
    """
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


def default_cfgs_of(bare: Mapping[str, Cfg], weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """timm's ``default_cfgs``: one entry for each weights file, and one without weights for a name that has none.

    Args:
        bare: Name → :func:`model_cfg` of the model.
        weights: ``name.tag`` → what the cfg says beyond that, as in ``presets.WEIGHTS``.
    """
    folder = Path(__file__).parent / "weights"
    cfgs: dict[str, Any] = {}
    for name, cfg in bare.items():
        tagged = {key: entry for key, entry in weights.items() if key.split(".")[0] == name}
        for key, entry in tagged.items():
            cfgs[key] = {**cfg, **entry, "file": str(folder / entry["file"])}  # an absolute path stays what it is
        if not tagged:
            cfgs[name] = cfg
    return dict(generate_default_cfgs(cfgs))


def create(
    name: str,
    build: Callable[..., nn.Module],
    pretrained: bool,
    arguments: Cfg,
    *,
    loader: str | None = "load_vit_weights",
) -> nn.Module:
    """The model ``build`` makes, as timm makes its own.

    Args:
        name: The model's name in timm.
        build: Takes the arguments of the model and gives it.
        pretrained: Whether to load the weights that ``default_cfgs`` or ``pretrained_cfg`` names.
        arguments: What ``timm.create_model`` was given, and the name's own.
        loader: Function of ``tokenlearner.models`` that puts a plain ViT's weights in; None if there is none.

    Raises:
        InputError: ``pretrained`` without weights of this very model.
    """
    if pretrained:
        cfg = resolve_pretrained_cfg(name, arguments.get("pretrained_cfg"), arguments.get("pretrained_cfg_overlay"))
        if not (cfg.has_weights or cfg.state_dict):
            instead = f", or put a plain ViT's weights in with tokenlearner.models.{loader}(model, state_dict)"
            raise InputError(
                f"nobody has published weights for {name}: use pretrained=False and train it{instead if loader else ''}"
            )
        if cfg.file and not Path(cfg.file).exists():
            raise InputError(f"the weights of {name} are not where they should be, at {cfg.file}")
    feature_cfg = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
    model: Any = build_model_with_cfg(
        build, name, pretrained, pretrained_filter_fn=_checked, feature_cfg=feature_cfg, **arguments
    )
    labels = model.pretrained_cfg.get("label_names")
    if pretrained and labels and len(labels) == getattr(model, "num_classes", None):
        model.label_names = tuple(labels)
    return model


def _checked(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Trained weights as ``model`` takes them. With another number of classes timm loads what fits and is silent about
    the rest, and a TokenLearner must not be left at random unnoticed.
    """
    adapted = dict(state)
    if hasattr(model, "pos_embed"):
        adapted = fit_positions(state, model, class_token="cls_token" in state)
    differing = [key for key in model.state_dict().keys() ^ adapted.keys() if not key.startswith("head.")]
    if differing:
        raise InputError(f"the weights are of another model: only one of the two has {some(differing)}")
    return adapted
