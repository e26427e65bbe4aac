"""What insertion needs to know of timm's ViTs, and in particular of its VisionTransformer."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import nn

from tokenlearner.core.alpha import Grid
from tokenlearner.insertion.layers import Arguments, GridRecord, NoteGrid, drop_hooks, is_compiled, unmasked
from tokenlearner.insertion.spec import Insertion


class TimmHost:
    """What timm's plain ViTs have in common; the classes derived from it are the adapters.

    They keep their layers as ``blocks``, make patches in ``patch_embed`` and end in ``norm``.
    """

    kind: ClassVar[type[nn.Module]]
    """The class of timm that is served, with those derived from it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.dim: int = self.model.embed_dim
        self.num_heads = _num_heads(self.model)
        self.num_prefix_tokens: int = self.model.num_prefix_tokens

    @classmethod
    def fits(cls, model: object) -> bool:
        return isinstance(model, cls.kind)

    def check(self) -> None:
        """Refuses what would come out wrong.

        Raises:
            ValueError: With the reason.
        """
        model = self.model
        if any(is_compiled(m) for m in model.modules()):
            raise ValueError("the model or a block of it is compiled and would not see the insertion; insert first")
        if any(base.__name__ == "FSDPModule" for m in model.modules() for base in type(m).__mro__):
            raise ValueError("the model is sharded, and new parameters would stay unmanaged; insert, then fully_shard")
        patch_drop = getattr(model, "patch_drop", None)
        if patch_drop is not None and not isinstance(patch_drop, nn.Identity):
            raise ValueError(
                "patch_drop_rate drops patches at random, and what is left is no grid to learn tokens from; "
                "create the host with patch_drop_rate=0"
            )
        if not hasattr(self.embedding(), "dynamic_feat_size"):
            raise ValueError(f"the host's {type(self.embedding()).__name__} does not tell the grid of its patches")
        if not len(model.blocks):
            raise ValueError("the host has no layers")

    def embedding(self) -> nn.Module:
        """The module that makes patches of images."""
        return self.model.patch_embed

    def layers(self) -> nn.Sequential | nn.ModuleList:
        return self.model.blocks

    def after_layers(self) -> nn.Module:
        """The module every token passes after the last layer; one that is not in the model where there is none."""
        return self.model.norm

    def grid(self) -> Grid:
        """The (h, w) of the image size the host was built for."""
        *_, h, w = self.model.patch_embed.grid_size
        return h, w

    def slices(self) -> int | None:
        """Slices of the clips the host was built for; None where it takes images."""
        return None

    def watch_grid(self, record: GridRecord) -> None:
        self.embedding().register_forward_hook(NoteGrid(record))

    def unwatch_grid(self) -> None:
        drop_hooks(self.embedding(), NoteGrid)

    def lose_grid(self, first: int, last: int, num_tokens: int) -> None:
        """Nothing to do: what these layers know of places they are handed with every call."""

    def regain_grid(self) -> None:
        pass

    without_grid: Callable[[tuple[Any, ...], dict[str, Any]], Arguments] = staticmethod(unmasked)

    def new_identity_layer(self, index: int) -> nn.Module:
        """A fresh layer like the host's last, with its residual branches scaled by zero.

        Raises:
            ValueError: The block is of a kind whose branches we can't find, or a layer more has nothing to be handed.
        """
        layer = copy.deepcopy(self.model.blocks[-1]).requires_grad_()  # a frozen host's new layers are to train
        self._initialize(layer, index)
        _zero_residual_branches(layer)
        _assert_identity(layer, self.dim, self._tokens_to_try())
        return layer

    def append_layers(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            if self.model.feature_info:
                last = self.model.feature_info[-1]
                self.model.feature_info.append({**last, "module": f"blocks.{len(self.model.blocks)}"})
            self.model.blocks.append(layer)

    def truncate_layers(self, depth: int) -> None:
        while len(self.model.blocks) > depth:
            del self.model.blocks[-1]
        del self.model.feature_info[depth:]

    def guard_intermediates(self, spec: Insertion) -> None:
        """Makes ``forward_intermediates`` say why it has no grid after the insertion.

        A partial of a module-level function, because it survives deepcopy and pickle with the copied model in it.
        """
        names = tuple(inspect.signature(type(self.model).forward_intermediates).parameters)[2:]  # without self and x
        guarded = functools.partial(_forward_intermediates, self.model, spec, names)
        self.model.__dict__["forward_intermediates"] = guarded

    def unguard_intermediates(self) -> None:
        self.model.__dict__.pop("forward_intermediates", None)

    def _initialize(self, layer: nn.Module, index: int) -> None:
        """Gives a layer new weights, as the host would give its layer ``index``."""
        mode = getattr(self.model, "weight_init_mode", "")
        named_apply(
            get_init_weights_vit(mode if mode != "skip" else ""), layer, name=f"blocks.{index}", include_root=True
        )

    def _tokens_to_try(self) -> int:
        """A number of tokens that a new layer takes."""
        return 4


class TimmViT(TimmHost):
    """Adapter for timm's ``VisionTransformer`` and the classes derived from it (distilled DeiT, our ViViT)."""

    kind = VisionTransformer

    def slices(self) -> int | None:
        """Slices of the clips the host was built for; None where it takes images."""
        grid = self.model.patch_embed.grid_size
        return grid[0] if grid is not None and len(grid) == 3 else None

    def _initialize(self, layer: nn.Module, index: int) -> None:
        super()._initialize(layer, index)
        for attention in layer.modules():
            start_by_depth = getattr(attention, "set_lambda_init", None)  # differential attention
            if callable(start_by_depth):
                start_by_depth(index)


def _forward_intermediates(
    model: Any, spec: Insertion, names: tuple[str, ...], x: Any, *args: Any, **kwargs: Any
) -> Any:
    original = type(model).forward_intermediates
    given = {**dict(zip(names, args)), **kwargs}
    indices = given.get("indices")
    norm = given.get("norm", False)
    depth = len(model.blocks)
    taken = range(depth) if indices is None else range(depth - indices, depth) if isinstance(indices, int) else indices
    late = sorted({i % depth for i in taken if i % depth >= spec.at})
    if norm and spec.at == depth:
        raise ValueError("forward_intermediates: norm=True would learn tokens from every intermediate; use norm=False")
    if late and given.get("output_fmt", "NCHW") != "NLC":
        raise ValueError(
            f"forward_intermediates: layers {', '.join(map(str, late))} run on {spec.tokens} learned tokens, which "
            f"have no height and width; take layers before {spec.at}, use output_fmt='NLC', or insert with a fuser"
        )
    return original(model, x, *args, **kwargs)


def _num_heads(model: Any) -> int:
    for module in model.blocks.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int):
            return heads
    return 1


