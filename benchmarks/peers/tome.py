"""Token Merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), section 3.

Between attention and MLP of every layer the r most similar pairs of tokens become one each. Departures from the text:
none; where it leaves open how sets A and B alternate beside protected tokens, they alternate over the patches alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenlearner.errors import InputError

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from timm.models import checkpoint
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from peers.hosts import TakenApart, attend, copy_of, queries_keys_values


def tome(model: nn.Module, r: int | Sequence[int]) -> MergingViT:
    """A copy of ``model`` that merges ``r`` pairs of tokens in each layer, or as many as the layer's entry says.

    No more than half of a layer's patches are merged; class and register tokens never are.

    Raises:
        InputError: ``model`` is no host the peers take, ``r`` is negative or has not an entry for every layer.
    """
    host = copy_of(model)
    depth = len(host.blocks)
    per_layer = [r] * depth if isinstance(r, int) else list(r)
    if len(per_layer) != depth or min(per_layer) < 0:
        raise InputError(f"r is a number of pairs from 0 up, or one for each of {depth} layers, not {r!r}")
    return MergingViT(host, per_layer)


class MergingViT(VisionTransformer):
    """``host`` itself, with its parameters, merging ``per_layer`` pairs of tokens in its layers.

    The sizes of the tokens go from layer to layer beside them, so nothing is kept between two calls.
    """

    def __init__(self, host: VisionTransformer, per_layer: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(host.__dict__)
        prefix = self.num_prefix_tokens
        self.blocks = nn.Sequential(*(MergingBlock(b, prefix, r) for b, r in zip(host.blocks, per_layer)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b m d"]:
        """The tokens after the final norm. Where the head takes their mean, each patch token is scaled by its size over
        the mean size, so that the mean is that over all patches (as the paper's MAE models pool).
        """
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        size = None
        for block in self.blocks:
            x, size = checkpoint(block, x, size) if self.grad_checkpointing else block(x, size)
        x = self.norm(x)
        if size is None or self.global_pool == "token":
            return x
        weight = size.clone()
        patches = size[:, self.num_prefix_tokens :]
        weight[:, self.num_prefix_tokens :] = patches / patches.mean(dim=1, keepdim=True)
        return (x * weight[..., None]).to(x.dtype)


class MergingBlock(TakenApart):
    """timm's Block with proportional attention (eq. 1) and ``r`` merges after it."""

    def __init__(self, block: Block, num_prefix_tokens: int, r: int) -> None:
        super().__init__(block, num_prefix_tokens)
        self.r = r

    def forward(
        self, x: Float[Tensor, "b n d"], size: Float[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m"] | None]:
        """Tokens and how many patches each stands for; no sizes while they are all one."""
        normed = self.norm1(x)
        q, k, v = queries_keys_values(self.attn, normed)
        bias = None if size is None else rearrange(size.log(), "b n -> b 1 1 n")
        x = self.add_attention(x, normed, attend(self.attn, q, k, v, bias))
        r = min(self.r, (x.shape[1] - self.num_prefix_tokens) // 2)
        if r:
            slots = bipartite_soft_matching(k.mean(dim=1), r, self.num_prefix_tokens)
            x, size = merged(x, size, slots, x.shape[1] - r)
        return self.add_mlp(x), size

    def extra_repr(self) -> str:
        return f"r={self.r}"


@torch.no_grad()
def bipartite_soft_matching(metric: Float[Tensor, "b n e"], r: int, num_prefix_tokens: int) -> Int[Tensor, "b n"]:
    """Where each of n tokens goes among n − r: prefix tokens first, then what is left of A, then B.

    A is every other patch from the first on, B the rest. Each token of A has one edge, to the token of B whose
    ``metric`` has the highest cosine similarity; along the r best edges A's token goes to where B's is.
    """
    unit = F.normalize(metric[:, num_prefix_tokens:], dim=-1)
    best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
    leaves = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r, dim=1).indices, True)
    first_of_b = num_prefix_tokens + best.shape[1] - r
    slots = torch.arange(metric.shape[1], device=metric.device).repeat(len(metric), 1)
    stays = num_prefix_tokens - 1 + (~leaves).cumsum(dim=1)
    slots[:, num_prefix_tokens::2] = torch.where(leaves, first_of_b + partner, stays)
    slots[:, num_prefix_tokens + 1 :: 2] = torch.arange(first_of_b, metric.shape[1] - r, device=metric.device)
    return slots


def merged(
    x: Float[Tensor, "b n d"], size: Float[Tensor, "b n"] | None, slots: Int[Tensor, "b n"], m: int
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b m"]]:
    """The mean of the tokens that share a slot, weighted by size, and the sum of their sizes."""
    b, n, d = x.shape
    if size is None:
        size = x.new_ones(b, n, dtype=torch.float32)
    rows = (slots + m * torch.arange(b, device=x.device)[:, None]).flatten()
    weighted = (x * size[..., None]).flatten(0, 1)  # rows as a whole: much quicker than an index for every number
    total = size.new_zeros(b * m).index_add(0, rows, size.flatten())
    means = weighted.new_zeros(b * m, d).index_add(0, rows, weighted) / total[:, None]
    return means.to(x.dtype).unflatten(0, (b, m)), total.unflatten(0, (b, m))
