"""The parts that sit inside a host: one that learns tokens before a block, one that wraps a block, and the grid.

Nothing here replaces or renames a module of the host. The learner becomes a *child* of the block it precedes, and a
forward pre-hook reads it from there, so the host's state-dict keys stay as they are, and ``deepcopy`` and pickle carry
it along (a closure would keep calling the original model's learner). For the architecture with a fuser the block's
input is needed again after the block. State kept between two hooks does not export, so there a wrapper takes the
block's place and *shares* the block's dictionaries of children and parameters: same keys, and a parameter replaced on
either side (``load_state_dict(assign=True)``, ``to_empty``, sharding) is replaced on both.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core._numerics import in_recomputation
from tokenlearner.core.alpha import Grid
from tokenlearner.core.fuser import Unpool
from tokenlearner.core.learner import TokenLearner
from tokenlearner.core.spacetime import NeighbourTokenLearner, WindowTokenLearner

HostGrid = Grid | tuple[int, int, int]  # (h, w) of an image's tokens, (slices, h, w) of a clip's

OVER_TIME = (NeighbourTokenLearner, WindowTokenLearner)  # the learners that take clips, not slices one by one

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
WithoutGrid = Callable[[tuple[Any, ...], dict[str, Any]], Arguments]  # see Host.without_grid

TOKENS = ("x", "hidden_states")  # the names under which libraries hand a layer its tokens

MOST_PENDING_INPUTS = 4096  # inputs of checkpointed layers that can wait for their backward at once


class GridRecord:
    """The grid of the images or clips now passing through a host, as its patch embedding saw them.

    Gradient checkpointing runs a layer again during backward, when images of another size may have passed since. What
    it hands the layer then is the input it kept, so grids are also remembered by the address of that input: as long as
    a backward is to come the input is alive, and no other can have its address.
    """

    def __init__(self) -> None:
        self.current: HostGrid | None = None
        self._in_recomputation = False  # whether current was noted in one, because all of the host is checkpointed
        self._by_input: OrderedDict[int, HostGrid] = OrderedDict()

    def note(self, grid: HostGrid) -> None:
        self.current, self._in_recomputation = grid, in_recomputation()

    def read(self, x: Float[Tensor, "b m d"], positions: int) -> HostGrid:
        """The grid of ``x``, a layer's input with ``positions`` tokens on the grid."""
        grid = self._remembered(x) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else self.current
        if grid is None:
            raise RuntimeError("the host's patch embedding has not run, so the grid of its tokens is not known")
        if math.prod(grid) != positions:
            raise ValueError(
                f"the {'images' if len(grid) == 2 else 'clips'} make a grid of {'×'.join(map(str, grid))} = "
                f"{math.prod(grid)} patches, but {positions} tokens reached the TokenLearner; "
                "something in between (patch dropout, say) took or added some"
            )
        return grid

    def _remembered(self, x: Tensor) -> HostGrid | None:
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


class Hooked:
    """A layer that has hooks of ours: of a subclass of its class, under the same name.

    ``torch.compile`` does not look at hooks when it asks whether code that it compiled before fits another model, but
    it does look at types. Without a type of its own, a model compiled after its host would silently run as the host.
    """

    __slots__ = ()  # an object's class can only be changed to one of the same layout
    host_class: ClassVar[Any]


