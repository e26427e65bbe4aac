"""TokenFuser with an MLP β in one pass: LayerNorm, MLP, sigmoid, the product with the tokens, the residual.

How often what is read, for X of (b, n, d): a program takes a block of positions. It reads their X from memory once, in
tiles of some channels, for β, and again from the L2 for the residual, the last tile first; see ``learner.py`` for the
sizes. The output is written once; Y (S × d) and W' (hidden × d) come from the L2, once for each block.

The tokens' own part, LayerNorm and the mixing over S, is small and stays PyTorch. So does the backward pass, which
recomputes from X, Y and the weights alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from tokenlearner.core._numerics import full_precision
from tokenlearner.core.fuser import spread
from tokenlearner.kernels.logits import Tile, Weights, alpha, fold, logits, on_device, padded, product
from tokenlearner.kernels.recompute import gradients

TILE = Tile(64, 64, 4)


@torch.library.custom_op("tokenlearner::fuse", mutates_args=())
def fuse(
    X: Tensor,
    Y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    residual: bool,
) -> Tensor:
    """β(X) Y, plus X with ``residual``, (b, n, d), of X (b, n, d) and mixed tokens Y (b, s, d).

    β is LayerNorm (γ, β of d, ε), W₁ (hidden, d), tanh GELU, W₂ (s, hidden), sigmoid. An operator of PyTorch, so that
    ``torch.compile`` keeps it in its graph; differentiable once.
    """
    return launch(X, Y, Weights(gamma, beta, w1, b1, w2, b2), eps, residual, TILE)


def launch(
    X: Float[Tensor, "b n d"], Y: Float[Tensor, "b s d"], weights: Weights, eps: float, residual: bool, tile: Tile
) -> Float[Tensor, "b n d"]:
    """:func:`fuse` with a tile of one's own, without a gradient."""
    X = X if X.stride(2) == 1 else X.contiguous()
    (b, n, d), (s, hidden) = X.shape, weights.w2.shape
    blocks = triton.cdiv(n, tile.positions)
    out = torch.empty(b, n, d, dtype=X.dtype, device=X.device)
    with on_device(X):
        W, sums, bias = fold(weights, X.dtype)
        _fuse[(b * blocks,)](
            X, Y.contiguous(), W, sums, bias, weights.w2.contiguous(), weights.b2, out,
            X.stride(0), X.stride(1), n, hidden, s, blocks, eps,
            RESIDUAL=residual, D=d, N=tile.positions, C=tile.channels, H=padded(hidden), S=padded(s),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def plain(X: Float[Tensor, "b n d"], Y: Float[Tensor, "b s d"], *rest: Any) -> Float[Tensor, "b n d"]:
    """What :func:`fuse` computes, in PyTorch and X's dtype; its gradient is the kernel's."""
    *weights, eps, residual = rest
    with full_precision(X):
        out = spread(alpha(X, Weights(*weights), eps).sigmoid(), Y).to(X.dtype)
        return X + out if residual else out


@fuse.register_fake
def _(
    X: Tensor,
    Y: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    eps: float,
    residual: bool,
) -> Tensor:
    return X.new_empty(X.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-2])
    ctx.options = inputs[-2:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*gradients(plain, ctx.saved_tensors, ctx.options, ctx.needs_input_grad, gradient), None, None)


fuse.register_autograd(_backward, setup_context=_save)


@triton.jit
def _fuse(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    w1_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    b1_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    b2_ptr: tl.tensor,
    out_ptr: tl.tensor,
    image_stride: tl.tensor,
    position_stride: tl.tensor,
    n: tl.tensor,
    hidden: tl.tensor,
    s: tl.tensor,
    blocks: tl.tensor,
    eps: tl.tensor,
    RESIDUAL: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    p = (program % blocks) * N + tl.arange(0, N)
    inside = p < n
    rows = x_ptr + image * image_stride + p * position_stride
    L = logits(rows, inside, w1_ptr, sums_ptr, b1_ptr, w2_ptr, b2_ptr, hidden, s, eps, D, N, C, H, S)
    B = tl.sigmoid(L).to(x_ptr.dtype.element_ty)
    t = tl.arange(0, S)
    c = tl.arange(0, C)
    tiles = tl.cdiv(D, C)
    for i in range(tiles):
        k = (tiles - 1 - i) * C + c
        fits = inside[:, None] & (k < D)[None, :]
        y = tl.load(
            y_ptr + (image * s + t)[:, None] * D + k[None, :], mask=(t < s)[:, None] & (k < D)[None, :], other=0.0
        )
        out = product(B, y)
        if RESIDUAL:
            out += tl.load(rows[:, None] + k[None, :], mask=fits, other=0.0).to(tl.float32)
        target = out_ptr + (image * n + p)[:, None] * D + k[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=fits)
