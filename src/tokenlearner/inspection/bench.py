"""Models side by side on this machine: is a MAC saved a microsecond saved?

The measured speed-up over the first model, divided by how many times fewer MACs the model has, is its *realised
fraction*: 1 where time falls as MACs do. A host that is slow by itself would make any learner look good, so every round
also times one large matrix product, and every row says which share of that rate the model reached.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.layers import is_compiled
from tokenlearner.inspection.cost import Cost, cost
from tokenlearner.inspection.memory import peak_memory
from tokenlearner.inspection.speed import (
    ROUNDS,
    SECONDS_PER_ROUND,
    half_interquartile,
    quartiles,
    seconds_in_turns,
    usable_device,
)

Mode = Literal["forward", "train"]
Precision = Literal["float32", "bf16"]

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}  # large enough for either to reach its rate
STEP = 3  # a training step in forward passes: backward takes two products where forward takes one


@dataclass(frozen=True)
class BenchRow:
    """One model at one batch size. Medians are over rounds; ratios were taken within each round, then their median."""

    name: str
    batch_size: int
    images_per_second: float
    """Clips, of a model that takes clips."""
    images_per_second_spread: float
    """Half the interquartile range."""
    seconds_per_batch: float
    speedup: float
    """Over the first model."""
    speedup_quartiles: tuple[float, float]
    macs: int
    """Of a forward pass on one input, as ``cost`` counts them."""
    mac_ratio: float
    """The first model's MACs over this one's."""
    realised: float
    """speedup / mac_ratio."""
    matmul_share: float
    """This model's MACs a second over those of a large matrix product in the same round and number format; a training
    step counts as three forward passes."""
    parameters: int
    peak_memory: int | None
    """Bytes, see :func:`peak_memory`; None with CUDA graphs, whose memory is set apart before they run."""
    latency: float | None
    """Seconds of one forward pass on one input, waited for; None for training steps."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchRow:
        """What ``to_dict`` gave, also after a way through JSON."""
        return cls(**{**values, "speedup_quartiles": tuple(values["speedup_quartiles"])})


