"""Pruning by attention (Liang et al., "Not All Patches Are What You Need", ICLR 2022: EViT), section 3.

Between attention and MLP of given layers only the patches that the class token attends to most go on; fused, the
others become one token more.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenlearner.errors import InputError

import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from peers.hosts import TakenApart, attend, attention_weights, check_layer, copy_of, queries_keys_values


def prune(model: nn.Module, keep: Mapping[int, int], *, fuse: bool = False) -> VisionTransformer:
    """A copy of ``model`` that keeps, in each layer of ``keep``, its so many tokens with the highest attention.

    A token's attention is what the class token pays it, in the mean over heads. A host without a class token takes
    what all tokens pay it in the mean, which is ours: EViT has a class token. The kept stay in order.

    Args:
        keep: Layer → tokens kept; a layer that has no more than that keeps all. Prefix tokens are kept beside them.
        fuse: Adds the rest as one token, the sum of theirs weighted by attention (eq. 3). A later layer counts it
            among its tokens.

    Raises:
        InputError: ``model`` is no host the peers take, a layer is not there or is to keep nothing.
    """
    host = copy_of(model)
    for layer, count in keep.items():
        check_layer(host, layer)
        if count < 1:
            raise InputError(f"layer {layer} has to keep at least 1 token, not {count}")
        host.blocks[layer] = PruningBlock(
            host.blocks[layer], host.num_prefix_tokens, host.cls_token is not None, count, fuse
        )
    return host


class PruningBlock(TakenApart):
    """timm's Block that hands on ``count`` of its tokens, plus prefix tokens and the fused one."""

    def __init__(self, block: Block, num_prefix_tokens: int, class_token: bool, count: int, fuse: bool) -> None:
        super().__init__(block, num_prefix_tokens)
        self.class_token = class_token
        self.count = count
        self.fuse = fuse

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        normed = self.norm1(x)
        q, k, v = queries_keys_values(self.attn, normed)
        if x.shape[1] - self.num_prefix_tokens <= self.count:
            return self.add_mlp(self.add_attention(x, normed, attend(self.attn, q, k, v)))
        if self.class_token:
            weights, heads = attention_weights(self.attn, q[:, :, :1], k), attend(self.attn, q, k, v)
        else:  # all rows are needed, so the fused attention would compute them a second time
            weights = attention_weights(self.attn, q, k)
            heads = self.attn.attn_drop(weights) @ v
        attention = weights.mean(dim=(1, 2))[:, self.num_prefix_tokens :]
        x = self.add_attention(x, normed, heads)
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept, rest = highest(attention, self.count)
        parts = [prefix, rows_of(patches, kept)]
        if self.fuse:
            parts.append((attention * rest).to(x.dtype)[:, None] @ patches)
        return self.add_mlp(torch.cat(parts, dim=1))

    def extra_repr(self) -> str:
        return f"count={self.count}, fuse={self.fuse}"


@torch.no_grad()
def highest(attention: Float[Tensor, "b n"], count: int) -> tuple[Int[Tensor, "b k"], Bool[Tensor, "b n"]]:
    """The indices of the ``count`` highest, ascending, and a mask of the others."""
    kept = attention.topk(count, dim=1).indices.sort(dim=1).values
    return kept, torch.ones_like(attention, dtype=torch.bool).scatter(1, kept, False)


def rows_of(x: Float[Tensor, "b n d"], indices: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    b, n, _ = x.shape
    rows = indices + n * torch.arange(b, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (b, -1))
