"""What a model costs: parameters, multiply-adds, and how many tokens each layer runs on.

Counted on the ``meta`` device, where no number is computed and attention takes its unfused form: PyTorch's counter
books the CPU's fused attention as nothing. Counted are matrix products, convolutions and attention, as the paper's
tables do; norms, activations and softmax are left out (under 1 % for a ViT).

One multiply-add is one MAC and two FLOPs. The paper's tables 1 to 5 print MACs under the name GFLOPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenlearner.insertion.insert import host_of
from tokenlearner.insertion.layers import FusedLayer, evaluating, tokens_first


@dataclass(frozen=True)
class LayerCost:
    """One part of the model. ``tokens``: the tokens it runs on, prefix tokens included; None where it has none."""

    name: str
    parameters: int
    macs: int
    tokens: int | None

    @property
    def flops(self) -> int:
        return 2 * self.macs


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass on one input of ``input_size``.

    ``tokens`` has one entry for each transformer layer: the tokens that layer runs on, prefix tokens included.
    ``layers`` splits the total by parts in the order they run; the parts add up to the total.
    """

    input_size: tuple[int, ...]
    parameters: int
    macs: int
    tokens: tuple[int, ...]
    layers: tuple[LayerCost, ...]

    @property
    def flops(self) -> int:
        return 2 * self.macs

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "flops": layer.flops} for layer in self.layers]
        return {
            "input_size": list(self.input_size),
            "parameters": self.parameters,
            "macs": self.macs,
            "flops": self.flops,
            "tokens": list(self.tokens),
            "layers": layers,
        }

    def __str__(self) -> str:
        tokens = f", tokens {describe_tokens(self.tokens)}" if self.tokens else ""
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.macs / 1e9:.3f} GMACs = {self.flops / 1e9:.3f} GFLOPs "
            f"at {'×'.join(map(str, self.input_size))}{tokens}"
        )


def cost(model: nn.Module, input_size: tuple[int, ...] = (3, 224, 224)) -> Cost:
    """Counts ``model`` on one input of ``input_size`` (no batch axis), without running it on real numbers.

    For the hosts ``insert`` knows, the parts are the embedding, each transformer layer (a learner and fuser count
    with the layer they belong to), and the head; for any other model its direct children.
    Tied parameters count once.

    Raises:
        ValueError: The model can't take an input of that size; with the model's own reason.
    """
    size = tuple(int(side) for side in input_size)
    if not size or any(side < 1 for side in size):
        raise ValueError(
            f"input_size is one input's shape without a batch axis, such as (3, 224, 224), not {input_size!r}"
        )
    layers, parts = _parts(model)
    state = {name: t.detach().to("meta") for name, t in [*model.named_parameters(), *model.named_buffers()]}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    counter = FlopCounterMode(display=False)
    tally = _Tally(counter)
    with evaluating(model), torch.no_grad(), tally.watch(parts, layers):
        try:
            with counter, torch.device("meta"):
                torch.func.functional_call(model, state, (torch.empty(1, *size, dtype=dtype, device="meta"),))
        except Exception as error:
            raise ValueError(f"{type(model).__name__} can't take an input of {size}: {error}") from error
    total = _macs(counter)
    counted: set[nn.Parameter] = set()  # a tied parameter counts where it comes first
    rows = []
    for name, module in parts.items():
        own = set(module.parameters()) - counted
        counted |= own
        rows.append(LayerCost(name, sum(p.numel() for p in own), tally.macs.get(name, 0), tally.tokens.get(name)))
    return Cost(
        input_size=size,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=total,
        tokens=tuple(tally.tokens[name] for name in layers if name in tally.tokens),
        layers=tuple(_with_rest(rows, total, model)),
    )


def describe_tokens(tokens: tuple[int, ...]) -> str:
    """``196×6 + 8×6`` for six layers on 196 tokens and six on 8."""
    runs: list[tuple[int, int]] = []
    for count in tokens:
        if runs and runs[-1][0] == count:
            runs[-1] = (count, runs[-1][1] + 1)
        else:
            runs.append((count, 1))
    return " + ".join(f"{count}×{length}" for count, length in runs)


def _parts(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The transformer layers by name, and all parts that together are the model, in order."""
    children = {name: child for name, child in model.named_children() if list(child.parameters())}
    try:
        host = host_of(model)
    except TypeError:
        return {}, {part: module for name, child in children.items() for part, module in _blocks_of(name, child)}
    prefix = next(name for name, module in model.named_modules() if module is host.layers())
    layers = {f"{prefix}.{i}": layer for i, layer in enumerate(host.layers())}
    return layers, dict(_around(model, host.layers(), layers))


def _around(
    module: nn.Module, container: nn.Module, layers: dict[str, nn.Module], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The layers and, from the outside in, the modules that hold none of them; in order."""
    for child_name, child in module.named_children():
        name = f"{path}{child_name}"
        if child is container:
            yield from layers.items()
        elif any(inner is container for inner in child.modules()):
            yield from _around(child, container, layers, f"{name}.")
        elif any(True for _ in child.parameters()):
            yield name, child


def _blocks_of(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a stage, of the stages of a backbone; other modules stay whole."""
    nested = isinstance(module, nn.Sequential) and all(not isinstance(c, nn.Conv3d | nn.Conv2d) for c in module)
    if nested and len(list(module.children())) and all(list(c.children()) for c in module.children()):
        for child_name, child in module.named_children():
            yield from _blocks_of(f"{name}.{child_name}", child)
    else:
        yield name, module


class _Tally:
    """Multiply-adds and token counts of watched modules, read off the counter before and after each runs."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter
        self.macs: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    @contextmanager
    def watch(self, parts: dict[str, nn.Module], layers: dict[str, nn.Module]) -> Iterator[None]:
        started: dict[str, int] = {}

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                started[name] = _macs(self.counter)

            return hook

        def leave(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.macs[name] = self.macs.get(name, 0) + _macs(self.counter) - started[name]

            return hook

        def count(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                (x, *_), _ = tokens_first(args, kwargs)
                self.tokens[name] = x.shape[1]

            return hook

        handles = []
        for name, part in parts.items():
            handles.append(part.register_forward_pre_hook(enter(name), prepend=True))  # before a learner's own hook
            handles.append(part.register_forward_hook(leave(name)))
        for name, layer in layers.items():
            inner = layer.block if isinstance(layer, FusedLayer) else layer
            handles.append(inner.register_forward_pre_hook(count(name), with_kwargs=True))  # after the learner's
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _macs(counter: FlopCounterMode) -> int:
    return counter.get_total_flops() // 2


def _with_rest(rows: list[LayerCost], total: int, model: nn.Module) -> list[LayerCost]:
    """Adds what is in no part (position embedding, class token), so that the parts add up to the whole."""
    parameters = sum(p.numel() for p in model.parameters()) - sum(row.parameters for row in rows)
    macs = total - sum(row.macs for row in rows)
    return [*rows, LayerCost("other", parameters, macs, None)] if parameters or macs else rows