# The last linear layer of each residual branch, in every block class of timm's vision_transformer.py.
_BRANCH_ENDS = ("attn.proj", "mlp.fc2", "attn_out_proj", "mlp_out_proj", "out_proj")
_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm", "ResPostRelPosBlock")  # their branches end in a norm


def _zero_residual_branches(layer: nn.Module) -> None:
    named = dict(layer.named_modules())
    scales = [m.gamma for m in named.values() if isinstance(getattr(m, "gamma", None), nn.Parameter)]
    own = [getattr(layer, name, None) for name in ("gamma_1", "gamma_2")]
    if type(layer).__name__ in _POST_NORM:
        ends = [named["norm1"], named["norm2"]]
    elif any(scale is not None for scale in own):  # EVA's and BEiT's blocks keep their scales themselves, or one of two
        scales = [scale for scale in own if scale is not None]
        ends = [named[end] for scale, end in zip(own, _BRANCH_ENDS) if scale is None]
    else:
        ends = [] if scales else [m for name, m in named.items() if name.endswith(_BRANCH_ENDS)]
    with torch.no_grad():
        for scale in scales:
            scale.zero_()
        for end in ends:
            for parameter in end.parameters(recurse=False):
                parameter.zero_()


def _assert_identity(layer: nn.Module, dim: int, tokens: int) -> None:
    parameter = next(layer.parameters())
    if parameter.is_meta:
        return
    x = torch.linspace(-1, 1, tokens * dim, device=parameter.device, dtype=parameter.dtype).reshape(1, tokens, dim)
    mode = layer.training
    layer.eval()
    with torch.no_grad():
        unchanged = torch.equal(layer(x), x)
    layer.train(mode)
    if not unchanged:
        raise ValueError(
            f"extra_layers: can't tell which layers end the residual branches of {type(layer).__name__}, "
            "so new ones can't start as the identity; use extra_layers=0"
        )
