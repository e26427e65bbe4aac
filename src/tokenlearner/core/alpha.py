"""The forms of α: what each position counts in each token, before the squash. Every one maps (b, h, w, d) → (b, s, n).

Called as ``alpha(X, k)`` they compute the first k maps alone, all but the fixed cells.

``LAYER_NORM_EPS`` and the tanh GELU are Flax's defaults, which the official parameters were trained with.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import in_recomputation

Grid = tuple[int, int]

LAYER_NORM_EPS = 1e-6


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

    def forward(self, X: Float[Tensor, "b *grid d"], k: int | None = None) -> Float[Tensor, "b s n"]:
        hidden = self.drop(F.gelu(self.fc1(self.norm(X)), approximate="tanh"))
        return self.drop(first_outputs(self.fc2, hidden, k)).flatten(1, -2).transpose(1, 2)


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

    def forward(self, X: Float[Tensor, "b h w d"], k: int | None = None) -> Float[Tensor, "b s n"]:
        A = rearrange(self.norm(X), "b h w d -> b d h w")
        *inner, last = self.convs
        for conv in inner:
            A = F.gelu(conv(A), approximate="tanh")
        return rearrange(first_outputs(last, A, k), "b s h w -> b s (h w)")


class Conv1Alpha(nn.Module):
    """α of the bottleneck-transformer video model: one 3×3 convolution d→S, no normalisation."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, num_tokens, 3, padding=1, bias=False)
        _lecun_normal_(self.conv)

    def forward(self, X: Float[Tensor, "b h w d"], k: int | None = None) -> Float[Tensor, "b s n"]:
        return rearrange(first_outputs(self.conv, rearrange(X, "b h w d -> b d h w"), k), "b s h w -> b s (h w)")


class GateAlpha(nn.Module):
    """α as a CBAM-style spatial gate per token: max and mean over channels, 7×7 convolution, BatchNorm, no ReLU."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, num_tokens, 7, padding=3, bias=False)
        self.norm = RecomputeSafeBatchNorm2d(num_tokens)

    def forward(self, X: Float[Tensor, "b h w d"], k: int | None = None) -> Float[Tensor, "b s n"]:
        summary = torch.stack([X.amax(dim=-1), X.mean(dim=-1)], dim=1)
        return rearrange(self.norm(first_outputs(self.conv, summary, k), k), "b s h w -> b s (h w)")


class GridAlpha(nn.Module):
    """Not learned: each token is the mean over one of S cells, as near to square as S and the frame allow."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, X: Float[Tensor, "b h w d"], k: None = None) -> Float[Tensor, "b s n"]:
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

    def forward(self, X: Float[Tensor, "b h w d"], k: int | None = None) -> Float[Tensor, "b s n"]:
        if tuple(X.shape[1:3]) != self.grid:
            raise ValueError(
                f"kind 'dense' was built for a grid of {self.grid[0]}×{self.grid[1]} and got "
                f"{X.shape[1]}×{X.shape[2]}; its weights belong to fixed positions"
            )
        return self.weight[:k].expand(X.shape[0], -1, -1)


class _RecomputeSafe(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose running statistics move once per step under gradient checkpointing too.

    Checkpointing runs the layer again during backward; the same batch must not be counted twice.
    """

    def forward(self, input: Tensor, k: int | None = None) -> Tensor:  # noqa: A002 - the base class names it
        """``k`` is the number of channels where the input has the first k alone."""
        again = self.training and in_recomputation()
        if k is None and not again:
            return super().forward(input)
        mean, var = (cast(Tensor, s)[:k] for s in (self.running_mean, self.running_var))
        if again:  # copies, not None: checkpointing wants as many tensors saved for backward as the first time
            mean, var = mean.clone(), var.clone()
        elif self.training:
            cast(Tensor, self.num_batches_tracked).add_(1)
        momentum = cast(float, self.momentum)
        return F.batch_norm(input, mean, var, self.weight[:k], self.bias[:k], self.training, momentum, self.eps)


class RecomputeSafeBatchNorm2d(_RecomputeSafe, nn.BatchNorm2d):
    """For maps (b, s, h, w)."""


class RecomputeSafeBatchNorm3d(_RecomputeSafe, nn.BatchNorm3d):
    """For clips (b, d, t, h, w)."""


def first_outputs(layer: nn.Module, x: Tensor, k: int | None) -> Tensor:
    """``layer``, linear or a convolution, of x; with k, its first k outputs alone, and no work for the others."""
    if k is None:
        return layer(x)
    bias = None if layer.bias is None else cast(Tensor, layer.bias)[:k]
    weight = cast(Tensor, layer.weight)[:k]
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding)
    return F.linear(x, weight, bias)


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


def _lecun_normal_(conv: nn.Module) -> None:
    """Flax's default for convolutions: truncated normal of variance 1 / fan-in."""
    weight = cast(Tensor, conv.weight)
    std = math.sqrt(1 / weight[0].numel()) / 0.87962566  # cutting at two of these leaves 0.88 of the deviation
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
