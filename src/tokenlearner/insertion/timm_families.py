"""What insertion needs to know of timm's ViTs that are no VisionTransformer.

What they add is knowledge of places in their layers, which a learned token has none of: rotary embeddings come with
every call and are left out, relative position biases are kept in the layers or come with the call, and are zero between
learned tokens.
"""

from __future__ import annotations

import functools
import math
from typing import Any, ClassVar

import torch
from timm.layers import RelPosMlp
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from tokenlearner.core.alpha import Grid
from tokenlearner.insertion.layers import Arguments, GridRecord, NoteGrid, refuse_masks
from tokenlearner.insertion.timm import TimmHost


class TimmEva(TimmHost):
    """Adapter for timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary embeddings."""

    kind = Eva

    @staticmethod
    def without_grid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Leaves the rotation out: learned tokens have no place, and timm does not rotate prefix tokens either."""
        if len(args) > 1:
            args = (args[0], None, *args[2:])
        if "rope" in kwargs:
            kwargs = {**kwargs, "rope": None}
        refuse_masks(args[1:], kwargs)
        return args, kwargs

    def new_identity_layer(self, index: int) -> nn.Module:
        _refuse_mixed(getattr(self.model, "rope_mixed", False))
        return super().new_identity_layer(index)

    def _initialize(self, layer: nn.Module, index: int) -> None:
        layer.apply(self.model._init_weights)
        _scale_by_depth(layer, index)


class TimmBeit(TimmHost):
    """Adapter for timm's ``Beit``: BEiT, BEiT v2.

    Between learned tokens there is no relative position bias. That of the class token with patches is the same for all
    of them, and stays for learned tokens.
    """

    kind: ClassVar[type[nn.Module]] = Beit
    shared_bias = "shared_rel_pos_bias"  # under which name a layer is handed the bias that all layers share

    def lose_grid(self, first: int, last: int, num_tokens: int) -> None:
        # An entry of the instance, found before the method of the class; see guard_intermediates for why a partial.
        for layer in self.model.blocks[first:last]:
            attention = layer.attn
            if attention.relative_position_bias_table is not None:
                vars(attention)["_get_rel_pos_bias"] = functools.partial(_table_bias, attention, 1, num_tokens)
        self.__dict__["without_grid"] = functools.partial(
            _without_shared_bias, self.shared_bias, self.num_prefix_tokens, num_tokens
        )

    def regain_grid(self) -> None:
        for layer in self.model.blocks:
            vars(layer.attn).pop("_get_rel_pos_bias", None)

    def _initialize(self, layer: nn.Module, index: int) -> None:
        layer.apply(self.model._init_weights)
        _scale_by_depth(layer, index)

    def _tokens_to_try(self) -> int:
        return self.num_prefix_tokens + math.prod(self.grid())  # a layer with its own bias takes no other number


class TimmRelPos(TimmBeit):
    """Adapter for timm's ``VisionTransformerRelPos``; as for BEiT there is no bias between learned tokens."""

    kind = VisionTransformerRelPos
    shared_bias = "shared_rel_pos"

    def lose_grid(self, first: int, last: int, num_tokens: int) -> None:
        for layer in self.model.blocks[first:last]:
            bias = layer.attn.rel_pos
            if bias is not None:
                compute = _mlp_bias if isinstance(bias, RelPosMlp) else _table_bias
                vars(bias)["get_bias"] = functools.partial(compute, bias, self.num_prefix_tokens, num_tokens)
        self.__dict__["without_grid"] = functools.partial(
            _without_shared_bias, self.shared_bias, self.num_prefix_tokens, num_tokens
        )

    def regain_grid(self) -> None:
        for layer in self.model.blocks:
            if layer.attn.rel_pos is not None:
                vars(layer.attn.rel_pos).pop("get_bias", None)

    def _initialize(self, layer: nn.Module, index: int) -> None:
        TimmHost._initialize(self, layer, index)
        if self.model.fix_init:
            _scale_by_depth(layer, index)


