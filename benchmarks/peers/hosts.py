"""The hosts all peers take, and timm's attention in the steps that merging and pruning look into."""

from __future__ import annotations

import copy
from typing import Any

from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insertion_of

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


def copy_of(model: nn.Module) -> VisionTransformer:
    """A copy of a plain ViT, to be changed; raises what :func:`check_host` does."""
    check_host(model)
    return copy.deepcopy(model)


def check_host(model: nn.Module) -> None:
    """Refuses what the peers don't take.

    Raises:
        InputError: It is no VisionTransformer of timm with timm's plain layers, pools otherwise than by its class token
            or the mean of its patches, drops patches already, or has a TokenLearner.
    """
    name = type(model).__name__
    if type(model) is not VisionTransformer:
        raise InputError(f"the peers take a VisionTransformer of timm, not {name}")
    if insertion_of(model):
        raise InputError("the model has a TokenLearner already; give the host it was inserted into")
    if any(type(block) is not Block or type(block.attn) is not Attention for block in model.blocks):
        raise InputError("the peers take a ViT whose layers are timm's Block with Attention; these are others")
    if model.attn_pool is not None or model.pool_include_prefix or model.global_pool not in ("token", "avg"):
        raise InputError("the peers take a ViT that pools by its class token or the mean of its patches")
    if not isinstance(model.patch_drop, nn.Identity):
        raise InputError("the host drops patches at random; create it with patch_drop_rate=0")


def check_layer(model: VisionTransformer, layer: int) -> None:
    if not 0 <= layer < len(model.blocks):
        raise InputError(f"the host has layers 0 to {len(model.blocks) - 1}, and no layer {layer}")


class TakenApart(nn.Module):
    """Holds the children of a timm Block under their own names, so that its keys stay; subclasses are its forward."""

    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    def __init__(self, block: Block, num_prefix_tokens: int) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.num_prefix_tokens = num_prefix_tokens
        self.training = block.training

    def add_attention(self, x: Float[Tensor, "b n d"], normed: Tensor, heads: Float[Tensor, "b h n e"]) -> Tensor:
        """x and the attention branch of Block, whose values ``heads`` are of ``normed``."""
        attn = self.attn
        y = attn.norm(rearrange(heads, "b h n e -> b n (h e)"))
        if attn.gate is not None:
            y = y * attn.gate(normed).sigmoid()
        return x + self.drop_path1(self.ls1(attn.proj_drop(attn.proj(y))))

    def add_mlp(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def queries_keys_values(attn: Attention, x: Float[Tensor, "b n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Each (b, heads, n, head width), as attention uses them."""
    q, k, v = rearrange(attn.qkv(x), "b n (three h e) -> three b h n e", three=3, h=attn.num_heads)
    return attn.q_norm(q), attn.k_norm(k), v


def attend(
    attn: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Float[Tensor, "b 1 1 n"] | None = None
) -> Float[Tensor, "b h n e"]:
    """Attention with ``bias`` added to its logits, fused where the module's own is."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.attn_drop(attention_weights(attn, q, k, bias)) @ v


def attention_weights(
    attn: Attention, q: Float[Tensor, "b h m e"], k: Float[Tensor, "b h n e"], bias: Tensor | None = None
) -> Float[Tensor, "b h m n"]:
    logits = (q * attn.scale) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias.to(logits.dtype)).softmax(dim=-1)
