"""TokenFuser: learned tokens back onto the feature map (arXiv 2106.11297, section 2.2), and its two rivals.

All three take the tokens a layer produced and the feature map X that entered it, and return a map of X's shape:
``TokenFuser`` mixes the tokens and learns where each goes, ``Unpool`` spreads them with TokenLearner's own maps,
``Reproject`` lets every position attend to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import full_precision, positive_int
from tokenlearner.core.alpha import LAYER_NORM_EPS, MlpAlpha, first_outputs

Beta = Literal["mlp", "linear"]


class TokenFuser(nn.Module):
    """Mixes learned tokens and maps them back to positions: ``X' = β(X) Y + X`` with ``Y ← (Yᵀ M)ᵀ``.

    M is zero-initialised as in the official code, so a new fuser returns x unchanged.

    Args:
        dim: Channels d.
        num_tokens: Tokens S per frame.
        num_frames: None mixes the S tokens of one frame (official image and ViViT code). A number T makes M an
            ST×ST matrix over all tokens of a clip, as the paper's equation has it.
        beta: ``"mlp"``: LayerNorm and MLP d→hidden→S (official); ``"linear"``: one linear layer d→S (paper's text).
            A sigmoid follows either.
        hidden_dim: Width of the β MLP.
        norm: LayerNorm before and after the mixing (official). False gives the bare equation.
        dropout: Dropout in the β MLP.
        residual: Whether a call adds X; can be overridden in the call.
    """

    used_tokens: int | None = None
    """How many tokens of a frame, the first of ``num_tokens``, come: :func:`tokenlearner.set_num_tokens` sets it. None
    for all."""

    _kernel: Callable[[TokenFuser, Tensor, Tensor, bool], Tensor | None] | None = None
    """What fuses a feature map and mixed tokens instead, unless it gives None: ``tokenlearner.kernels.use`` sets it."""

    def __init__(
        self,
        dim: int,
        num_tokens: int = 8,
        *,
        num_frames: int | None = None,
        beta: Beta = "mlp",
        hidden_dim: int = 64,
        norm: bool = True,
        dropout: float = 0.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if beta not in ("mlp", "linear"):
            raise ValueError(f"beta is 'mlp' or 'linear', not {beta!r}")
        self.dim = dim = positive_int("dim", dim)
        self.num_tokens = num_tokens = positive_int("num_tokens", num_tokens)
        self.num_frames = None if num_frames is None else positive_int("num_frames", num_frames)
        hidden_dim = positive_int("hidden_dim", hidden_dim)
        self.residual = residual
        mixed = num_tokens * (self.num_frames or 1)
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if norm else nn.Identity()
        self.mix = nn.Linear(mixed, mixed)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if norm else nn.Identity()
        self.beta: nn.Module = (
            MlpAlpha(dim, num_tokens, hidden_dim, dropout) if beta == "mlp" else LinearBeta(dim, num_tokens)
        )
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(
        self, tokens: Float[Tensor, "b s d"], x: Float[Tensor, "b *grid d"], residual: bool | None = None
    ) -> Float[Tensor, "b *grid d"]:
        """Returns the fused map, of x's shape.

        ``tokens`` is (b, s, d) and x (b, n, d) or (b, h, w, d); with ``num_frames=T`` tokens is (b, T·s, d) and x
        (b, T, n, d) or (b, T, h, w, d).
        """
        frames = self.num_frames or 1
        check_tokens("TokenFuser", tokens, x, self.dim, (self.used_tokens or self.num_tokens) * frames)
        if self.num_frames is not None and (x.ndim < 4 or x.shape[1] != frames):
            raise ValueError(
                f"TokenFuser(num_frames={frames}) takes x as (b, {frames}, n, d) or (b, {frames}, h, w, d), "
                f"and got shape {tuple(x.shape)}"
            )
        Y = self._mixed(self.norm1(tokens).transpose(1, 2)).transpose(1, 2)
        Y = rearrange(self.norm2(Y), "b (t s) d -> (b t) s d", t=frames)
        X = x if self.num_frames is None else x.flatten(0, 1)
        residual = self.residual if residual is None else residual
        if self._kernel is not None and (fused := self._kernel(self, X, Y, residual)) is not None:
            return fused.reshape(x.shape)
        out = spread(self.beta(X, self.used_tokens).sigmoid(), Y).reshape(x.shape).to(x.dtype)
        return x + out if residual else out

    def _mixed(self, Y: Float[Tensor, "b d ts"]) -> Float[Tensor, "b d ts"]:
        """M over the tokens, with the rows and columns of those in use."""
        if (k := self.used_tokens) is None:
            return self.mix(Y)
        t = self.num_frames or 1
        M = rearrange(self.mix.weight, "(t s) (u r) -> t s u r", t=t, u=t)[:, :k, :, :k]
        bias = rearrange(self.mix.bias, "(t s) -> t s", t=t)[:, :k]
        return F.linear(Y, rearrange(M, "t s u r -> (t s) (u r)"), rearrange(bias, "t s -> (t s)"))

    def extra_repr(self) -> str:
        frames = "" if self.num_frames is None else f", num_frames={self.num_frames}"
        used = "" if self.used_tokens is None else f", used_tokens={self.used_tokens}"
        return f"dim={self.dim}, num_tokens={self.num_tokens}{used}{frames}, residual={self.residual}"


class LinearBeta(nn.Module):
    """β as the paper writes it: one linear layer d→S at each position. (b, *grid, d) → (b, s, n)."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, num_tokens)

    def forward(self, X: Float[Tensor, "b *grid d"], k: int | None = None) -> Float[Tensor, "b s n"]:
        return first_outputs(self.fc, X, k).flatten(1, -2).transpose(1, 2)


class Unpool(nn.Module):
    """The ablation's "Unpool": TokenLearner's own maps spread the tokens back, ``X' = Aᵀ Z + X``. No parameters.

    Args:
        normalize: Divide the maps by their sum over tokens at each position. Sigmoid maps are gates and are used as
            they are; softmax maps are distributions over space, about 1/n everywhere, and need it to say instead
            how a position shares itself among the tokens.
        residual: Whether X is added.
    """

    def __init__(self, *, normalize: bool = False, residual: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.residual = residual

    def forward(
        self,
        tokens: Float[Tensor, "b s d"],
        x: Float[Tensor, "b *grid d"],
        maps: Float[Tensor, "b s h w"],
    ) -> Float[Tensor, "b *grid d"]:
        check_tokens("Unpool", tokens, x, x.shape[-1], tokens.shape[1])
        positions = x.shape[1:-1].numel()
        other_grid = x.ndim == 4 and maps.shape[2:] != x.shape[1:3]  # 3×5 maps on 5×3 would land in the wrong places
        if maps.shape[:2] != tokens.shape[:2] or maps.shape[2:].numel() != positions or other_grid:
            raise ValueError(
                f"Unpool needs one map per token over x's {positions} positions; tokens {tuple(tokens.shape)}, "
                f"x {tuple(x.shape)} and maps {tuple(maps.shape)} don't fit"
            )
        A = maps.flatten(2)
        if self.normalize:
            A = A / A.sum(dim=1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
        out = spread(A, tokens).reshape(x.shape).to(x.dtype)
        return x + out if self.residual else out

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, residual={self.residual}"


class Reproject(nn.Module):
    """The ablation's "Reprojection": one attention layer whose h·w queries come from X and keys, values from Z.

    Its two projections on all positions (queries, output) are what makes it dearer than a fuser. The output
    projection is zero-initialised, so that like a new fuser it returns x unchanged.

    Args:
        dim: Channels d.
        num_heads: Attention heads; must divide dim.
        residual: Whether X is added.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, residual: bool = True) -> None:
        super().__init__()
        if positive_int("dim", dim) % positive_int("num_heads", num_heads):
            raise ValueError(f"num_heads must divide dim, and {num_heads} does not divide {dim}")
        self.dim, self.num_heads, self.residual = dim, num_heads, residual
        self.norm_x = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_tokens = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, tokens: Float[Tensor, "b s d"], x: Float[Tensor, "b *grid d"]) -> Float[Tensor, "b *grid d"]:
        check_tokens("Reproject", tokens, x, self.dim, tokens.shape[1])
        heads = self.num_heads
        q = rearrange(self.q(self.norm_x(x.flatten(1, -2))), "b n (e c) -> b e n c", e=heads)
        k, v = rearrange(self.kv(self.norm_tokens(tokens)), "b s (two e c) -> two b e s c", two=2, e=heads).unbind(0)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b e n c -> b n (e c)")
        out = self.proj(out).reshape(x.shape).to(x.dtype)
        return x + out if self.residual else out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, residual={self.residual}"


def spread(B: Float[Tensor, "b s n"], Y: Float[Tensor, "b s d"]) -> Float[Tensor, "b n d"]:
    """β Y: every position takes the tokens by its weights, summed in float32."""
    with full_precision(Y):
        return torch.bmm(B.float().transpose(1, 2), Y.float())


def check_tokens(name: str, tokens: Tensor, x: Tensor, dim: int, num_tokens: int) -> None:
    fits = (
        tokens.ndim == 3
        and x.ndim >= 3
        and tokens.shape[0] == x.shape[0]
        and tokens.shape[1] == num_tokens
        and tokens.shape[2] == x.shape[-1] == dim
    )
    if not fits:
        raise ValueError(
            f"{name} takes tokens (b, {num_tokens}, {dim}) and x (b, …, {dim}) with the same b, and got "
            f"tokens {tuple(tokens.shape)} and x {tuple(x.shape)}"
        )
