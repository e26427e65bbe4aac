"""PatchMerger (Renggli et al., "Learning to Merge Tokens in Vision Transformers", 2022): the nearest relative of
TokenLearner v1.1, with one linear map for its MLP, and tokens that are sums of the normed features.
"""

from __future__ import annotations

from typing import Any

from tokenlearner.errors import InputError
from tokenlearner.insertion.layers import join_prefix, split_prefix

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from peers.hosts import check_layer, copy_of


class PatchMerger(nn.Module):
    """Y = softmax(W Xᵀ) X with a learned W of (tokens, d), X after LayerNorm, softmax over the patches."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.queries = nn.Parameter(torch.empty(num_tokens, dim))
        nn.init.normal_(self.queries, std=dim**-0.5)  # logits of about one: X has a length of √d

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        X = self.norm(x)
        return torch.softmax(self.queries @ X.transpose(1, 2), dim=-1) @ X

    def extra_repr(self) -> str:
        return f"num_tokens={len(self.queries)}"


class MergePatches:
    """Forward pre-hook: the patches entering ``module`` go through its ``patch_merger``; prefix tokens go around."""

    def __init__(self, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        prefix, X = split_prefix(args[0], self.num_prefix_tokens)
        return (join_prefix(prefix, module.patch_merger(X)), *args[1:])


def merge_patches(model: nn.Module, num_tokens: int = 8, at: int | None = None) -> VisionTransformer:
    """A copy of ``model`` with an untrained PatchMerger before layer ``at``, in the middle when None (the paper's).

    Raises:
        InputError: ``model`` is no host the peers take, or has no such layer, or no token is to be left.
    """
    host = copy_of(model)
    at = len(host.blocks) // 2 if at is None else at
    check_layer(host, at)
    if num_tokens < 1:
        raise InputError(f"num_tokens has to be 1 or more, not {num_tokens}")
    block = host.blocks[at]
    block.patch_merger = PatchMerger(host.embed_dim, num_tokens).to(next(block.parameters()))
    block.register_forward_pre_hook(MergePatches(host.num_prefix_tokens))
    return host
