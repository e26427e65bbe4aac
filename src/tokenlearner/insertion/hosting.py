"""A timm ViT as data and back: how to build the same host again, proven before it is written down.

A ViT knows neither the name nor all the arguments it was built with. What timm recorded is tried first, then the
arguments are read off the instance, where it is a VisionTransformer; of other classes only those can be described that
timm.create_model made. Our X2Plus1D, the one model here that is no ViT, keeps its arguments. Either way
the model is built a second time on the meta device and compared with the first, module by module, so a description that
would give another model is never saved.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insertion_of, remove

_CLASSES = {"VisionTransformer": VisionTransformer, "VisionTransformerDistilled": VisionTransformerDistilled}
# Imported when one is named: the models import this package.
_OURS = {
    "FrameAverageViT": "tokenlearner.models.frame_average",
    "PooledViT": "tokenlearner.models.pooling",
    "ViViT": "tokenlearner.models.vivit",
    "X2Plus1D": "tokenlearner.models.x2plus1d",
}
_ARGUMENTS = frozenset(inspect.signature(VisionTransformer).parameters) | {"pooling", "num_frames", "tubelet_size"}
# ViTs that are no VisionTransformer, with the arguments timm may have recorded for them.
_OTHERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (Beit, Cait, Eva, NaFlexVit, VisionTransformerRelPos)
}
_ARGUMENTS_OF = {name: frozenset(inspect.signature(kind).parameters) for name, kind in _OTHERS.items()}
# A NaFlexVit can be asked for by the name and arguments of another ViT.
_ARGUMENTS_OF["NaFlexVit"] |= {"use_naflex", *inspect.signature(NaFlexVitCfg).parameters, *_ARGUMENTS}
_ARGUMENTS_OF["NaFlexVit"] |= _ARGUMENTS_OF["Eva"]
_TYPE_ROOTS = ("timm.", "torch.nn.")  # a config.json can name a module class of these packages, and no other code
_STATE_OF_A_RUN = {"training", "grad_checkpointing", "distilled_training", "fused_attn", "token_learner_insertion"}


def describe_host(model: nn.Module, rebuild: Callable[[dict[str, Any]], nn.Module]) -> dict[str, Any]:
    """JSON-ready description from which :func:`build_host` makes the bare host of ``model`` again.

    ``rebuild`` makes all of ``model`` of a description, without numbers: host and whatever was inserted since.

    Raises:
        InputError: The model is neither a ViT of timm nor an X2Plus1D, or no description was found that gives the same
            model, with the first differences.
    """
    ways: tuple[Callable[[Any], dict[str, Any] | None], ...] = (_recorded, _read_off)
    if type(model).__name__ == "X2Plus1D" and type(model) is _class_of("X2Plus1D"):
        ways = (_kept,)
    elif _OTHERS.get(type(model).__name__) is type(model):
        ways = (_recorded_other,)
    elif not isinstance(model, VisionTransformer):
        if any(kind.__module__.startswith("transformers.") for kind in type(model).__mro__):
            raise InputError(
                f"{type(model).__name__} is a model of transformers: save it with model.save_pretrained(folder), which "
                "keeps the insertion"
            )
        inside = "; save the model that it wraps" if hasattr(model, "_orig_mod") or hasattr(model, "module") else ""
        raise InputError(f"a plain ViT of timm can be saved, and {type(model).__name__} is none{inside}")
    bare = bare_on_meta(model)
    problems: list[str] = []
    for read in ways:
        try:
            description = read(bare)
            if description is None:
                continue
            found = differences(model, rebuild(description))
        except Exception as error:  # a part that reads or builds differently means: not this way
            problems.append(str(error))
            continue
        if not found:
            return description
        problems += found
    problems = problems or ["it is neither timm's own class nor made by timm.create_model"]
    raise InputError(
        f"can't describe this {type(model).__name__} so that it can be built again, so it was not saved: "
        + "; ".join(problems[:4])
    )


def build_host(description: dict[str, Any]) -> nn.Module:
    """Builds the host, with new weights, that :func:`describe_host` described.

    Raises:
        InputError: The description names a library, class or argument that is not known, or one that does not fit.
    """
    if description.get("library") != "timm":
        raise InputError(f"host library {description.get('library')!r} is not known; this version knows 'timm'")
    arguments, architecture, name = (description.get(key) for key in ("arguments", "architecture", "class"))
    if not isinstance(arguments, dict):
        raise InputError(f"the host's arguments are {arguments!r}, and have to be a dictionary")
    # An X2Plus1D says itself what it doesn't take, since that depends on its module.
    known = _ARGUMENTS_OF.get(str(name), _ARGUMENTS)
    if name != "X2Plus1D" and (unknown := sorted(arguments.keys() - known)):
        vit = name if name in _ARGUMENTS_OF else "VisionTransformer"
        raise InputError(f"timm {timm.__version__}'s {vit} has no {', '.join(unknown)}")
    decoded = {key: _decode(value) for key, value in arguments.items()}
    host_class = _class_of(name)
    if architecture is None and host_class is None:
        raise InputError(f"host class {name!r} is not known; this version knows {', '.join([*_CLASSES, *_OURS])}")
    if architecture is not None and not (isinstance(architecture, str) and timm.is_model(architecture)):
        raise InputError(f"timm {timm.__version__} has no model {architecture!r}")
    try:
        if architecture is None and host_class is not None:
            return host_class(**decoded)
        return timm.create_model(str(architecture), pretrained=False, **decoded)
    except Exception as error:  # whatever a constructor makes of arguments that don't fit
        raise InputError(
            f"{'timm ' if architecture else ''}can't build the host {architecture or name}: {error}"
        ) from error


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
    for name in [name for name in mine if name in theirs]:
        a, b, place = mine[name], theirs[name], name or "the model"
        if type(a) is not type(b):
            found.append(f"{place} is {type(a).__name__} in one and {type(b).__name__} in the other")
            continue
        fields = _simple_fields(a), _simple_fields(b)
        for field in sorted(fields[0].keys() | fields[1].keys()):
            values = [f.get(field) for f in fields]
            # A note somebody made on a model is no difference: code that works without the attribute can't need it.
            if values[0] != values[1] and hasattr(a, field) and hasattr(b, field):
                found.append(f"{place}.{field} is {values[0]!r} in one and {values[1]!r} in the other")
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (one, other)]
    for key in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(key) != shapes[1].get(key):
            found.append(f"{key} is {shapes[0].get(key)} in one and {shapes[1].get(key)} in the other")
    names = [{name for name, _ in m.named_parameters()} for m in (one, other)]  # without the second name of tied ones
    found += [f"{key} is tied to another parameter in one" for key in sorted(names[0] ^ names[1]) if key in shapes[0]]
    return found


def _simple_fields(module: nn.Module) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _STATE_OF_A_RUN:
            continue
        if isinstance(value, tuple | list):
            if all(isinstance(v, int | float | str) for v in value):
                fields[name] = list(value)
        elif isinstance(value, bool | int | float | str):
            fields[name] = value
        elif callable(value) and hasattr(type(module), name):
            fields[name] = "replaced"  # a method somebody patched
    return fields


def _kept(model: Any) -> dict[str, Any]:
    """The arguments an X2Plus1D keeps, with the number of classes that it has by now."""
    arguments = {**model.arguments, "num_classes": model.num_classes}
    return {"library": "timm", "architecture": None, "class": "X2Plus1D", "arguments": arguments}


def _recorded_other(model: Any) -> dict[str, Any] | None:
    """The architecture and arguments timm noted when it created a ViT that is no VisionTransformer."""
    name = type(model).__name__
    architecture = _architecture(model)
    if architecture is None:
        raise InputError(f"{name} can only be described by the name it has in timm; make it with timm.create_model")
    given = getattr(model, "_model_args", {})
    arguments = {k: v for k, v in given.items() if k in _ARGUMENTS_OF[name] and _is_plain(v)}
    arguments |= {key: getattr(model, key) for key in ("num_classes", "in_chans", "global_pool")}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        arguments["img_size"] = list(size)
    return {"library": "timm", "architecture": architecture, "class": name, "arguments": arguments}


def _architecture(model: Any) -> str | None:
    """The name timm itself has for the model; None where it was not made by a name of timm's."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if architecture == "tokenlearner_vit":  # ours, and its host is an argument
        architecture = getattr(model, "_model_args", {}).get("host")
    if not architecture or not timm.is_model(architecture):
        return None
    if not timm.models.model_entrypoint(architecture).__module__.startswith("timm."):
        return None  # registered by other code, which need not be there when the model is loaded
    return architecture


