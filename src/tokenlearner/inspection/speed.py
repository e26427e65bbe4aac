"""How fast models really are on this machine, measured so that a comparison holds when the machine's speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.layers import evaluating

ROUNDS, SECONDS_PER_ROUND = 15, 0.2


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
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    *,
    rounds: int = ROUNDS,
    seconds_per_round: float = SECONDS_PER_ROUND,
) -> list[Speed]:
    """Times the forward pass of each model on ``inputs`` (b, c, h, w), in turn, ``rounds`` times.

    Every round runs each model for about ``seconds_per_round``, so that all see the same moments of a busy machine.
    The models run in eval mode and are left in their own. ``bench`` measures more than this.
    """
    passes = [partial(model, inputs) for model in models.values()]
    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(evaluating(model))
        seconds = seconds_in_turns(passes, inputs.device, rounds=rounds, seconds_per_round=seconds_per_round)
    rates = [[len(inputs) / value for value in values] for values in seconds]
    return [
        Speed(
            name=name,
            images_per_second=statistics.median(values),
            spread=half_interquartile(values),
            ratio=statistics.median(value / base for value, base in zip(values, rates[0])),
            rounds=rounds,
            batch_size=len(inputs),
        )
        for name, values in zip(models, rates)
    ]


def seconds_in_turns(
    passes: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    seconds_per_round: float,
    one_by_one: bool = False,
    after_round: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """For each of ``passes`` the seconds of one call, once a round.

    All are warmed up first. Every round runs each for about ``seconds_per_round``, at least once, and every other round
    in the opposite order, so that none always follows the other.

    Args:
        passes: Called without arguments; what they return is dropped.
        device: Where they run. Calls on a GPU are queued, and waited for before the clock is read.
        rounds, seconds_per_round: How often, and for how long.
        one_by_one: Waits for the device after every call: latencies, not throughputs.
        after_round: Called after each round.
    """
    calls = [_calls_for(run, device, seconds_per_round, one_by_one) for run in passes]
    seconds: list[list[float]] = [[] for _ in passes]
    for turn in range(rounds):
        for i in range(len(passes))[:: 1 if turn % 2 == 0 else -1]:
            seconds[i].append(_time(passes[i], device, calls[i], one_by_one) / calls[i])
        after_round()
    return seconds


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is CUDA's current device if there is one, else the CPU.

    Raises:
        InputError: There is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is not the name of a device: give auto, cpu, cuda or, say, cuda:1") from error
    if wanted.type == "cpu":
        return wanted
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator and accelerator.type == wanted.type else 0
    if (wanted.index or 0) >= count:
        raise InputError(f"there is no device {wanted} here: torch sees {count} of type {wanted.type}")
    return wanted


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of fewer than three values, which have none, the least and the greatest."""
    if len(values) < 3:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def half_interquartile(values: Sequence[float]) -> float:
    low, high = quartiles(values)
    return (high - low) / 2


def _calls_for(run: Callable[[], object], device: torch.device, seconds: float, one_by_one: bool) -> int:
    """Warms up, then says how many calls fill ``seconds``."""
    _time(run, device, 1, one_by_one)
    if _time(run, device, 1, one_by_one) > 2 * seconds:  # one call is more than a round, so two more tell nothing
        return 1
    return max(1, round(seconds / max(_time(run, device, 2, one_by_one) / 2, 1e-6)))


def _time(run: Callable[[], object], device: torch.device, calls: int, one_by_one: bool) -> float:
    _synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
        if one_by_one:
            _synchronise(device)
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
