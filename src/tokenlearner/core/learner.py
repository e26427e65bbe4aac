"""TokenLearner: S tokens learned from a feature map (arXiv 2106.11297, section 2).

The whole idea is one line, ``z_i = ρ(X ⊙ γ(α_i(X)))``: an attention map α_i per token says how much each position
counts, and spatial pooling ρ sums the positions up. Because γ only broadcasts over channels, the product and the sum
are one matrix product ``Z = A X`` with ``A`` of shape (s, n), and no (b, s, n, d) tensor is ever made.

Where the paper's text and the authors' code differ we follow the code: α's convolutions are full, not per channel,
v1.0 sums over space (the mean is an option), LayerNorm has ε = 1e-6 and GELU is the tanh approximation.
"""

from __future__ import annotations

import math
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import full_precision, in_recomputation, positive_int

Kind = Literal["conv", "mlp", "conv1", "gate", "grid", "dense", "average"]
Pool = Literal["sum", "mean", "softmax"]
Grid = tuple[int, int]

KINDS: tuple[str, ...] = get_args(Kind)
LAYER_NORM_EPS = 1e-6  # Flax's default, which the official parameters were trained with

# How each α form pools; the first entry is the paper's. "softmax" is a weighted sum with weights that sum to one.
_POOLS: dict[str, tuple[str, ...]] = {
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
        self.dim = positive_int("dim", dim)
        self.num_tokens = positive_int("num_tokens", num_tokens)
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
        logits = self.alpha(X)
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
        return rearrange(self.alpha(mean), "b (s d) -> b s d", s=self.num_tokens).to(X.dtype)

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
        if x.shape[1] * x.shape[2] == 0:
            raise ValueError(f"{name} got an empty feature map, shape {shape}")
        return x

    def extra_repr(self) -> str:
        grid = "" if self.grid is None else f", grid={self.grid}"
        return f"dim={self.dim}, num_tokens={self.num_tokens}, kind={self.kind!r}, pool={self.pool!r}{grid}"


class MlpAlpha(nn.Module):
    """α of v1.1: LayerNorm, then an MLP d→hidden→S applied to each position. (b, h, w, d) → (b, s, n)."""

    def __init__(self, dim: int, num_tokens: int, hidden_dim: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_tokens)
        self.drop = nn.Dropout(dropout)
        for layer in (self.fc1, self.fc2):  # as the official MlpBlock starts
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, X: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b s n"]:
        hidden = self.drop(F.gelu(self.fc1(self.norm(X)), approximate="tanh"))
        return self.drop(self.fc2(hidden)).flatten(1, -2).transpose(1, 2)


class ConvAlpha(nn.Module):
    """α of v1.0: LayerNorm over channels, then four 3×3 convolutions of S channels without bias."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.convs = nn.ModuleList(
            nn.Conv2d(dim if i == 0 else num_tokens, num_tokens, 3, padding=1, bias=False) for i in range(4)
        )
        for conv in self.convs:
            _lecun_normal_(conv)

    def forward(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s n"]:
        A = rearrange(self.norm(X), "b h w d -> b d h w")
        for i, conv in enumerate(self.convs):
            A = conv(A)
            if i < 3:
                A = F.gelu(A, approximate="tanh")
        return rearrange(A, "b s h w -> b s (h w)")


class Conv1Alpha(nn.Module):
    """α of the bottleneck-transformer video model: one 3×3 convolution d→S, no normalisation."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, num_tokens, 3, padding=1, bias=False)
        _lecun_normal_(self.conv)

    def forward(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s n"]:
        return rearrange(self.conv(rearrange(X, "b h w d -> b d h w")), "b s h w -> b s (h w)")


class GateAlpha(nn.Module):
    """α as a CBAM-style spatial gate per token: max and mean over channels, 7×7 convolution, BatchNorm, no ReLU."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, num_tokens, 7, padding=3, bias=False)
        self.norm = RecomputeSafeBatchNorm2d(num_tokens)

    def forward(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s n"]:
        summary = torch.stack([X.amax(dim=-1), X.mean(dim=-1)], dim=1)
        return rearrange(self.norm(self.conv(summary)), "b s h w -> b s (h w)")


class GridAlpha(nn.Module):
    """Not learned: each token is the mean over one of S cells, as near to square as S and the frame allow."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s n"]:
        b, h, w, _ = X.shape
        rows, columns = cell_layout(h, w, self.num_tokens)
        R, C = _cell_means(h, rows, X.device), _cell_means(w, columns, X.device)
        return torch.kron(R, C).expand(b, -1, -1)


class DenseAlpha(nn.Module):
    """One fully connected layer over positions: W of shape (s, h·w), the same for every input."""

    def __init__(self, grid: Grid, num_tokens: int) -> None:
        super().__init__()
        self.grid = grid
        n = grid[0] * grid[1]
        self.weight = nn.Parameter(torch.empty(num_tokens, n))
        nn.init.uniform_(self.weight, -1 / math.sqrt(n), 1 / math.sqrt(n))  # as nn.Linear starts

    def forward(self, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s n"]:
        if tuple(X.shape[1:3]) != self.grid:
            raise ValueError(
                f"kind 'dense' was built for a grid of {self.grid[0]}×{self.grid[1]} and got "
                f"{X.shape[1]}×{X.shape[2]}; its weights belong to fixed positions"
            )
        return self.weight.expand(X.shape[0], -1, -1)


class RecomputeSafeBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose running statistics move once per step under gradient checkpointing too.

    Checkpointing runs the layer again during backward; the same batch must not be counted twice.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class names it
        if self.training and in_recomputation():
            # Copies, not None: checkpointing wants as many tensors saved for backward as the first time.
            mean, var = (None if s is None else s.clone() for s in (self.running_mean, self.running_var))
            return F.batch_norm(input, mean, var, self.weight, self.bias, training=True, eps=self.eps)
        return super().forward(input)


def cell_layout(h: int, w: int, cells: int) -> Grid:
    """Rows and columns that split an h×w frame into ``cells`` cells, each as near to square as possible."""
    layouts = [(r, cells // r) for r in range(1, cells + 1) if cells % r == 0]
    return min(layouts, key=lambda layout: _misfit(h, w, *layout))


def _misfit(h: int, w: int, rows: int, columns: int) -> tuple[int, float, int]:
    """Rows and columns that don't fit in, then a cell's long side over its short one; a tie goes to fewer rows."""
    sides = h * columns, w * rows  # whole numbers, so that 2×3 and 3×2 cells of a square frame do tie
    return max(0, rows - h) + max(0, columns - w), max(sides) / min(sides), rows


def _cell_means(length: int, cells: int, device: torch.device) -> Float[Tensor, "cells length"]:
    """Averaging weights of ``cells`` consecutive stretches; stretches share positions only where length < cells."""
    M = torch.zeros(cells, length, device=device)
    for i in range(cells):
        start = i * length // cells
        stop = max(start + 1, (i + 1) * length // cells)
        M[i, start:stop] = 1 / (stop - start)
    return M


def _checked_grid(grid: Grid) -> Grid:
    if len(grid) != 2 or any(int(side) != side or side < 1 for side in grid):
        raise ValueError(f"grid must be (h, w) with two positive whole numbers, not {grid!r}")
    return int(grid[0]), int(grid[1])


def _lecun_normal_(conv: nn.Module) -> None:
    """Flax's default for convolutions: truncated normal of variance 1 / fan-in."""
    weight = cast(Tensor, conv.weight)
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566  # cutting at two of these leaves 0.88 of the deviation
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
