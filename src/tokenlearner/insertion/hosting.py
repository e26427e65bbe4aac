"""A timm ViT as data and back: how to build the same host again, proven before it is written down.

A model knows neither the name nor all the arguments it was built with. What timm recorded is tried first, then the
arguments are read off the instance. Either way the host is built a second time on the meta device and compared with
the first, module by module, so a description that would give another model is never saved.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any, cast

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insertion_of, remove

_CLASSES = {"VisionTransformer": VisionTransformer, "VisionTransformerDistilled": VisionTransformerDistilled}
_TYPE_ROOTS = ("timm.", "torch.nn.")  # a config.json can name a class of these packages, and no other code
_STATE_OF_A_RUN = {"training", "grad_checkpointing", "distilled_training", "fused_attn", "token_learner_insertion"}


def describe_host(model: nn.Module) -> dict[str, Any]:
    """JSON-ready description from which :func:`build_host` makes the bare host of ``model`` again.

    Raises:
        InputError: None was found that gives the same host, with the first differences.
    """
    bare = cast(VisionTransformer, bare_on_meta(model))
    problems: list[str] = []
    for description in (_recorded(bare), _read_off(bare)):
        if description is None:
            continue
        try:
            with torch.device("meta"):
                rebuilt = build_host(description)
        except Exception as error:  # any constructor's own complaint means: not this way
            problems.append(str(error))
            continue
        found = differences(bare, rebuilt)
        if not found:
            return description
        problems += found
    raise InputError(
        f"can't describe this {type(bare).__name__} so that it can be built again, so it was not saved; differences: "
        + "; ".join(problems[:4])
    )


def build_host(description: dict[str, Any]) -> nn.Module:
    """Builds the host, with new weights, that :func:`describe_host` described.

    Raises:
        InputError: The description names a library, class or argument that is not known.
    """
    if description.get("library") != "timm":
        raise InputError(f"host library {description.get('library')!r} is not known; this version knows 'timm'")
    arguments = {name: _decode(value) for name, value in description.get("arguments", {}).items()}
    architecture = description.get("architecture")
    if architecture is not None:
        if not timm.is_model(architecture):
            raise InputError(f"timm {timm.__version__} has no model {architecture!r}")
        return timm.create_model(architecture, pretrained=False, **arguments)
    name = description.get("class")
    if name not in _CLASSES:
        raise InputError(f"host class {name!r} is not known; this version knows {', '.join(_CLASSES)}")
    return _CLASSES[name](**arguments)


def bare_on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model without insertion and without numbers; costs no memory."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.to("meta")
    bare = copy.deepcopy(model, memo)
    return remove(bare) if insertion_of(bare) else bare


def differences(one: nn.Module, other: nn.Module) -> list[str]:
    """What distinguishes two models apart from the numbers in them, in sentences; empty if nothing does."""
    mine, theirs = dict(one.named_modules()), dict(other.named_modules())
    found = [f"only one of them has {name}" for name in sorted(mine.keys() ^ theirs.keys())]
    for name in mine.keys() & theirs.keys():
        a, b, place = mine[name], theirs[name], name or "the model"
        if type(a) is not type(b):
            found.append(f"{place} is {type(a).__name__} in one and {type(b).__name__} in the other")
            continue
        fields = _simple_fields(a), _simple_fields(b)
        for field in sorted(fields[0].keys() | fields[1].keys()):
            values = [f.get(field) for f in fields]
            if values[0] != values[1]:
                found.append(f"{place}.{field} is {values[0]!r} in one and {values[1]!r} in the other")
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (one, other)]
    for key in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(key) != shapes[1].get(key):
            found.append(f"{key} is {shapes[0].get(key)} in one and {shapes[1].get(key)} in the other")
    return found


def _simple_fields(module: nn.Module) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple | list) else value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in _STATE_OF_A_RUN
        and (
            isinstance(value, bool | int | float | str)
            or (isinstance(value, tuple | list) and all(isinstance(v, int | float | str) for v in value))
        )
    }


def _recorded(model: VisionTransformer) -> dict[str, Any] | None:
    """The architecture and arguments timm noted when it created the model."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture or not timm.is_model(architecture):
        return None
    recorded = {k: v for k, v in getattr(model, "_model_args", {}).items() if _is_plain(v)}
    embed: Any = model.patch_embed
    arguments = {**recorded, "num_classes": model.num_classes, "in_chans": model.in_chans}
    if embed.img_size is not None:
        arguments["img_size"] = list(embed.img_size)
    arguments["global_pool"] = model.global_pool
    return {"library": "timm", "architecture": architecture, "arguments": arguments}


def _read_off(model: VisionTransformer) -> dict[str, Any] | None:
    """Every constructor argument of a VisionTransformer, read off the instance."""
    name = type(model).__name__
    if _CLASSES.get(name) is not type(model):
        return None
    block = model.blocks[0]
    embed: Any = model.patch_embed
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if attn is None or mlp is None or not hasattr(attn, "qkv") or not hasattr(mlp, "fc1"):
        return None
    norm = next(m for m in (model.norm, model.fc_norm, block.norm1) if not isinstance(m, nn.Identity))
    arguments: dict[str, Any] = {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": attn.num_heads,
        "mlp_ratio": mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity),
        "scale_mlp_norm": not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": _layer_scale(block),
        "class_token": model.has_class_token,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "drop_path_rate": max([getattr(m, "drop_prob", 0.0) or 0.0 for m in model.blocks.modules()], default=0.0),
        "norm_layer": {"type": _type_name(type(norm)), "eps": getattr(norm, "eps", 1e-6)},
        "act_layer": {"type": _type_name(type(mlp.act))},
        "block_fn": {"type": _type_name(type(block))},
        "mlp_layer": {"type": _type_name(type(mlp))},
        "attn_layer": {"type": _type_name(type(attn))},
    }
    return {"library": "timm", "architecture": None, "class": name, "arguments": arguments}


def _layer_scale(block: nn.Module) -> float | None:
    own = getattr(block, "init_values", None)  # ResPostBlock keeps it itself
    if own is not None:
        return float(own)
    scale = getattr(block, "ls1", None)
    return None if scale is None or isinstance(scale, nn.Identity) else float(getattr(scale, "init_values", 1e-5))


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _decode(value: Any) -> Any:
    """Plain JSON to a constructor argument: lists are sizes, {"type": name, …} is a class with keyword arguments."""
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, dict):
        return value
    name = str(value.get("type"))
    module, _, attribute = name.rpartition(".")
    if not name.startswith(_TYPE_ROOTS):
        raise InputError(f"config.json names the class {name}, which is not one of timm's or torch.nn's")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"config.json names the class {name}, which timm {timm.__version__} does not have") from error
    options = {k: v for k, v in value.items() if k != "type"}
    return functools.partial(kind, **options) if options else kind


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
