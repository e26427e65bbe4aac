"""Vector attention, the "Vector Transformer" of arXiv 2106.11297, section 3: weights are vectors over channels.

Pairwise self-attention of Zhao, Jia and Koltun (CVPR 2020): every pair of tokens gets one weight per channel instead
of one for all of them, ``y_i = Σ_j softmax_j(MLP(q_i − k_j)) ⊙ v_j``, n × n × d weights. Two things make that
affordable. The relation is narrow, as theirs: it has ``relation_dim`` channels, and ``num_weights`` weights come out of
it, each shared by d / num_weights neighbouring channels. And only a few queries' pairs exist at a time: queries go in
chunks, and the backward pass computes a chunk again instead of keeping it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenlearner.core._numerics import positive_int

_NUMBERS_AT_A_TIME = 2**23  # in the widest tensor of a chunk: 32 MB in float32


class VectorAttention(nn.Module):
    """Self-attention whose weights are vectors over channels. (b, n, d) → (b, n, d).

    No position encoding, no output projection, no residual: as the space-time attention it stands beside in the
    paper's tables 11 and 12. The relation MLP is ReLU, linear, ReLU, linear, as in Zhao et al. but without their
    BatchNorm; the first ReLU is not idle, since without it the first layer would be one of queries and keys alone.

    The defaults fit the cost the paper prints for its module, see :func:`tokenlearner.models.bottleneck.module_rows`.
    In one forward pass, per clip of n tokens, multiply-adds are n·d·(2·relation_dim + d) for the projections,
    n²·hidden_dim·(relation_dim + num_weights) for the MLP and n²·d for the weighted sum; a counter of matrix products
    sees all of these. What it does not see is elementwise: n²·(2·relation_dim + hidden_dim + 5·num_weights) operations
    for the differences, ReLUs and softmax; :meth:`elementwise_flops` gives it.

    Args:
        dim: Channels d.
        relation_dim: Channels of queries and keys, and so of their relation.
        num_weights: Weights per pair of tokens; must divide dim. ``num_weights=dim`` shares none.
        hidden_dim: Width of the relation MLP; as many as weights when None.
        chunk: Queries handled at a time; by default as many as keep a chunk's largest tensor at 8 million numbers.
            It changes memory and speed, not the result.

    Raises:
        ValueError: A size that is no positive whole number, or weights that don't divide the channels.
    """

    def __init__(
        self,
        dim: int,
        *,
        relation_dim: int = 128,
        num_weights: int = 24,
        hidden_dim: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim = positive_int("dim", dim)
        self.relation_dim = relation_dim = positive_int("relation_dim", relation_dim)
        self.num_weights = num_weights = positive_int("num_weights", num_weights)
        self.chunk = None if chunk is None else positive_int("chunk", chunk)
        if dim % num_weights:
            raise ValueError(f"num_weights must divide dim, and {num_weights} does not divide {dim}")
        self.hidden_dim = num_weights if hidden_dim is None else positive_int("hidden_dim", hidden_dim)
        self.q = nn.Linear(dim, relation_dim, bias=False)
        self.k = nn.Linear(dim, relation_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.fc1 = nn.Linear(relation_dim, self.hidden_dim)
        self.fc2 = nn.Linear(self.hidden_dim, num_weights, bias=False)  # the softmax would cancel a bias

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"VectorAttention takes (b, n, {self.dim}), and got shape {tuple(x.shape)}")
        q, k = self.q(x), self.k(x)
        v = rearrange(self.v(x), "b n (g c) -> b g n c", g=self.num_weights)
        step = self.chunk or self._queries_at_a_time(*x.shape[:2])
        if step >= x.shape[1]:
            return self._attend(q, k, v)
        if not (torch.is_grad_enabled() and (q.requires_grad or v.requires_grad)):
            return torch.cat([self._attend(part, k, v) for part in q.split(step, dim=1)], dim=1)
        parts = [
            checkpoint(self._attend, part, k, v, use_reentrant=False, preserve_rng_state=False)
            for part in q.split(step, dim=1)
        ]
        return torch.cat(parts, dim=1)

    def elementwise_flops(self, num_tokens: int) -> int:
        """Operations of one forward pass on ``num_tokens`` tokens that no matrix product does; softmax counts five."""
        return num_tokens**2 * (2 * self.relation_dim + self.hidden_dim + 5 * self.num_weights)

    def _queries_at_a_time(self, batch: int, num_tokens: int) -> int:
        if torch.compiler.is_exporting():
            batch = 8  # a number of chunks that depends on the batch would fix the batch
        widest = max(self.relation_dim, self.hidden_dim, self.num_weights)
        return max(1, _NUMBERS_AT_A_TIME // max(1, batch * num_tokens * widest))

    def _attend(
        self, q: Float[Tensor, "b i r"], k: Float[Tensor, "b j r"], v: Float[Tensor, "b g j c"]
    ) -> Float[Tensor, "b i d"]:
        """The queries' outputs; all pairs of these queries and all keys exist here at once."""
        relation = F.relu(q[:, :, None] - k[:, None])
        A = self.fc2(F.relu(self.fc1(relation))).softmax(dim=2)
        Y = torch.einsum("b i j g, b g j c -> b g i c", A.to(v.dtype), v)
        return rearrange(Y, "b g i c -> b i (g c)")

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, relation_dim={self.relation_dim}, num_weights={self.num_weights}, "
            f"hidden_dim={self.hidden_dim}"
        )
