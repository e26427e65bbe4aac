"""Tokens learned over space and time: what arXiv 2106.11297 names as its limit, that maps come from one frame alone.

Two steps beyond it, both the per-frame :class:`TokenLearner` when they see one frame. ``NeighbourTokenLearner`` still
learns S tokens per frame, but α also sees the frames around. ``WindowTokenLearner`` learns S tokens for several frames
together, so that a clip has fewer tokens. Their parameters carry TokenLearner's names, so that a trained per-frame
learner's can be loaded (``strict=False``), and what is new starts at zero, so that they begin where it ended.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import full_precision, positive_int
from tokenlearner.core.alpha import Grid
from tokenlearner.core.learner import Kind, Pool, TokenLearner

_LOOKING = ("mlp", "conv", "conv1", "gate")  # the kinds whose maps depend on what is in the frame


class NeighbourTokenLearner(TokenLearner):
    """Per-frame tokens whose maps see neighbouring frames: ``z_i = ρ(X_t ⊙ γ(α_i(X_t + Σ_k w_k ⊙ X_{t+k})))``.

    The weights w over time are one per channel and offset (a depthwise convolution), zero at first: a new one is the
    per-frame learner. Outside the clip X is zero. Tokens are pooled from the frame itself alone.

    Input ``(b, t, h, w, d)``, or ``(b, t, n, d)`` with ``grid=(h, w)``. Output ``(b, t, s, d)``.

    Args:
        dim, num_tokens, kind, grid, pool, hidden_dim, dropout: As :class:`TokenLearner` has them. Of the kinds, those
            that look at the picture: ``"mlp"``, ``"conv"``, ``"conv1"``, ``"gate"``.
        window: Frames α sees, an odd number: the frame itself and (window − 1) / 2 on either side.

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
        window: int = 3,
        pool: Pool | None = None,
        hidden_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        _check_kind(type(self).__name__, kind)
        super().__init__(dim, num_tokens, kind, grid, pool=pool, hidden_dim=hidden_dim, dropout=dropout)
        self.window = positive_int("window", window)
        if self.window % 2 == 0:
            raise ValueError(f"window must be odd, to reach as far back as ahead, not {window}")
        if self.window > 1:
            self.time_weight = nn.Parameter(torch.zeros(self.dim, self.window))

    def forward(self, x: Float[Tensor, "b t *grid d"], grid: Grid | None = None) -> Float[Tensor, "b t s d"]:
        """Returns the learned tokens Z of each frame. ``grid`` overrides the constructor's for this call."""
        X, t = self._frames(x, grid)
        return rearrange(self._pooled(self._maps(X, t), X), "(b t) s d -> b t s d", t=t)

    def maps(self, x: Float[Tensor, "b t *grid d"], grid: Grid | None = None) -> Float[Tensor, "b t s h w"]:
        """Returns each frame's attention maps after their squash, in float32."""
        X, t = self._frames(x, grid)
        return rearrange(self._maps(X, t), "(b t) s (h w) -> b t s h w", t=t, h=X.shape[1])

    def tokens_and_maps(
        self, x: Float[Tensor, "b t *grid d"], grid: Grid | None = None
    ) -> tuple[Float[Tensor, "b t s d"], Float[Tensor, "b t s h w"]]:
        """Returns what :meth:`forward` and :meth:`maps` return, computing α once."""
        X, t = self._frames(x, grid)
        A = self._maps(X, t)
        tokens = rearrange(self._pooled(A, X), "(b t) s d -> b t s d", t=t)
        return tokens, rearrange(A, "(b t) s (h w) -> b t s h w", t=t, h=X.shape[1])

    def _maps(self, X: Float[Tensor, "bt h w d"], t: int) -> Float[Tensor, "bt s n"]:
        return self._squashed(X if self.window == 1 else X + self._neighbours(X, t))

    def _neighbours(self, X: Float[Tensor, "bt h w d"], t: int) -> Float[Tensor, "bt h w d"]:
        """Σ_k w_k ⊙ X_{t+k} as a sum of shifted clips: a depthwise convolution over so long an axis is slow."""
        clips, reach = rearrange(X, "(b t) h w d -> b t h w d", t=t), self.window // 2
        padded = F.pad(clips, (0, 0, 0, 0, 0, 0, reach, reach))
        total = torch.zeros_like(clips)
        for k in range(self.window):
            total = total + padded[:, k : k + t] * self.time_weight[:, k]
        return rearrange(total, "b t h w d -> (b t) h w d").to(X.dtype)

    def _frames(self, x: Tensor, grid: Grid | None) -> tuple[Float[Tensor, "bt h w d"], int]:
        frames = _checked_clip(type(self).__name__, x)
        return self._feature_map(frames, grid), x.shape[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


class WindowTokenLearner(TokenLearner):
    """S tokens for every ``window`` consecutive frames: positions of all of them compete for, and add up in, one token.

    α reads each frame by itself; softmax and pooling run over the window's space and time. A learned constant per
    token and frame of the window, zero at first, is added to α, or the order of the window's frames would not matter.

    Input ``(b, t, h, w, d)``, or ``(b, t, n, d)`` with ``grid=(h, w)``, t a multiple of the window. Output
    ``(b, t / window, s, d)``.

    Args:
        dim, num_tokens, kind, grid, pool, hidden_dim, dropout: As :class:`TokenLearner` has them. Of the kinds, those
            that look at the picture: ``"mlp"``, ``"conv"``, ``"conv1"``, ``"gate"``. Pools ``"sum"`` and ``"mean"`` run
            over all positions of the window.
        window: Frames that share their tokens.

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
        window: int = 2,
        pool: Pool | None = None,
        hidden_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        _check_kind(type(self).__name__, kind)
        super().__init__(dim, num_tokens, kind, grid, pool=pool, hidden_dim=hidden_dim, dropout=dropout)
        self.window = positive_int("window", window)
        if self.window > 1:
            self.frame_bias = nn.Parameter(torch.zeros(self.num_tokens, self.window))

    def forward(self, x: Float[Tensor, "b t *grid d"], grid: Grid | None = None) -> Float[Tensor, "b windows s d"]:
        """Returns the learned tokens Z of each window. ``grid`` overrides the constructor's for this call."""
        X, t = self._frames(x, grid)
        return self._tokens(self._maps(X), X, t)

    def maps(self, x: Float[Tensor, "b t *grid d"], grid: Grid | None = None) -> Float[Tensor, "b windows s f h w"]:
        """Returns the attention maps after their squash, in float32; f runs over the window's frames.

        For ``"mlp"`` each map sums to one over the window's space and time.
        """
        X, t = self._frames(x, grid)
        return self._unfolded(self._maps(X), X, t)

    def tokens_and_maps(
        self, x: Float[Tensor, "b t *grid d"], grid: Grid | None = None
    ) -> tuple[Float[Tensor, "b windows s d"], Float[Tensor, "b windows s f h w"]]:
        """Returns what :meth:`forward` and :meth:`maps` return, computing α once."""
        X, t = self._frames(x, grid)
        A = self._maps(X)
        return self._tokens(A, X, t), self._unfolded(A, X, t)

    def _maps(self, X: Float[Tensor, "bt h w d"]) -> Float[Tensor, "bwindows s fn"]:
        """α of every frame, squashed over the windows."""
        logits = rearrange(self.alpha(X, self.used_tokens), "(b f) s n -> b s f n", f=self.window)
        with full_precision(X):
            logits = logits.float()
            if self.window > 1:
                logits = logits + self.frame_bias[: self.used_tokens, :, None]
            logits = logits.flatten(2)
            return logits.softmax(dim=-1) if self.pool == "softmax" else logits.sigmoid()

    def _tokens(
        self, A: Float[Tensor, "bwindows s fn"], X: Float[Tensor, "bt h w d"], t: int
    ) -> Float[Tensor, "b windows s d"]:
        tall = rearrange(X, "(b f) h w d -> b (f h) w d", f=self.window)  # a window's frames under each other
        return rearrange(self._pooled(A, tall), "(b t) s d -> b t s d", t=t // self.window)

    def _unfolded(
        self, A: Float[Tensor, "bwindows s fn"], X: Float[Tensor, "bt h w d"], t: int
    ) -> Float[Tensor, "b windows s f h w"]:
        windows = t // self.window
        return rearrange(A, "(b t) s (f h w) -> b t s f h w", t=windows, f=self.window, h=X.shape[1])

    def _frames(self, x: Tensor, grid: Grid | None) -> tuple[Float[Tensor, "bt h w d"], int]:
        frames = _checked_clip(type(self).__name__, x)
        if x.shape[1] % self.window:
            raise ValueError(
                f"WindowTokenLearner(window={self.window}) got {x.shape[1]} frames in shape {tuple(x.shape)}; "
                f"give a multiple of {self.window}"
            )
        return self._feature_map(frames, grid), x.shape[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


def _check_kind(name: str, kind: str) -> None:
    if kind not in _LOOKING:
        raise ValueError(f"{name} takes kind {', '.join(map(repr, _LOOKING))}, not {kind!r}")


def _checked_clip(name: str, x: Tensor) -> Tensor:
    """The clips' frames one after the other: (b, t, …) → (b·t, …)."""
    if x.ndim not in (4, 5) or x.shape[1] == 0:
        raise ValueError(f"{name} takes (b, t, h, w, d), or (b, t, n, d) with a grid, and got shape {tuple(x.shape)}")
    return x.flatten(0, 1)
