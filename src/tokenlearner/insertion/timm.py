"""What insertion needs to know of timm's VisionTransformer, and the reasons some of them can't be hosts."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from timm.models import named_apply
from timm.models.vision_transformer import VisionTransformer, get_init_weights_vit
from torch import nn

from tokenlearner.core.alpha import Grid
from tokenlearner.insertion.layers import GridRecord, NoteGrid, drop_hooks
from tokenlearner.insertion.spec import Insertion


class TimmViT:
    """Adapter for timm's ``VisionTransformer`` and the classes derived from it (distilled DeiT, our ViViT)."""

    def __init__(self, model: nn.Module) -> None:
        assert isinstance(model, VisionTransformer)
        self.model = model
        self.dim = model.embed_dim
        self.num_heads = _num_heads(model)
        self.num_prefix_tokens: int = model.num_prefix_tokens

    @staticmethod
    def fits(model: object) -> bool:
        return isinstance(model, VisionTransformer)

    @staticmethod
    def why_not(model: object) -> str:
        name = type(model).__name__
        if hasattr(model, "_orig_mod"):
            return (
                "the model is compiled, and a compiled model would not see the insertion; insert first, compile after"
            )
        if isinstance(model, torch.jit.ScriptModule):
            return "a TorchScript model can't be changed; insert into the eager model"
        inner = getattr(model, "module", None)
        if isinstance(inner, VisionTransformer):
            return f"insert into the model itself ({name}.module) before wrapping it in {name}"
        return f"insert() takes a timm VisionTransformer as host, and {name} is none"

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
        if not isinstance(model.patch_drop, nn.Identity):
            raise ValueError(
                "patch_drop_rate drops patches at random, and what is left is no grid to learn tokens from; "
                "create the host with patch_drop_rate=0"
            )
        if not hasattr(model.patch_embed, "dynamic_feat_size"):
            raise ValueError(f"the host's {type(model.patch_embed).__name__} does not tell the grid of its patches")
        if not len(model.blocks):
            raise ValueError("the host has no layers")

    def layers(self) -> nn.Sequential:
        return self.model.blocks

    def after_layers(self) -> nn.Module:
        """The module every token passes after the last layer."""
        return self.model.norm

    def grid(self) -> Grid:
        """The (h, w) of the image size the host was built for."""
        *_, h, w = self.model.patch_embed.grid_size
        return h, w

    def slices(self) -> int | None:
        """Slices of the clips the host was built for; None where it takes images."""
        grid = self.model.patch_embed.grid_size
        return grid[0] if grid is not None and len(grid) == 3 else None

    def watch_grid(self, record: GridRecord) -> None:
        self.model.patch_embed.register_forward_hook(NoteGrid(record))

    def unwatch_grid(self) -> None:
        drop_hooks(self.model.patch_embed, NoteGrid)

    def new_identity_layer(self, index: int) -> nn.Module:
        """A fresh layer like the host's last, with its residual branches scaled by zero.

        Raises:
            ValueError: The block is of a kind whose branches we can't find.
        """
        layer = copy.deepcopy(self.model.blocks[-1]).requires_grad_()  # a frozen host's new layers are to train
        mode = getattr(self.model, "weight_init_mode", "")
        named_apply(
            get_init_weights_vit(mode if mode != "skip" else ""), layer, name=f"blocks.{index}", include_root=True
        )
        for attention in layer.modules():
            start_by_depth = getattr(attention, "set_lambda_init", None)  # differential attention
            if callable(start_by_depth):
                start_by_depth(index)
        _zero_residual_branches(layer)
        _assert_identity(layer, self.dim)
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
        self.model.__dict__["forward_intermediates"] = functools.partial(_forward_intermediates, self.model, spec)

    def unguard_intermediates(self) -> None:
        self.model.__dict__.pop("forward_intermediates", None)


def _forward_intermediates(model: VisionTransformer, spec: Insertion, x: Any, *args: Any, **kwargs: Any) -> Any:
    original = type(model).forward_intermediates
    indices = args[0] if args else kwargs.get("indices")
    output_fmt = args[4] if len(args) > 4 else kwargs.get("output_fmt", "NCHW")
    norm = args[2] if len(args) > 2 else kwargs.get("norm", False)
    depth = len(model.blocks)
    taken = range(depth) if indices is None else range(depth - indices, depth) if isinstance(indices, int) else indices
    late = sorted({i % depth for i in taken if i % depth >= spec.at})
    if norm and spec.at == depth:
        raise ValueError("forward_intermediates: norm=True would learn tokens from every intermediate; use norm=False")
    if late and output_fmt != "NLC":
        raise ValueError(
            f"forward_intermediates: layers {', '.join(map(str, late))} run on {spec.num_tokens} learned tokens, which "
            f"have no height and width; take layers before {spec.at}, use output_fmt='NLC', or insert with a fuser"
        )
    return original(model, x, *args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called or ``module`` is what ``torch.compile`` returned."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


def _num_heads(model: VisionTransformer) -> int:
    for module in model.blocks.modules():
        heads = getattr(module, "num_heads", None)
        if isinstance(heads, int):
            return heads
    return 1


# The last linear layer of each residual branch, in every block class of timm's vision_transformer.py.
_BRANCH_ENDS = ("attn.proj", "mlp.fc2", "attn_out_proj", "mlp_out_proj", "out_proj")


def _zero_residual_branches(layer: nn.Module) -> None:
    named = dict(layer.named_modules())
    scales = [m.gamma for m in named.values() if isinstance(getattr(m, "gamma", None), nn.Parameter)]
    if type(layer).__name__ == "ResPostBlock":  # its branches end in a LayerNorm
        ends = [named["norm1"], named["norm2"]]
    else:
        ends = [m for name, m in named.items() if name.endswith(_BRANCH_ENDS)]
    with torch.no_grad():
        if scales:
            for scale in scales:
                scale.zero_()
            return
        for end in ends:
            for parameter in end.parameters(recurse=False):
                parameter.zero_()


def _assert_identity(layer: nn.Module, dim: int) -> None:
    parameter = next(layer.parameters())
    if parameter.is_meta:
        return
    x = torch.linspace(-1, 1, 4 * dim, device=parameter.device, dtype=parameter.dtype).reshape(1, 4, dim)
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