@functools.cache
def hooked_class(host_class: Any) -> Any:
    def reduce(self: nn.Module, protocol: Any) -> Any:
        """For pickle and deepcopy: a class is found by its name, and this one is not there."""
        reduced: Any = host_class.__reduce_ex__(self, protocol)
        _, (_, *arguments), *state = reduced
        return _new_hooked, (host_class, *arguments), *state

    names = {name: getattr(host_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**names, "host_class": host_class, "__reduce_ex__": reduce}
    return type(host_class.__name__, (host_class, Hooked), members)


def _new_hooked(host_class: Any, *arguments: Any) -> Any:
    return host_class.__new__(hooked_class(host_class), *arguments)


def hook_layer(layer: nn.Module, hook: LearnTokens | LeaveGrid) -> None:
    """Registers a forward pre-hook that :func:`drop_hooks` takes off again."""
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    if not isinstance(layer, Hooked):
        host_class: Any = type(layer)
        layer.__class__ = hooked_class(host_class)


class LearnTokens:
    """Forward pre-hook: replaces the grid tokens entering ``module`` by those its ``token_learner`` makes of them.

    Prefix tokens (cls, registers, distillation) are not on the grid and pass around. Of a clip, every slice is learned
    from by itself, by the same learner, unless that one looks over time.
    """

    def __init__(self, num_prefix_tokens: int, record: GridRecord, without_grid: WithoutGrid) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.record = record
        self.without_grid = without_grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        (x, *others), kwargs = self.without_grid(*tokens_first(args, kwargs))
        learner = module.token_learner
        assert isinstance(learner, TokenLearner)
        prefix, X = split_prefix(x, self.num_prefix_tokens)
        grid = self.record.read(x, X.shape[1])
        Z, _ = learn(learner, *slices_of(X, grid), grid)
        return (join_prefix(prefix, Z), *others), kwargs


class LeaveGrid:
    """Forward pre-hook of the layers after the one that learns: adapts what else the host hands them."""

    def __init__(self, without_grid: WithoutGrid) -> None:
        self.without_grid = without_grid

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        return self.without_grid(*tokens_first(args, kwargs))


class FusedLayer(nn.Module):
    """TokenLearner → the host's block → TokenFuser with residual: tokens inside, the full grid outside.

    Args:
        block: The host's block; it keeps its own class and forward, and is called as before, on S tokens.
        learner, fuser: Become children next to the block's own (``token_learner``, ``token_fuser``).
        num_prefix_tokens: Tokens in front of the grid's, which pass around the learner.
        record: Where the host's patch embedding notes the grid.
        without_grid: Adapts what else the block is handed to tokens off the grid.
    """

    def __init__(
        self,
        block: nn.Module,
        learner: TokenLearner,
        fuser: nn.Module,
        num_prefix_tokens: int,
        record: GridRecord,
        without_grid: WithoutGrid,
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
        self.without_grid = without_grid

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (x, *others), kwargs = self.without_grid(*tokens_first(args, kwargs))
        prefix, X = split_prefix(x, self.num_prefix_tokens)
        grid = self.record.read(x, X.shape[1])
        unpool = isinstance(self.token_fuser, Unpool)
        frames = getattr(self.token_fuser, "num_frames", None)
        if frames not in (None, grid[0]):
            raise ValueError(f"mix='clip' was inserted for clips of {frames} slices, and these have {grid[0]}")
        slices, frame = slices_of(X, grid)
        Z, A = learn(self.token_learner, slices, frame, grid, with_maps=unpool)
        out = self.block(join_prefix(prefix, Z), *others, **kwargs)
        rest = out[1:] if isinstance(out, tuple) else None  # some libraries' layers return more than their tokens
        prefix, Y = split_prefix(out if rest is None else out[0], self.num_prefix_tokens)
        if frames is not None:
            fused = self.token_fuser(Y, rearrange(X, "b (t n) d -> b t n d", t=grid[0]))
            fused = rearrange(fused, "b t n d -> b (t n) d")
        else:
            maps = () if A is None else (A,)
            fused = from_slices(self.token_fuser(slices_of(Y, grid)[0], slices, *maps), grid)
        joined = join_prefix(prefix, fused)
        return joined if rest is None else (joined, *rest)

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
    """Forward hook of a patch embedding: notes the grid of the images or clips that passed."""

    def __init__(self, record: GridRecord) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # Types as strings: torch.compile can't trace Callable[...].
        if output.ndim > 3:  # (b, h, w, d) or (b, t, h, w, d): flattened later, after the position embedding
            self.record.note(cast("HostGrid", tuple(output.shape[1:-1])))
        else:
            dynamic_feat_size = cast("Callable[..., HostGrid]", module.dynamic_feat_size)
            self.record.note(dynamic_feat_size(args[0].shape[2:]))


def slices_of(X: Float[Tensor, "b m d"], grid: HostGrid) -> tuple[Float[Tensor, "bt n d"], Grid]:
    """Feature maps to learn from, with their (h, w): images as they are, each slice of a clip as one of its own."""
    if len(grid) == 2:
        return X, grid
    t, h, w = grid
    return rearrange(X, "b (t n) d -> (b t) n d", t=t), (h, w)


def from_slices(X: Float[Tensor, "bt n d"], grid: HostGrid) -> Float[Tensor, "b m d"]:
    """Undoes :func:`slices_of`: the slices of a clip one after the other."""
    return X if len(grid) == 2 else rearrange(X, "(b t) n d -> b (t n) d", t=grid[0])


def learn(
    learner: TokenLearner, slices: Float[Tensor, "bt n d"], frame: Grid, grid: HostGrid, *, with_maps: bool = False
) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "bt s h w"] | None]:
    """The tokens of images or clips, slice after slice; where asked for, also the maps of every slice.

    A learner over windows has no maps of a slice, and is not to be asked.
    """
    x = input_of(learner, slices, grid)
    Z, A = learner.tokens_and_maps(x, frame) if with_maps else (learner(x, frame), None)
    if isinstance(learner, OVER_TIME):
        return rearrange(Z, "b t s d -> b (t s) d"), None if A is None else rearrange(A, "b t s h w -> (b t) s h w")
    return from_slices(Z, grid), A


