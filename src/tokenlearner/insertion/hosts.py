"""The families of models that can be hosts, and why others can't."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tokenlearner.insertion.host import Host
from tokenlearner.insertion.timm import TimmViT
from tokenlearner.insertion.timm_families import TimmBeit, TimmCait, TimmEva, TimmNaFlex, TimmRelPos

TIMM: tuple[Any, ...] = (TimmViT, TimmEva, TimmBeit, TimmRelPos, TimmNaFlex, TimmCait)

# Adapters for libraries that need not be there: the library, then the module and class of the adapter, imported when a
# model of the library is asked about.
ELSEWHERE: tuple[tuple[str, str, str], ...] = (
    ("transformers", "tokenlearner.insertion.huggingface", "HuggingFaceViT"),
)

# Transformers of timm that look like hosts, by the module of timm they are in.
_REASONS = {
    "vision_transformer_sam": "its layers attend in windows of the patch grid, which learned tokens have no part in",
    "convit": "its first layers attend by distance on a square grid that they work out from the number of tokens",
    "xcit": "every one of its layers convolves the patch grid, which learned tokens are not on",
    "volo": "it runs at two resolutions, and its first layers attend to neighbours on the patch grid",
    "tnt": "its layers run on pixels and patches at once, and pixels have no learned tokens to go to",
    "crossvit": "it runs on two patch grids at once, whose layers exchange tokens",
    "deepseek_vit": "it hands its patches on as a (h, w) grid after the last layer; use a host that pools tokens",
    "qwen3_vit": "it hands its patches on as a (h, w) grid after the last layer; use a host that pools tokens",
    "gemma4_vit": "it pools its patches by their places on the grid after the last layer; use a host that pools tokens",
}
_HIERARCHICAL = (
    "coat", "davit", "edgenext", "efficientformer", "efficientformer_v2", "efficientvit_mit", "efficientvit_msra",
    "fastvit", "gcvit", "hiera", "hieradet_sam2", "iformer", "levit", "maxxvit", "metaformer", "mvitv2",
    "nest", "nextvit", "pit", "pvt_v2", "swiftformer", "swin_transformer", "swin_transformer_v2",
    "swin_transformer_v2_cr", "tiny_vit", "twins", "visformer",
)  # fmt: skip


def adapters(model: object) -> list[Any]:
    """The adapter classes to ask about ``model``, in their order.

    Raises:
        TypeError: It is of a version of its library that we can't import an adapter for.
    """
    roots = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    found = list(TIMM)
    for library, module, name in ELSEWHERE:
        if library in roots:
            try:
                found.append(getattr(importlib.import_module(module), name))
            except ImportError as error:
                raise TypeError(f"hosts of {library} need version 5 of it or newer: {error}") from error
    return found


def host_of(model: nn.Module) -> Host:
    """The adapter for ``model``'s family.

    Raises:
        TypeError: No family we know, with the reason or what to give instead.
    """
    if getattr(model, "wraps_host", False):
        return host_of(model.model)  # type: ignore[arg-type]
    for adapter in adapters(model):
        if adapter.fits(model):
            return adapter(model)
    raise TypeError(why_not(model))


def why_not(model: nn.Module) -> str:
    """Why ``model`` is no host, in a sentence."""
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        return "the model is compiled, and a compiled model would not see the insertion; insert first, compile after"
    if isinstance(model, torch.jit.ScriptModule):
        return "a TorchScript model can't be changed; insert into the eager model"
    inner = getattr(model, "module", None)
    if any(adapter.fits(inner) for adapter in adapters(inner)):
        return f"insert into the model itself ({name}.module) before wrapping it in {name}"
    for adapter in adapters(model)[len(TIMM) :]:
        return adapter.why_not(model)
    for module in (kind.__module__ for kind in type(model).__mro__):
        family = module.removeprefix("timm.models.")
        if reason := _REASONS.get(family):
            return f"{name} can't be a host: {reason}"
        if family in _HIERARCHICAL:
            return f"{name} can't be a host: its grid shrinks from stage to stage, and learned tokens are not on a grid"
    return f"insert() takes a plain ViT as host, such as a timm VisionTransformer (docs/hosts.md), and {name} is none"
