"""The parts that sit inside a host: one that learns tokens before a block, one that wraps a block, and the grid.

Nothing here replaces or renames a module of the host. The learner becomes a *child* of the block it precedes, and a
forward pre-hook reads it from there, so the host's state-dict keys stay as they are, and ``deepcopy`` and pickle carry
it along (a closure would keep calling the original model's learner). For the architecture with a fuser the block's
input is needed again after the block. State kept between two hooks does not export, so there a wrapper takes the
block's place and *shares* the block's dictionaries of children and parameters: same keys, and a parameter replaced on
either side (``load_state_dict(assign=True)``, ``to_empty``, sharding) is replaced on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import in_recomputation
from tokenlearner.core.fuser import Unpool
from tokenlearner.core.learner import Grid, TokenLearner


class GridRecord:
    """The (h, w) of the images now passing through a host, as its patch embedding saw them.

    Gradient checkpointing runs a block again during backward, when another image size may have passed since; the
    sizes of pending forwards are therefore kept by their number of positions.
    """

    def __init__(self) -> None:
        self.current: Grid | None = None
        self._pending: dict[int, Grid] = {}
        self._ambiguous: set[int] = set()
        self._recomputed = False

    def note(self, grid: Grid) -> None:
        self.current = grid
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._recomputed:  # a backward has run since: earlier forwards are done with
            self._pending, self._ambiguous, self._recomputed = {}, set(), False
        positions = grid[0] * grid[1]
        if self._pending.setdefault(positions, grid) != grid:
            self._ambiguous.add(positions)

    def read(self, positions: int) -> Grid:
        if in_recomputation():
            self._recomputed = True
            if positions in self._ambiguous:
                raise RuntimeError(
                    f"gradient checkpointing can't tell which of two image shapes with {positions} patches it "
                    "recomputes; call backward before the next forward"
                )
            grid = self._pending.get(positions, self.current)
        else:
            grid = self.current
        if grid is None:
            raise RuntimeError("the host's patch embedding has not run, so the grid of its tokens is not known")
        if grid[0] * grid[1] != positions:
            raise ValueError(
                f"the images make a grid of {grid[0]}×{grid[1]} = {grid[0] * grid[1]} patches, but {positions} tokens "
                "reached the TokenLearner; something in between (patch dropout, say) took or added some"
            )
        return grid


class LearnTokens:
    """Forward pre-hook: replaces the grid tokens entering ``module`` by those its ``token_learner`` makes of them.

    Prefix tokens (cls, registers, distillation) are not on the grid and pass around.
    """

    def __init__(self, num_prefix_tokens: int, record: GridRecord) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.record = record

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        refuse_masks(kwargs)
        learner = module.token_learner
        assert isinstance(learner, TokenLearner)
        prefix, X = split_prefix(args[0], self.num_prefix_tokens)
        Z = learner(X, self.record.read(X.shape[1]))
        return (join_prefix(prefix, Z), *args[1:]), kwargs


class FusedLayer(nn.Module):
    """TokenLearner → the host's block → TokenFuser with residual: tokens inside, the full grid outside.

    Args:
        block: The host's block; it keeps its own class and forward, and is called as before, on S tokens.
        learner, fuser: Become children next to the block's own (``token_learner``, ``token_fuser``).
    """

    def __init__(
        self, block: nn.Module, learner: TokenLearner, fuser: nn.Module, num_prefix_tokens: int, record: GridRecord
    ) -> None:
        super().__init__()
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[shared] = block.__dict__[shared]
        self.__dict__["block"] = block  # not registered as a child: its keys are already ours
        self.__dict__["training"] = block.training
        self.token_learner = learner
        self.token_fuser = fuser
        self.num_prefix_tokens = num_prefix_tokens
        self.record = record

    def forward(self, x: Float[Tensor, "b n d"], *args: Any, **kwargs: Any) -> Float[Tensor, "b n d"]:
        refuse_masks(kwargs)
        prefix, X = split_prefix(x, self.num_prefix_tokens)
        grid = self.record.read(X.shape[1])
        unpool = isinstance(self.token_fuser, Unpool)
        Z, A = self.token_learner.tokens_and_maps(X, grid) if unpool else (self.token_learner(X, grid), None)
        out = self.block(join_prefix(prefix, Z), *args, **kwargs)
        prefix, Y = split_prefix(out, self.num_prefix_tokens)
        X = self.token_fuser(Y, X, A) if unpool else self.token_fuser(Y, X)
        return join_prefix(prefix, X)

    def train(self, mode: bool = True) -> FusedLayer:
        self.block.training = mode
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block":  # not there yet while unpickling
                raise
            return getattr(self.block, name)


class NoteGrid:
    """Forward hook of a patch embedding: notes the grid of the images that passed."""

    def __init__(self, record: GridRecord) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.ndim == 4:  # (b, h, w, d): flattened later, after the position embedding
            self.record.note((output.shape[1], output.shape[2]))
        else:
            dynamic_feat_size = cast(Callable[..., Grid], module.dynamic_feat_size)
            self.record.note(dynamic_feat_size(args[0].shape[-2:]))


def split_prefix(x: Float[Tensor, "b n d"], count: int) -> tuple[Tensor | None, Tensor]:
    return (x[:, :count], x[:, count:]) if count else (None, x)


def join_prefix(prefix: Tensor | None, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


def refuse_masks(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("attn_mask") is not None or kwargs.get("attention_mask") is not None:
        raise ValueError("an attention mask over the patches does not fit the learned tokens; call without a mask")
    if kwargs.get("is_causal"):
        raise ValueError(
            "causal attention has no meaning over learned tokens, which have no order; use is_causal=False"
        )