def input_of(learner: TokenLearner, slices: Float[Tensor, "bt n d"], grid: HostGrid) -> Float[Tensor, "b *t n d"]:
    """What ``learner`` takes: clips where it looks over time, else every slice as a feature map of its own."""
    return rearrange(slices, "(b t) n d -> b t n d", t=grid[0]) if isinstance(learner, OVER_TIME) else slices


def by_slice(learner: TokenLearner, A: Float[Tensor, "b *maps h w"]) -> Float[Tensor, "b *slices s h w"]:
    """What ``learner.maps`` returned, with a window's maps cut into those of its slices."""
    return rearrange(A, "b e s f h w -> b (e f) s h w") if isinstance(learner, WindowTokenLearner) else A


def tokens_first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """A layer's arguments with its tokens as the first one, under whatever name it was handed them."""
    if args:
        return args, kwargs
    name = next(name for name in TOKENS if name in kwargs)
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def split_prefix(x: Float[Tensor, "b n d"], count: int) -> tuple[Tensor | None, Tensor]:
    return (x[:, :count], x[:, count:]) if count else (None, x)


def join_prefix(prefix: Tensor | None, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
    return tokens if prefix is None else torch.cat([prefix, tokens], dim=1)


def unmasked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """:meth:`Host.without_grid` of layers that are handed nothing of the grid but masks, which are refused."""
    refuse_masks(args[1:], kwargs)
    return args, kwargs


def refuse_masks(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError for what a layer was given besides its tokens and that only fits the full grid."""
    masks = [*args, kwargs.get("attn_mask"), kwargs.get("attention_mask")]
    if any(isinstance(mask, Tensor) for mask in masks):
        raise ValueError("an attention mask over the patches does not fit the learned tokens; call without a mask")
    if kwargs.get("is_causal") or any(arg is True for arg in args):
        raise ValueError(
            "causal attention has no meaning over learned tokens, which have no order; use is_causal=False"
        )


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called or ``module`` is what ``torch.compile`` returned."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


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
    ours = (LearnTokens, LeaveGrid)
    if isinstance(module, Hooked) and not any(isinstance(hook, ours) for hook in module._forward_pre_hooks.values()):
        module.__class__ = type(module).host_class
