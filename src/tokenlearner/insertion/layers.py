"""The parts that sit inside a host: one that learns tokens before a block, one that wraps a block, and the grid.

Nothing here replaces or renames a module of the host. The learner becomes a *child* of the block it precedes, and a
forward pre-hook reads it from there, so the host's state-dict keys stay as they are, and ``deepcopy`` and pickle carry
it along (a closure would keep calling the original model's learner). For the architecture with a fuser the block's
input is needed again after the block. State kept between two hooks does not export, so there a wrapper takes the
block's place and *shares* the block's dictionaries of children and parameters: same keys, and a parameter replaced on
either side (``load_state_dict(assign=True)``, ``to_empty``, sharding) is replaced on both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import in_recomputation
from tokenlearner.core.alpha import Grid
from tokenlearner.core.fuser import Unpool
from tokenlearner.core.learner import TokenLearner

MOST_PENDING_INPUTS = 4096  # inputs of checkpointed layers that can wait for their backward at once


class GridRecord:
    """The (h, w) of the images now passing through a host, as its patch embedding saw them.

    Gradient checkpointing runs a layer again during backward, when images of another size may have passed since. What
    it hands the layer then is the input it kept, so grids are also remembered by the address of that input: as long as
    a backward is to come the input is alive, and no other can have its address.
    """

    def __init__(self) -> None:
        self.current: Grid | None = None
        self._in_recomputation = False  # whether current was noted in one, because all of the host is checkpointed
        self._by_input: OrderedDict[int, Grid] = OrderedDict()

    def note(self, grid: Grid) -> None:
        self.current, self._in_recomputation = grid, in_recomputation()

    def read(self, x: Float[Tensor, "b m d"], positions: int) -> Grid:
        """The grid of ``x``, a layer's input with ``positions`` tokens on the grid."""
        grid = self._remembered(x) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else self.current
        if grid is None:
            raise RuntimeError("the host's patch embedding has not run, so the grid of its tokens is not known")
        if grid[0] * grid[1] != positions:
            raise ValueError(
                f"the images make a grid of {grid[0]}×{grid[1]} = {grid[0] * grid[1]} patches, but {positions} tokens "
                "reached the TokenLearner; something in between (patch dropout, say) took or added some"
            )
        return grid

    def _remembered(self, x: Tensor) -> Grid | None:
        try:
            address = x.data_ptr()
        except RuntimeError:  # a tensor without storage, of torch.func or of a tracer
            return self.current
        if in_recomputation():
            if self._in_recomputation:
                return self.current
            return self._by_input.get(address, self.current)
        if self.current is not None:
            self._by_input[address] = self.current
            self._by_input.move_to_end(address)
            if len(self._by_input) > MOST_PENDING_INPUTS:
                self._by_input.popitem(last=False)
        return self.current


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
        refuse_masks(args[1:], kwargs)
        learner = module.token_learner
        assert isinstance(learner, TokenLearner)
        prefix, X = split_prefix(args[0], self.num_prefix_tokens)
        Z = learner(X, self.record.read(args[0], X.shape[1]))
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
        refuse_masks(args, kwargs)
        prefix, X = split_prefix(x, self.num_prefix_tokens)
        grid = self.record.read(x, X.shape[1])
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
            # As a string: torch.compile can't trace Callable[...].
            dynamic_feat_size = cast("Callable[..., Grid]", module.dynamic_feat_size)
            self.record.note(dynamic_feat_size(args[0].shape[-2:]))


def split_prefix(x: Float[Tensor, "b n d"], count: int) -> tuple[Tensor | None, Tensor]:
    return (x[:, :count], x[:, count:]) if count else (None, x)


def join_prefix(prefix: Tensor | None, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


def refuse_masks(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for what a layer was given besides its tokens and that only fits the full grid."""
    masks = [*args, kwargs.get("attn_mask"), kwargs.get("attention_mask")]
    if any(isinstance(mask, Tensor) for mask in masks):
        raise ValueError("an attention mask over the patches does not fit the learned tokens; call without a mask")
    if kwargs.get("is_causal") or any(arg is True for arg in args):
        raise ValueError(
            "causal attention has no meaning over learned tokens, which have no order; use is_causal=False"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
            if isinstance(module, FusedLayer):
                module.block.training = training


def drop_hooks(module: nn.Module, kind: type) -> None:
    """Removes a module's hooks of one class; handles don't survive deepcopy and pickle, the hooks do."""
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
            del hooks[key]
            flags.pop(key, None)
