"""TokenLearner: S tokens learned from a feature map (arXiv 2106.11297, section 2).

The whole idea is one line, ``z_i = ρ(X ⊙ γ(α_i(X)))``: an attention map α_i per token says how much each position
counts, and spatial pooling ρ sums the positions up. Because γ only broadcasts over channels, the product and the sum
are one matrix product ``Z = A X`` with ``A`` of shape (s, n), and no (b, s, n, d) tensor is ever made.

Where the paper's text and the authors' code differ we follow the code: α's convolutions are full, not per channel,
v1.0 sums over space (the mean is an option), LayerNorm has ε = 1e-6 and GELU is the tanh approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import full_precision, positive_int
from tokenlearner.core.alpha import (
    Conv1Alpha,
    ConvAlpha,
    DenseAlpha,
    GateAlpha,
    Grid,
    GridAlpha,
    MlpAlpha,
    first_outputs,
)

Kind = Literal["conv", "mlp", "conv1", "gate", "grid", "dense", "average"]
Pool = Literal["sum", "mean", "softmax"]

KINDS: tuple[str, ...] = get_args(Kind)

# How each α form pools; the first entry is the paper's. "softmax" is a weighted sum with weights that sum to one.
_POOLS: dict[str, tuple[Pool, ...]] = {
    "conv": ("sum", "mean"),
    "mlp": ("softmax",),
    "conv1": ("mean", "sum"),
    "gate": ("mean", "sum"),
    "grid": ("mean",),
    "dense": ("sum",),
    "average": ("mean",),
}


class TokenLearner(nn.Module):
    """Turns a feature map into ``num_tokens`` learned tokens.

    Input ``(b, h, w, d)``, or ``(b, n, d)`` with ``grid=(h, w)`` given here or to :meth:`forward`; h and w are never
    guessed from n, since 9·16 = 12². Output ``(b, s, d)``.

    Args:
        dim: Channels d of the feature map.
        num_tokens: Tokens S learned per feature map.
        kind: The form of α. ``"mlp"`` (v1.1, recommended by the authors): LayerNorm, MLP d→hidden→S, softmax over
            space. ``"conv"`` (v1.0, the paper's experiments): LayerNorm, four 3×3 convolutions, sigmoid.
            ``"conv1"``: one 3×3 convolution, sigmoid. ``"gate"``: max and mean over channels, 7×7 convolution,
            BatchNorm, sigmoid. The ablation's alternatives: ``"grid"`` (mean over S fixed cells), ``"dense"``
            (``Z = W X`` with one learned W for all inputs), ``"average"`` (global mean, then a linear layer d→S·d).
        grid: (h, w) of the feature map, for ``(b, n, d)`` inputs; ``"dense"`` needs it to size W.
        pool: ρ for the sigmoid forms, ``"sum"`` or ``"mean"``; the paper's choice for the form when None.
        hidden_dim: Width of the ``"mlp"`` form's hidden layer.
        dropout: Dropout in the ``"mlp"`` form, after each of its two layers.

    Raises:
        ValueError: A size, kind or pooling that does not fit, here or in a call.
    """

    used_tokens: int | None = None
    """How many of the ``num_tokens`` tokens, the first ones, are learned: :func:`tokenlearner.set_num_tokens` sets it.
    None for all."""

    _kernel: Callable[[TokenLearner, Tensor], Tensor | None] | None = None
    """What computes the tokens of a feature map instead, unless it gives None: ``tokenlearner.kernels.use`` sets it."""

    def __init__(
        self,
        dim: int,
        num_tokens: int = 8,
        kind: Kind = "mlp",
        grid: Grid | None = None,
        *,
        pool: Pool | None = None,
        hidden_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; TokenLearner knows {', '.join(KINDS)}")
        pools = _POOLS[kind]
        if pool is not None and pool not in pools:
            raise ValueError(f"kind {kind!r} pools by {' or '.join(map(repr, pools))}, not {pool!r}")
        self.dim = dim = positive_int("dim", dim)
        self.num_tokens = num_tokens = positive_int("num_tokens", num_tokens)
        self.kind = kind
        self.pool = pool or pools[0]
        self.grid = None if grid is None else _checked_grid(grid)

        if kind == "mlp":
            self.alpha: nn.Module = MlpAlpha(dim, num_tokens, positive_int("hidden_dim", hidden_dim), dropout)
        elif kind == "conv":
            self.alpha = ConvAlpha(dim, num_tokens)
        elif kind == "conv1":
            self.alpha = Conv1Alpha(dim, num_tokens)
        elif kind == "gate":
            self.alpha = GateAlpha(num_tokens)
        elif kind == "grid":
            self.alpha = GridAlpha(num_tokens)
        elif kind == "dense":
            if self.grid is None:
                raise ValueError("kind 'dense' learns one weight per position: give grid=(h, w)")
            self.alpha = DenseAlpha(self.grid, num_tokens)
        else:
            self.alpha = nn.Linear(dim, num_tokens * dim)

    def forward(self, x: Float[Tensor, "b *grid d"], grid: Grid | None = None) -> Float[Tensor, "b s d"]:
        """Returns the learned tokens Z. ``grid`` overrides the constructor's for this call."""
        X = self._feature_map(x, grid)
        if self._kernel is not None and (Z := self._kernel(self, X)) is not None:
            return Z
        if self.kind == "average":
            return self._average(X)
        return self._pooled(self._squashed(X), X)

    def maps(self, x: Float[Tensor, "b *grid d"], grid: Grid | None = None) -> Float[Tensor, "b s h w"]:
        """Returns the attention maps α(X) after their squash, in float32.

        For ``"mlp"`` each map sums to one over space, for the sigmoid forms each value lies in (0, 1); ``"grid"``
        gives each cell's averaging weights and ``"dense"`` its W, the same for every input.

        Raises:
            ValueError: For ``"average"``, which has no maps.
        """
        X = self._feature_map(x, grid)
        return rearrange(self._squashed(X), "b s (h w) -> b s h w", h=X.shape[1])

    def tokens_and_maps(
        self, x: Float[Tensor, "b *grid d"], grid: Grid | None = None
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s h w"]]:
        """Returns what :meth:`forward` and :meth:`maps` return, computing α once."""
        X = self._feature_map(x, grid)
        A = self._squashed(X)
        return self._pooled(A, X), rearrange(A, "b s (h w) -> b s h w", h=X.shape[1])

    def _squashed(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s n"]:
        """α(X) after softmax or sigmoid, in float32 whatever the autocast dtype."""
        if self.kind == "average":
            raise ValueError("kind 'average' has no attention maps: every token sees the mean of the whole frame")
        logits = self.alpha(X, self.used_tokens)
        with full_precision(X):
            logits = logits.float()
            if self.pool == "softmax":
                return logits.softmax(dim=-1)
            return logits if self.kind in ("grid", "dense") else logits.sigmoid()

    def _pooled(self, A: Float[Tensor, "b s n"], X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s d"]:
        """ρ(X ⊙ γ(A)): Z = A X, summed in float32, since v1.0 adds up h·w positions: too many for bf16."""
        if self.pool == "mean" and self.kind != "grid":  # a grid cell's weights are a mean already
            A = A / A.shape[-1]
        with full_precision(X):
            return torch.bmm(A, rearrange(X, "b h w d -> b (h w) d").float()).to(X.dtype)

    def _average(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s d"]:
        mean = X.float().mean(dim=(1, 2)).to(X.dtype)
        outputs = None if self.used_tokens is None else self.used_tokens * self.dim
        return rearrange(first_outputs(self.alpha, mean, outputs), "b (s d) -> b s d", d=self.dim).to(X.dtype)

    def _feature_map(self, x: Tensor, grid: Grid | None) -> Float[Tensor, "b h w d"]:
        """Checks x and brings it to (b, h, w, d)."""
        name, shape = f"TokenLearner(dim={self.dim}, kind={self.kind!r})", tuple(x.shape)
        if x.ndim not in (3, 4):
            raise ValueError(f"{name} takes (b, h, w, d), or (b, n, d) with a grid, and got shape {shape}")
        if shape[-1] != self.dim:
            raise ValueError(f"{name} got {shape[-1]} channels in shape {shape}; the last axis must be {self.dim}")
        if x.ndim == 3:
            known = self.grid if grid is None else _checked_grid(grid)
            if known is None:
                raise ValueError(
                    f"{name} got shape {shape}, and {shape[1]} positions don't tell their height and width: "
                    "give grid=(h, w), or x as (b, h, w, d)"
                )
            if known[0] * known[1] != shape[1]:
                raise ValueError(
                    f"{name} got {shape[1]} positions in shape {shape}, but a grid of {known[0]}×{known[1]} "
                    f"has {known[0] * known[1]}"
                )
            x = rearrange(x, "b (h w) d -> b h w d", h=known[0], w=known[1])
        elif grid is not None and tuple(x.shape[1:3]) != _checked_grid(grid):
            raise ValueError(f"{name} got grid={tuple(grid)} for a feature map of shape {shape}; leave the grid out")
        if x.shape[1] * x.shape[2] == 0:
            raise ValueError(f"{name} got an empty feature map, shape {shape}")
        return x

    def extra_repr(self) -> str:
        grid = "" if self.grid is None else f", grid={self.grid}"
        used = "" if self.used_tokens is None else f", used_tokens={self.used_tokens}"
        return f"dim={self.dim}, num_tokens={self.num_tokens}{used}, kind={self.kind!r}, pool={self.pool!r}{grid}"


def _checked_grid(grid: Grid) -> Grid:
    if any(isinstance(side, torch.SymInt) for side in grid):  # traced with a dynamic size, which int() would fix
        return grid
    if len(grid) != 2 or any(int(side) != side or side < 1 for side in grid):
        raise ValueError(f"grid must be (h, w) with two positive whole numbers, not {grid!r}")
    return int(grid[0]), int(grid[1])