def _recorded(model: VisionTransformer) -> dict[str, Any] | None:
    """The architecture and arguments timm noted when it created the model."""
    architecture = _architecture(model)
    if architecture is None:
        return None
    given = getattr(model, "_model_args", {})
    recorded = {k: v for k, v in given.items() if k in _ARGUMENTS and _is_plain(v)}
    embed: Any = model.patch_embed
    arguments = {**recorded, "num_classes": model.num_classes, "in_chans": model.in_chans}
    if embed.img_size is not None:
        arguments["img_size"] = list(embed.img_size)
    arguments["global_pool"] = model.global_pool
    return {"library": "timm", "architecture": architecture, "arguments": arguments}


def _read_off(model: VisionTransformer) -> dict[str, Any] | None:
    """Every constructor argument of a VisionTransformer, read off the instance.

    May raise anything where a part is none of timm's.
    """
    name = type(model).__name__
    if _class_of(name) is not type(model) or not len(model.blocks):
        return None
    embed: Any = model.patch_embed
    norms = [m for m in (model.norm, model.fc_norm) if not isinstance(m, nn.Identity)]
    arguments: dict[str, Any] = {
        "img_size": list(embed.img_size) if embed.img_size else None,
        "patch_size": list(embed.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.has_class_token,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": bool(norms),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
        "drop_path_rate": max([getattr(m, "drop_prob", 0.0) or 0.0 for m in model.blocks.modules()], default=0.0),
        "weight_init": getattr(model, "weight_init_mode", ""),
        "fix_init": getattr(model, "fix_init", False),
        "embed_norm_layer": None if isinstance(embed.norm, nn.Identity) else _described(embed.norm),
        **_read_block(model.blocks[0], model.embed_dim),
    }
    if norms:
        arguments["norm_layer"] = _described(norms[0])
    if name == "PooledViT":
        arguments["pooling"] = [list(pair) for pair in cast(Any, model).pooling]
    if name == "ViViT":
        arguments.update(num_frames=embed.num_frames, tubelet_size=embed.tubelet_size)
    return {"library": "timm", "architecture": None, "class": name, "arguments": arguments}


def _read_block(block: Any, dim: int) -> dict[str, Any]:
    """The constructor arguments a VisionTransformer hands on to its blocks."""
    if hasattr(block, "in_proj"):  # attention and MLP side by side, out of one projection
        out = block.attn_out_proj if getattr(block, "out_proj", None) is None else block.out_proj
        kind = _described(block)
        if "fuse_out_proj" in inspect.signature(type(block)).parameters:
            kind["fuse_out_proj"] = out is block.out_proj
        return {
            "num_heads": block.num_heads,
            "mlp_ratio": _ratio(block.in_split[0], dim),
            "qkv_bias": block.in_proj.bias is not None,
            "qk_norm": not isinstance(block.q_norm, nn.Identity),
            "proj_bias": out.bias is not None,
            "init_values": getattr(block.ls, "init_values", None),
            "proj_drop_rate": block.mlp_drop.p,
            "attn_drop_rate": block.attn_drop.p,
            "norm_layer": _described(block.in_norm),
            "act_layer": _described(block.mlp_act),
            "block_fn": kind,
        }
    attention, feedforward = (block.attns[0], block.ffns[0]) if hasattr(block, "attns") else (block, block)
    attn, mlp = attention.attn, feedforward.mlp
    first_layer = mlp.fc1_g if hasattr(mlp, "fc1_g") else mlp.fc1
    scale = getattr(block, "ls1", getattr(attention, "ls", block))  # ResPostBlock keeps init_values itself
    return {
        "num_heads": attn.num_heads,
        "mlp_ratio": _ratio(first_layer.out_features, dim),
        "qkv_bias": attn.qkv.bias is not None,
        "qk_norm": not isinstance(attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity),
        "scale_mlp_norm": not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity),
        "proj_bias": attn.proj.bias is not None,
        "init_values": getattr(scale, "init_values", None),
        "proj_drop_rate": attn.proj_drop.p,
        "attn_drop_rate": attn.attn_drop.p,
        "norm_layer": _described(block.norm1 if hasattr(block, "norm1") else attention.norm),
        "act_layer": _described(mlp.act),
        "block_fn": _described(block),
        "mlp_layer": _described(mlp),
        "attn_layer": {"type": _type_name(type(attn))},  # timm takes the class alone here
    }


