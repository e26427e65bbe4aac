"""TokenLearner of kind ``"mlp"`` in one pass: LayerNorm, MLP, softmax over space and the weighted sum of X.

How often what is read, for X of (b, n, d): a program takes a block of positions of one image. It reads their X from
memory once, in tiles of some channels, for the logits; for the sum it reads the same tiles again, the last first, from
the L2. At d = 1024 in bfloat16 a block of 128 is 256 KB, and two programs run on each multiprocessor: on average
33 MB of others' tiles come between the two readings, of an H100's 50 MB. W' (hidden × d) comes from the L2, once for
each block. A block in shared memory would spare the second reading, but W' and X for the tensor cores, and the next
block on its way, need 128 KB each at d = 1024, of 227 KB; and held in registers they spill.

Positions of one image are shared among programs, or a batch of 64 would leave half of an H200 idle. Each leaves its own
softmax's maximum and sum, and its own tokens in X's dtype (for S = 8 and blocks of 128, 1/16 of X), and a second, small
launch joins them.

The backward pass recomputes with PyTorch, from X and the weights alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from tokenlearner.core._numerics import full_precision
from tokenlearner.kernels.logits import Tile, Weights, alpha, fold, logits, on_device, padded, product
from tokenlearner.kernels.recompute import gradients

# By what the compiler says of registers and shared memory, not timed yet: benchmarks/kernels.py --sweep does that.
_TILES = (Tile(128, 64), Tile(64, 64, 4), Tile(32, 64, 4))


def tile_for(b: int, n: int, processors: int) -> Tile:
    """The largest block of positions that still gives each multiprocessor one."""
    return next((tile for tile in _TILES if b * triton.cdiv(n, tile.positions) >= processors), _TILES[-1])


@torch.library.custom_op("tokenlearner::learn", mutates_args=())
def learn(X: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float) -> Tensor:
    """Tokens (b, s, d) of X (b, n, d): LayerNorm (γ, β of d, ε), W₁ (hidden, d), tanh GELU, W₂ (s, hidden), softmax.

    An operator of PyTorch, so that ``torch.compile`` keeps it in its graph; differentiable once.
    """
    processors = torch.cuda.get_device_properties(X.device).multi_processor_count if X.is_cuda else 1
    return launch(X, Weights(gamma, beta, w1, b1, w2, b2), eps, tile_for(X.shape[0], X.shape[1], processors))


def launch(X: Float[Tensor, "b n d"], weights: Weights, eps: float, tile: Tile) -> Float[Tensor, "b s d"]:
    """:func:`learn` with a tile of one's own, without a gradient."""
    X = X if X.stride(2) == 1 else X.contiguous()
    (b, n, d), (s, hidden) = X.shape, weights.w2.shape
    blocks = triton.cdiv(n, tile.positions)
    parts = torch.empty(b, blocks, s, d, dtype=X.dtype, device=X.device)
    tops, totals = torch.empty(2, b, blocks, s, dtype=torch.float32, device=X.device)
    Z = torch.empty(b, s, d, dtype=X.dtype, device=X.device)
    sizes = {"D": d, "C": tile.channels, "S": padded(s)}
    with on_device(X):
        W, sums, bias = fold(weights, X.dtype)
        _learn[(b * blocks,)](
            X, W, sums, bias, weights.w2.contiguous(), weights.b2, parts, tops, totals,
            X.stride(0), X.stride(1), n, hidden, s, blocks, eps,
            N=tile.positions, H=padded(hidden), **sizes, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        _join[(b, triton.cdiv(d, tile.channels))](parts, tops, totals, Z, s, blocks, **sizes, num_warps=2)
    return Z


def plain(X: Float[Tensor, "b n d"], *weights_and_eps: Any) -> Float[Tensor, "b s d"]:
    """What :func:`learn` computes, in PyTorch and X's dtype; its gradient is the kernel's."""
    *weights, eps = weights_and_eps
    with full_precision(X):
        A = alpha(X, Weights(*weights), eps).float().softmax(dim=-1)
        return torch.bmm(A, X.float()).to(X.dtype)


@learn.register_fake
def _(X: Tensor, gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, eps: float) -> Tensor:
    return X.new_empty(X.shape[0], w2.shape[0], X.shape[2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.eps = inputs[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*gradients(plain, ctx.saved_tensors, (ctx.eps,), ctx.needs_input_grad, gradient), None)


learn.register_autograd(_backward, setup_context=_save)


@triton.jit
def _learn(
    x_ptr: tl.tensor,
    w1_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    b1_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    b2_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    image_stride: tl.tensor,
    position_stride: tl.tensor,
    n: tl.tensor,
    hidden: tl.tensor,
    s: tl.tensor,
    blocks: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    p = (program % blocks) * N + tl.arange(0, N)
    inside = p < n
    rows = x_ptr + (program // blocks) * image_stride + p * position_stride
    L = logits(rows, inside, w1_ptr, sums_ptr, b1_ptr, w2_ptr, b2_ptr, hidden, s, eps, D, N, C, H, S)
    L = tl.trans(tl.where(inside[:, None], L, float("-inf")))
    top = tl.max(L, 1)
    A = tl.exp(L - top[:, None]).to(x_ptr.dtype.element_ty)
    total = tl.sum(A.to(tl.float32), 1)  # of the rounded weights, so that a token's weights sum to one
    t = tl.arange(0, S)
    out = program * s + t
    tl.store(tops_ptr + out, top, mask=t < s)
    tl.store(totals_ptr + out, total, mask=t < s)
    c = tl.arange(0, C)
    tiles = tl.cdiv(D, C)
    for i in range(tiles):
        k = (tiles - 1 - i) * C + c  # what was read last is the likeliest to be in the L2 still
        x = tl.load(rows[:, None] + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
        Z = product(A, x) / total[:, None]
        fits = (t < s)[:, None] & (k < D)[None, :]
        tl.store(parts_ptr + out[:, None] * D + k[None, :], Z.to(parts_ptr.dtype.element_ty), mask=fits)


@triton.jit
def _join(
    parts_ptr: tl.tensor,
    tops_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    z_ptr: tl.tensor,
    s: tl.tensor,
    blocks: tl.tensor,
    D: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
) -> None:
    """The softmax over all of an image's blocks, from each block's own."""
    image = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, S)
    c = tl.program_id(1) * C + tl.arange(0, C)
    fits = (t < s)[:, None] & (c < D)[None, :]
    top = tl.full((S,), float("-inf"), tl.float32)
    total = tl.zeros((S,), tl.float32)
    Z = tl.zeros((S, C), tl.float32)
    for i in range(blocks):
        part = (image * blocks + i) * s + t
        own = tl.load(tops_ptr + part, mask=t < s, other=0.0)
        higher = tl.maximum(top, own)
        weight = tl.load(totals_ptr + part, mask=t < s, other=1.0) * tl.exp(own - higher)
        before = tl.exp(top - higher)
        z = tl.load(parts_ptr + part[:, None] * D + c[None, :], mask=fits, other=0.0).to(tl.float32)
        Z = Z * before[:, None] + z * weight[:, None]
        total = total * before + weight
        top = higher
    out = (image * s + t)[:, None] * D + c[None, :]
    tl.store(z_ptr + out, (Z / total[:, None]).to(z_ptr.dtype.element_ty), mask=fits)