@dataclass(frozen=True)
class Conditions:
    """How models run while they are timed; :func:`bench` explains each."""

    device: torch.device
    precision: Precision = "float32"
    compiled: bool = False
    cuda_graphs: bool = False
    mode: Mode = "forward"

    def __post_init__(self) -> None:
        device = self.device
        if self.precision not in ("float32", "bf16"):
            raise InputError(f"precision is float32 or bf16, not {self.precision!r}")
        if self.mode not in ("forward", "train"):
            raise InputError(f"mode is forward or train, not {self.mode!r}")
        if device.type not in MATMUL_SIDE:
            raise InputError(f"bench times the CPU and CUDA's GPUs, not {device}")
        on_gpu = device.type == "cuda"
        if on_gpu and self.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use float32")
        if self.cuda_graphs and not (self.compiled and on_gpu):
            raise InputError("CUDA graphs go with a compiled model on a GPU")

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def weights(self) -> torch.dtype:
        return self.arithmetic if self.mode == "forward" else torch.float32

    def ready(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """A copy of ``model``, as it is to be timed."""
        twin = copy.deepcopy(model).to(self.device, self.weights).train(self.mode == "train")
        if not self.compiled:
            return twin
        return torch.compile(twin, dynamic=False, mode="reduce-overhead" if self.cuda_graphs else None)

    def passes(
        self, ready: Mapping[str, Callable[[Tensor], Any]], batch_size: int, input_size: tuple[int, ...]
    ) -> list[Callable[[], object]]:
        """What is timed of each model, after it ran once.

        Raises:
            InputError: It did not run.
        """
        inputs = "×".join(map(str, (batch_size, *input_size)))
        try:
            x = torch.randn(batch_size, *input_size).to(self.device, self.weights)
        except RuntimeError as error:
            raise InputError(
                f"there is no room for inputs of {inputs} on {self.device}: {_first_line(error)}"
            ) from error
        passes: list[Callable[[], object]] = []
        for name, model in ready.items():
            run = partial(model, x) if self.mode == "forward" else partial(_step, model, x, self.arithmetic)
            try:
                run()
            except Exception as error:
                reason = _first_line(error)
                raise InputError(f"{name} can't run {inputs} in {self.precision} on {self.device}: {reason}") from error
            passes.append(run)
        return passes


def bench(
    models: Mapping[str, nn.Module],
    input_size: tuple[int, ...],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    compiled: bool = False,
    cuda_graphs: bool = False,
    mode: Mode = "forward",
    rounds: int = ROUNDS,
    seconds_per_round: float = SECONDS_PER_ROUND,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[BenchRow]:
    """Times ``models`` in turns, as :func:`seconds_in_turns` does; a row for each of them at each batch size.

    Copies of the models run, so that the models' modes, weights, gradients, buffers and devices stay as they are; so do
    the states of the random number generators.

    Args:
        models: By name; the first is what the others are compared with.
        input_size: Of one input, without a batch axis: (c, h, w), or (c, t, h, w) of a clip. Pixels are random.
        batch_sizes: At each, all models are timed.
        device: "cpu", "cuda", "cuda:1", …; "auto" is the GPU if there is one.
        precision: "bf16" has weights and inputs in bfloat16 for a forward pass. In a training step it is autocast over
            float32 weights, as recipes train.
        compiled: Whether ``torch.compile`` goes over each model first, for each batch size by itself.
        cuda_graphs: With ``compiled``: replays kernels from CUDA graphs (``mode="reduce-overhead"``).
        mode: "forward" is a pass in eval mode, under ``torch.inference_mode``. "train" is a step in train mode:
            forward, cross-entropy to random labels, backward into empty gradients. No optimizer follows: what that
            takes depends on the number of parameters, which hardly differ, and would only hide what does.
        rounds, seconds_per_round: How often each model is timed, and for how long; at least for one pass.
        progress: Called after each round with how many are done, and of how many.

    Raises:
        InputError: No models, an argument that makes no sense, a device that is not there or has no bfloat16, or a
            model that can't run so; with its name and its own reason.
    """
    conditions = Conditions(usable_device(device), precision, compiled, cuda_graphs, mode)
    _check(models, batch_sizes, rounds, seconds_per_round)
    costs, where, forward = _costs(models, input_size), conditions.device, mode == "forward"
    done, total = count(1), rounds * (len(batch_sizes) + forward)

    def time(passes: list[Callable[[], object]], one_by_one: bool = False) -> list[list[float]]:
        return seconds_in_turns(
            passes,
            where,
            rounds=rounds,
            seconds_per_round=seconds_per_round,
            one_by_one=one_by_one,
            after_round=lambda: progress(next(done), total),
        )

    rows: list[BenchRow] = []
    with torch.random.fork_rng([where] if where.type == "cuda" else []), _room_for_graphs(conditions, len(models)):
        ready = {name: conditions.ready(model) for name, model in models.items()}
        product = matmul_pass(where, conditions.arithmetic)
        with torch.inference_mode(forward):
            latencies: list[float | None] = [None] * len(models)
            if forward:  # a GPU's batches are queued: those of one, below, don't tell how long one waits for it
                alone = time(conditions.passes(ready, 1, input_size), one_by_one=True)
                latencies = [statistics.median(seconds) for seconds in alone]
            for batch_size in batch_sizes:
                passes = conditions.passes(ready, batch_size, input_size)
                *seconds, matmul = time([*passes, product])
                inputs = batch_size * (1 if forward else STEP)
                for name, run, own, counted, latency in zip(models, passes, seconds, costs, latencies):
                    work = inputs * counted.macs / MATMUL_SIDE[where.type] ** 3
                    row = BenchRow(
                        name,
                        batch_size,
                        **_medians(own, seconds[0], matmul, batch_size, costs[0].macs / counted.macs, work),
                        macs=counted.macs,
                        parameters=counted.parameters,
                        peak_memory=None if cuda_graphs else peak_memory(run, where),
                        latency=latency,
                    )
                    rows.append(row)
    return rows


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def matmul_pass(device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """One product of two square matrices of :data:`MATMUL_SIDE`."""
    side = MATMUL_SIDE[device.type]
    a, b, out = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(3))
    return partial(torch.mm, a, b, out=out)


def _check(models: Mapping[str, nn.Module], batch_sizes: Sequence[int], rounds: int, seconds_per_round: float) -> None:
    if not models:
        raise InputError("there is no model to time")
    for name, model in models.items():
        if is_compiled(model):
            raise InputError(f"{name} is compiled already; give the model itself, and compiled=True")
    if not batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        raise InputError(f"batch sizes are different numbers from 1 up, such as 1 and 8, not {list(batch_sizes)}")
    if rounds < 1 or not 0 < seconds_per_round < math.inf:
        raise InputError(f"at least one round of more than 0 seconds is needed, not {rounds} of {seconds_per_round:g}")


def _costs(models: Mapping[str, nn.Module], input_size: tuple[int, ...]) -> list[Cost]:
    counted = []
    for name, model in models.items():
        try:
            counted.append(cost(model, input_size))
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
        if counted[-1].macs == 0:
            raise InputError(f"{name} has no matrix product, convolution or attention, so nothing to compare")
    return counted


def _room_for_graphs(conditions: Conditions, models: int) -> AbstractContextManager[Any]:
    """Models of one class share their code, of which ``torch.compile`` keeps 8 graphs and then, unsaid, no more."""
    if not conditions.compiled:
        return nullcontext()
    import torch._dynamo.config

    return torch._dynamo.config.patch(recompile_limit=8 * (1 + models), accumulated_recompile_limit=256 * (1 + models))


def _step(model: Any, x: Tensor, arithmetic: torch.dtype) -> None:
    """Forward, loss and backward; the gradients are dropped again."""
    with torch.autocast(x.device.type, arithmetic, enabled=arithmetic != torch.float32):
        output = model(x)
        heads = output if isinstance(output, tuple | list) else (output,)  # distilled models train two
        losses = [
            F.cross_entropy(y.flatten(1), torch.randint(y[0].numel(), y.shape[:1], device=x.device)) for y in heads
        ]
    torch.stack(losses).sum().backward()
    model.zero_grad(set_to_none=True)


def _medians(
    own: Sequence[float],
    first: Sequence[float],
    matmul: Sequence[float],
    batch_size: int,
    mac_ratio: float,
    work: float,
) -> dict[str, Any]:
    """What the seconds, round by round, of a model, of the first one and of the matrix product come to.

    ``work`` is what the model's batch takes, in such products.
    """
    rates = [batch_size / seconds for seconds in own]
    ratios = [base / seconds for base, seconds in zip(first, own)]
    speedup = statistics.median(ratios)
    return {
        "images_per_second": statistics.median(rates),
        "images_per_second_spread": half_interquartile(rates),
        "seconds_per_batch": statistics.median(own),
        "speedup": speedup,
        "speedup_quartiles": quartiles(ratios),
        "mac_ratio": mac_ratio,
        "realised": speedup / mac_ratio,
        "matmul_share": statistics.median(work * whole / seconds for whole, seconds in zip(matmul, own)),
    }