class TimmNaFlex(TimmHost):
    """Adapter for timm's ``NaFlexVit``, for images of any one size at a time.

    Batches of patches with their coordinates are refused when they come: their images differ in size and are padded.
    """

    kind = NaFlexVit

    def embedding(self) -> nn.Module:
        return self.model.embeds

    def grid(self) -> Grid:
        """The (h, w) of the image size the host was built for: that of its pretrained weights, if none was given."""
        embeds = self.model.embeds
        size = embeds.default_img_size or (getattr(self.model, "_traits", None) or {}).get("img_size")
        size = size or ((getattr(self.model, "pretrained_cfg", None) or {}).get("input_size") or (0, 0))[-2:]
        if not all(size):
            raise ValueError("kind 'dense' needs to know the grid: create the host with img_size")
        return embeds.dynamic_feat_size(tuple(size))

    def watch_grid(self, record: GridRecord) -> None:
        self.embedding().register_forward_hook(NoteNaFlexGrid(record))

    @staticmethod
    def without_grid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Leaves the rotation out; masks are refused."""
        if "rope" in kwargs:
            kwargs = {**kwargs, "rope": None}
        refuse_masks(args[1:], kwargs)
        return args, kwargs

    def new_identity_layer(self, index: int) -> nn.Module:
        _refuse_mixed(self.model.rope_is_mixed)
        return super().new_identity_layer(index)

    def _initialize(self, layer: nn.Module, index: int) -> None:
        super()._initialize(layer, index)
        if self.model.fix_init:
            _scale_by_depth(layer, index)


class TimmCait(TimmHost):
    """Adapter for timm's ``Cait``, whose class token joins after the last layer that has patches."""

    kind = Cait

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.num_prefix_tokens = 0

    def after_layers(self) -> nn.Module:
        return nn.Identity()  # class attention follows, whose layers are each handed the patches

    def _initialize(self, layer: nn.Module, index: int) -> None:
        layer.apply(self.model._init_weights)


class NoteNaFlexGrid(NoteGrid):
    """Forward hook of a NaFlex embedding: notes the grid it returns with its tokens."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _, grid = output
        if grid is None:
            raise ValueError(
                "the batch is one of patches with coordinates, whose images may differ in size and be padded, so it "
                "has no grid to learn tokens from; give images (b, c, h, w) of one size"
            )
        self.record.note((grid[0], grid[1]))


def _refuse_mixed(mixed: bool) -> None:
    if mixed:
        raise ValueError(
            "extra_layers: the host's rotary embedding has learned one rotation for each of its layers and none for "
            "more; use extra_layers=0"
        )


def _without_shared_bias(
    name: str, prefix: int, num_tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Arguments:
    """:meth:`Host.without_grid` of layers that are handed a bias (…, prefix + n, prefix + n) under ``name``."""
    if len(args) > 1 and args[1] is not None:
        args = (args[0], _bias_of_tokens(args[1], prefix, num_tokens), *args[2:])
    if kwargs.get(name) is not None:
        kwargs = {**kwargs, name: _bias_of_tokens(kwargs[name], prefix, num_tokens)}
    return args, kwargs


def _bias_of_tokens(bias: Tensor, prefix: int, num_tokens: int) -> Tensor:
    """(…, p + n, p + n) → (…, p + s, p + s): what prefix tokens have with each other and with any patch, else zero."""
    nothing = bias.new_zeros(*bias.shape[:-2], num_tokens, num_tokens)
    if not prefix:
        return nothing
    own, to_patch, of_patch = bias[..., :prefix, :prefix], bias[..., :prefix, prefix:], bias[..., prefix:, :prefix]
    to_token = to_patch[..., :1].expand(*to_patch.shape[:-1], num_tokens)
    of_token = of_patch[..., :1, :].expand(*of_patch.shape[:-2], num_tokens, prefix)
    return torch.cat([torch.cat([own, to_token], dim=-1), torch.cat([of_token, nothing], dim=-1)], dim=-2)


def _table_bias(holder: Any, prefix: int, num_tokens: int) -> Tensor:
    """The (1, heads, p + s, p + s) bias of learned tokens by a table that ends in the class token's three rows."""
    table = holder.relative_position_bias_table
    if not prefix:
        return table.new_zeros(1, table.shape[1], num_tokens, num_tokens)
    to_patch, of_patch, own = table[-3:].unsqueeze(-1).unbind(0)  # (heads, 1) each, in timm's order
    rows = torch.stack([torch.cat([own, to_patch], -1), torch.cat([of_patch, torch.zeros_like(own)], -1)], dim=-2)
    return _bias_of_tokens(rows, 1, num_tokens).unsqueeze(0)


def _mlp_bias(holder: Any, prefix: int, num_tokens: int) -> Tensor:
    """The (1, heads, p + s, p + s) bias of learned tokens by an MLP over distances: it has none for prefix tokens."""
    total = prefix + num_tokens
    return holder.mlp.fc1.weight.new_zeros(1, holder.num_heads, total, total)


def _scale_by_depth(layer: nn.Module, index: int) -> None:
    """timm's scale of a new layer's branches: smaller, the deeper it is."""
    named = dict(layer.named_modules())
    with torch.no_grad():
        for name in ("attn.proj", "mlp.fc2"):
            if isinstance(named.get(name), nn.Linear):
                named[name].weight.div_(math.sqrt(2.0 * (index + 1)))
