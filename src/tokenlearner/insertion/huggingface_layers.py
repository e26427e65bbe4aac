"""What the layers of a transformers model need besides the learner: their grid noted, and their places taken away.

All hooks are objects of module-level classes, so that ``deepcopy`` and pickle carry them along. A fused layer has a
class of its own for each layer class, which is also derived from that one: transformers finds the layers whose outputs
it records, and which it checkpoints, by their class.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.models.beit.modeling_beit import BeitRelativePositionBias
from transformers.pytorch_utils import compile_compatible_method_lru_cache

from tokenlearner.insertion.layers import (
    Arguments,
    FusedLayer,
    NoteGrid,
    WithoutGrid,
    drop_hooks,
    refuse_masks,
)

Position = Literal["none", "rope", "index", "bias"]
"""How the attention of a family's layers knows where a token is: not at all (only the embedding does), by a rotation
it is given, by a rotation it derives from the token's index, or by a bias on the attention."""


class NoteConvGrid(NoteGrid):
    """Forward hook of the convolution that makes the patches, (b, d, h, w) or (b, d, t, h, w): notes their grid."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        grid: Any = tuple(output.shape[2:])
        self.record.note(grid)


def without_grid(position: Position, num_tokens: int, shared_bias: nn.Module | None = None) -> WithoutGrid:
    """How a family's layers are called on ``num_tokens`` tokens that have no place on the grid.

    ``shared_bias`` is the relative position bias that all layers of a BEiT share, where it has one.
    """
    if position == "bias":
        return functools.partial(_bias_of_class_token, num_tokens, shared_bias)
    return {"none": _without_mask, "rope": _unrotated, "index": _at_origin}[position]


def _without_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Leaves the mask out, the one thing layers are handed: :class:`RefuseMask` refused a user's, so it masks nothing.

    Traced, transformers makes one for the full grid wherever the user gives none.
    """
    return (args[0], *[None] * len(args[1:])), {k: v for k, v in kwargs.items() if k != "attention_mask"}


def _unrotated(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """DINOv3 takes tokens beyond the length of the rotation for prefix tokens, which it does not rotate."""
    refuse_masks(args[1:], kwargs)
    if "position_embeddings" not in kwargs:  # the norm after the last layer
        return args, kwargs
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (cos[..., :0, :], sin[..., :0, :])}


def _at_origin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """V-JEPA 2 rotates by the index where it is given no positions; position 0 does not rotate, whatever the number."""
    if len(args) == 1:  # the norm after the last layer
        return args, kwargs
    return (args[0], torch.zeros(1, 1, dtype=torch.long, device=args[0].device)), kwargs


def _bias_of_class_token(num_tokens: int, shared_bias: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Replaces what BEiT hands its layers as a mask, (b or 1, e or 1, n, n): the bias they share, if they do.

    It is not read off that mask, to which transformers adds one of its own when traced.
    """
    if "attention_mask" not in kwargs:  # the norm after the last layer
        return args, kwargs
    bias = None if shared_bias is None else off_grid(shared_bias.relative_position_bias_table[-3:], num_tokens)
    return args, {**kwargs, "attention_mask": bias}


def off_grid(entries: Float[Tensor, "3 e"], num_tokens: int) -> Float[Tensor, "1 e m m"]:
    """The bias between a class token and learned tokens: none between the latter, which are nowhere.

    ``entries`` are BEiT's for class token to patch, patch to class token, and class token to itself.
    """
    to_token, of_token, own = entries.unsqueeze(-1).unsqueeze(-1)  # (e, 1, 1) each
    row = torch.cat([own, to_token.expand(-1, 1, num_tokens)], dim=2)
    nothing = entries.new_zeros(entries.shape[1], num_tokens, num_tokens)
    rest = torch.cat([of_token.expand(-1, num_tokens, 1), nothing], dim=2)
    return torch.cat([row, rest], dim=1).unsqueeze(0)  # joined, as writing into zeros would export as a scatter


class OffGridBias:
    """Forward hook of a BEiT layer's own relative position bias: that of learned tokens, whatever the grid."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        table: Any = module.relative_position_bias_table
        return off_grid(table[-3:], self.num_tokens)


def keep_indices_off_meta() -> None:
    """Makes BEiT keep the indices into its bias tables on the CPU, as it does unless it first runs on another device.

    It computes them once for each grid, on the default device of that moment. After a run on the meta device, as
    :func:`tokenlearner.cost` does one, they would have no values, and every later run would read arbitrary entries.
    """
    kind: Any = BeitRelativePositionBias
    kind.generate_relative_position_index = staticmethod(_index_on_cpu)


_index = inspect.unwrap(BeitRelativePositionBias.generate_relative_position_index)


@compile_compatible_method_lru_cache(maxsize=10)
def _index_on_cpu(window_size: tuple[int, int]) -> Tensor:
    if torch.compiler.is_compiling():
        return _index(window_size)
    with torch.device("cpu"):
        return _index(window_size)


class RefuseMask:
    """Forward pre-hook of a bare vision model: refuses a user's mask over patches, before one of its own is made."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        refuse_masks((), {**dict(zip(names, args)), **kwargs})


class SkipPredictor:
    """Forward pre-hook of V-JEPA 2: leaves its predictor out, which needs a token for each place of the grid."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        given = {**dict(zip(("pixel_values_videos", "context_mask", "target_mask", "skip_predictor"), args)), **kwargs}
        if given.get("context_mask") is not None or given.get("target_mask") is not None:
            raise ValueError(
                "context_mask and target_mask pick places of the grid, and there are learned tokens instead; "
                "call without them, or insert with a fuser"
            )
        if given.get("skip_predictor") is False:
            raise ValueError(
                "V-JEPA 2's predictor needs a token for each place of the grid, and there are learned tokens instead; "
                "call with skip_predictor=True, or insert with a fuser"
            )
        return args[:1], {**kwargs, "skip_predictor": True}


def fused_class(layer_class: type[nn.Module], module: str) -> type[FusedLayer]:
    """The class of ``layer_class``'s fused layers, for ``module`` to keep under its name, where pickle looks for it."""
    return type(f"Fused{layer_class.__name__}", (FusedLayer, layer_class), {"__module__": module, "__doc__": None})


def take_fused_class(layer: nn.Module, classes: dict[type, type[FusedLayer]]) -> None:
    """Gives a fused layer the class of its block's; checkpointing goes over to it, and so to learner and fuser."""
    if isinstance(layer, FusedLayer):
        layer.__class__ = classes[type(layer.block)]
        _move_checkpointing(layer.block, layer)


def return_checkpointing(layer: nn.Module) -> None:
    """Gives a fused layer's block its checkpointing back."""
    if isinstance(layer, FusedLayer):
        _move_checkpointing(layer, layer.block)


def _move_checkpointing(source: nn.Module, target: nn.Module) -> None:
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
        if name in source.__dict__:
            target.__dict__[name] = source.__dict__.pop(name)


def forget_captures(model: nn.Module) -> None:
    """Takes off the hooks by which transformers records outputs; it puts them on again, on the layers of then."""
    for module in model.modules():
        blocks = [module, module.block] if isinstance(module, FusedLayer) else [module]
        for hooks in [block._forward_hooks for block in blocks]:
            for key in [key for key, hook in hooks.items() if _captures(hook)]:
                del hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def _captures(hook: Any) -> bool:
    return str(getattr(hook, "__qualname__", "")).endswith(".output_capturing_hook")


def drop_all(module: nn.Module, *kinds: type) -> None:
    """Removes hooks of several classes."""
    for kind in kinds:
        drop_hooks(module, kind)