def _class_of(name: object) -> type[nn.Module] | None:
    if isinstance(name, str) and name in _OURS:
        return getattr(importlib.import_module(_OURS[name]), name)
    return _CLASSES.get(name) if isinstance(name, str) else None


def _ratio(hidden: int, dim: int) -> float:
    """The mlp_ratio that gives ``hidden``; timm takes int(dim · ratio), which may round hidden / dim down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _described(module: nn.Module) -> dict[str, Any]:
    """A module's class with those of its constructor's options that it keeps, and that no host argument sets."""
    description: dict[str, Any] = {"type": _type_name(type(module))}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        if parameter.default is inspect.Parameter.empty or name in _ARGUMENTS:
            continue
        value = getattr(module, "elementwise_affine" if name == "affine" else name, parameter)
        if isinstance(parameter.default, bool) and (value is None or isinstance(value, torch.Tensor)):
            value = value is not None  # an option such as bias=False
        if _is_plain(value) and value is not None:
            description[name] = value
    return description


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
        raise InputError(f"the host has the class {name}, which is not one of timm's or torch.nn's")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the host has the class {name}, which timm {timm.__version__} does not have") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):  # a function could do anything
        raise InputError(f"the host has {name} for a class, and it is no module class")
    options = {k: v for k, v in value.items() if k != "type"}
    return functools.partial(kind, **options) if options else kind


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)
