"""How fast models really are on this machine, measured so that a comparison holds when the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenlearner.insertion.layers import evaluating


@dataclass(frozen=True)
class Speed:
    """Forward passes of one model. ``images_per_second`` is the median over rounds; ``ratio`` is the median over
    rounds of this model's speed over the first model's in the same round, so drift between rounds cancels out."""

    name: str
    images_per_second: float
    spread: float
    """Half the interquartile range of images_per_second."""
    ratio: float
    rounds: int
    batch_size: int


@torch.inference_mode()
def measure_speed(
    models: Mapping[str, nn.Module], inputs: Tensor, *, rounds: int = 15, seconds_per_round: float = 0.2
) -> list[Speed]:
    """Times the forward pass of each model on ``inputs`` (b, c, h, w), in turn, ``rounds`` times.

    Every round runs each model for about ``seconds_per_round``, so that all see the same moments of a busy machine.
    The models run in eval mode and are left in their own.
    """
    repeats = {name: _calls_for(model, inputs, seconds_per_round) for name, model in models.items()}
    rates: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds):
        names = list(models)[:: 1 if turn % 2 == 0 else -1]  # neither always follows the other
        for name in names:
            with evaluating(models[name]):
                elapsed = _time(models[name], inputs, repeats[name])
            rates[name].append(len(inputs) * repeats[name] / elapsed)
    first = rates[next(iter(models))]
    return [
        Speed(
            name=name,
            images_per_second=statistics.median(values),
            spread=_half_interquartile(values),
            ratio=statistics.median(value / base for value, base in zip(values, first)),
            rounds=rounds,
            batch_size=len(inputs),
        )
        for name, values in rates.items()
    ]


def _calls_for(model: nn.Module, inputs: Tensor, seconds: float) -> int:
    """Warms up, then says how many calls fill ``seconds``."""
    with evaluating(model):
        _time(model, inputs, 2)
        return max(1, round(seconds / max(_time(model, inputs, 2) / 2, 1e-6)))


def _time(model: nn.Module, inputs: Tensor, calls: int) -> float:
    _synchronise(inputs)
    start = time.perf_counter()
    for _ in range(calls):
        model(inputs)
    _synchronise(inputs)
    return time.perf_counter() - start


def _synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _half_interquartile(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2
