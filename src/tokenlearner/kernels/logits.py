"""What the learner's and the fuser's kernels share: LayerNorm and the MLP of α, from one reading of X.

LayerNorm comes out of the product: with W' = W₁ diag(γ) and b' = b₁ + W₁ β_norm, ``W₁ LN(x) + b₁`` is
``(W' x − μ Σ W') / σ + b'``, so the tensor cores run on X as it lies in memory while μ and σ are summed from the same
tiles. Σ W' sums the *rounded* W', so that the part of W' x that μ makes cancels whatever the size of μ. σ is merged
tile by tile (Chan's formula) and never is a difference of large numbers.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

# Triton's interpreter multiplies the bits of bfloat16 as if they were whole numbers, so it is given float32.
_WIDE = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Tile(NamedTuple):
    """How much one program takes at a time: positions and channels, powers of two from 16 on.

    Its warps, and how many tiles are on their way at once (stages), the interpreter ignores.
    """

    positions: int
    channels: int
    warps: int = 8
    stages: int = 3


class Weights(NamedTuple):
    """LayerNorm's γ and β, and both layers of the MLP, as its module has them."""

    gamma: Float[Tensor, " d"]
    beta: Float[Tensor, " d"]
    w1: Float[Tensor, "hidden d"]
    b1: Float[Tensor, " hidden"]
    w2: Float[Tensor, "s hidden"]
    b2: Float[Tensor, " s"]

    def like(self, X: Tensor) -> Weights:
        """In X's dtype."""
        return Weights(*(weight.to(X.dtype) for weight in self))


class Folded(NamedTuple):
    """The first layer with LayerNorm's weights in it: W' in X's dtype, Σ W' and b' in float32."""

    weight: Float[Tensor, "hidden d"]
    sums: Float[Tensor, " hidden"]
    bias: Float[Tensor, " hidden"]


def fold(weights: Weights, dtype: torch.dtype) -> Folded:
    """One small launch, a program for each hidden unit; PyTorch would need six."""
    hidden, d = weights.w1.shape
    folded = torch.empty(hidden, d, dtype=dtype, device=weights.w1.device)
    sums, bias = torch.empty(2, hidden, dtype=torch.float32, device=weights.w1.device)
    gamma, beta, w1, b1, *_ = weights
    _fold[(hidden,)](w1.contiguous(), b1, gamma, beta, folded, sums, bias, D=d, P=triton.next_power_of_2(d))
    return Folded(folded, sums, bias)


def alpha(X: Float[Tensor, "b n d"], weights: Weights, eps: float) -> Float[Tensor, "b s n"]:
    """What the kernels compute before their squash, in PyTorch and X's dtype."""
    gamma, beta, w1, b1, w2, b2 = weights.like(X)
    hidden = F.gelu(F.linear(F.layer_norm(X, X.shape[-1:], gamma, beta, eps), w1, b1), approximate="tanh")
    return F.linear(hidden, w2, b2).transpose(1, 2)


def padded(size: int) -> int:
    """The power of two that holds ``size``, and no less than the 16 that ``tl.dot`` asks for."""
    return max(16, triton.next_power_of_2(size))


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def _fold(
    w_ptr: tl.tensor,
    b_ptr: tl.tensor,
    gamma_ptr: tl.tensor,
    beta_ptr: tl.tensor,
    folded_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    D: tl.constexpr,
    P: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    c = tl.arange(0, P)
    here = c < D
    w = tl.load(w_ptr + row * D + c, mask=here, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, mask=here, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + c, mask=here, other=0.0).to(tl.float32)
    folded = (w * gamma).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + row * D + c, folded, mask=here)
    tl.store(sums_ptr + row, tl.sum(folded.to(tl.float32), 0))
    tl.store(bias_ptr + row, tl.load(b_ptr + row).to(tl.float32) + tl.sum(w * beta, 0))


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """The tanh form: ½ (1 + tanh u) is the sigmoid of 2u, and tl has no tanh in every version."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a b in float32, without TF32."""
    if _WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def logits(
    rows: tl.tensor,
    inside: tl.tensor,
    w1_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    b1_ptr: tl.tensor,
    w2_ptr: tl.tensor,
    b2_ptr: tl.tensor,
    hidden: tl.tensor,
    s: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
) -> tl.tensor:
    """α of N positions before its squash, (N, S) in float32. ``rows`` points at the first channel of each position."""
    c = tl.arange(0, C)
    h = tl.arange(0, H)
    t = tl.arange(0, S)
    mean = tl.zeros((N,), tl.float32)
    squares = tl.zeros((N,), tl.float32)
    A = tl.zeros((N, H), tl.float32)
    for k in range(0, D, C):
        here = k + c < D
        x = tl.load(rows[:, None] + (k + c)[None, :], mask=inside[:, None] & here[None, :], other=0.0)
        w = tl.load(w1_ptr + h[None, :] * D + (k + c)[:, None], mask=(h < hidden)[None, :] & here[:, None], other=0.0)
        A += product(x, w)
        width = tl.minimum(D - k, C)
        wide = x.to(tl.float32)
        own = tl.sum(wide, 1) / width
        apart = tl.where(here[None, :], wide - own[:, None], 0.0)
        off = own - mean
        squares += tl.sum(apart * apart, 1) + off * off * (k * (width / (k + width)))
        mean += off * (width / (k + width))
    sums = tl.load(sums_ptr + h, mask=h < hidden, other=0.0)
    b1 = tl.load(b1_ptr + h, mask=h < hidden, other=0.0)
    A = (A - mean[:, None] * sums[None, :]) * tl.rsqrt(squares / D + eps)[:, None] + b1[None, :]
    dtype = rows.dtype.element_ty
    fits = (t < s)[None, :] & (h < hidden)[:, None]
    w2 = tl.load(w2_ptr + t[None, :] * hidden + h[:, None], mask=fits, other=0.0).to(dtype)
    b2 = tl.load(b2_ptr + t, mask=t < s, other=0.0).to(tl.float32)
    return product(gelu(A).to(dtype), w2) + b2[None, :]
