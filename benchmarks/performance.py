"""Measures whether a MAC saved is a microsecond saved, by this package and by its peers, and reports it.

python benchmarks/performance.py cpu      # → benchmarks/performance.json (about an hour on two cores, else idle)
python benchmarks/performance.py gpu      # → benchmarks/performance-gpu.json
python benchmarks/performance.py report   # both files → docs/performance.md
python benchmarks/performance.py tiny --output tiny.json   # a minute: does it run here?

A row is one variant of one case, timed in turns with its host (see tokenlearner.inspection.bench). Learned tokens and
the peers that press them are timed once more, in turns with each other ("together"). A row is written as soon as it is
there, and a second call goes on with those that are missing. `--only` takes the cases or variants with that text in
their names, `--minutes` starts no row after so many.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenlearner
import tokenlearner.models  # registers ViViT
from tokenlearner.insertion.hosts import host_of
from tokenlearner.insertion.saving import write_whole
from tokenlearner.inspection.bench import BenchRow, bench
from tokenlearner.inspection.speed import ROUNDS, SECONDS_PER_ROUND
from tokenlearner.inspection.summary import git_commit, hardware

import timm
import torch
from peers import PEERS, at_macs
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
OUTPUTS = {"cpu": ROOT / "benchmarks/performance.json", "gpu": ROOT / "benchmarks/performance-gpu.json"}
LEARNED = "TokenLearner, 8 tokens at ½"

INSERTED: dict[str, dict[str, Any]] = {
    LEARNED: {"num_tokens": 8, "at": 0.5},
    "TokenLearner with fuser, 8 tokens at ½": {"num_tokens": 8, "at": 0.5, "fuser": "fuser"},
    "TokenLearner, 16 tokens at 12": {"num_tokens": 16, "at": 12, "kind": "conv"},
}
TOGETHER = "together"
AGAIN = "the host again"  # what this measurement makes of a difference that is none
FEW = (AGAIN, LEARNED)
FUSED = (*FEW, "TokenLearner with fuser, 8 tokens at ½")
TOKEN_PEERS = ("tome", "top-k", "average pooling", "patch merger")
PRESSING = ("tome", "top-k", "average pooling")  # that learned tokens should not be slower than
ALL_PEERS = (*TOKEN_PEERS, "lower resolution", "narrower", "smaller", "shortened")


@dataclass(frozen=True)
class Case:
    """A host, its input and how it runs, and what it is compared with."""

    name: str
    host: str
    size: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    variants: tuple[str, ...]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Of ``bench``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of ``timm.create_model``."""
    seconds: float = SECONDS_PER_ROUND

    @property
    def pressing(self) -> tuple[str, ...]:
        return tuple(name for name in PRESSING if name in self.variants and LEARNED in self.variants)

    @property
    def has_parts(self) -> bool:
        """Whether hooks may stand between the parts and tell the time: not on a GPU's queue, nor in compiled code."""
        return not self.conditions


def image_case(
    name: str,
    host: str,
    side: int,
    batches: tuple[int, ...],
    variants: tuple[str, ...],
    conditions: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> Case:
    return Case(name, host, (3, side, side), batches, variants, conditions, **more)


_B, _B384, _S = "vit_base_patch16_224", "vit_base_patch16_384", "vit_small_patch16_224"
_GPU = {"device": "cuda", "precision": "bf16", "compiled": True}
_TRAIN = {"mode": "train"}
PLANS: dict[str, tuple[Case, ...]] = {
    "cpu": (
        image_case("ViT-B/16 224²", _B, 224, (8, 1), (*FUSED, *ALL_PEERS)),
        image_case("ViT-B/16 384²", _B384, 384, (8, 1), (*FUSED, *ALL_PEERS)),
        image_case("ViT-S/16 224²", _S, 224, (8, 1), (*FUSED, *ALL_PEERS)),
        image_case("ViT-S/16 224², training step", _S, 224, (8,), FUSED, _TRAIN),
        image_case("ViT-B/16 224², compiled", _B, 224, (8, 1), FEW, {"compiled": True}),
    ),
    # ToMe compiles for minutes, so it is compared eager.
    "gpu": (
        image_case("ViT-B/16 384²", _B384, 384, (64, 256), (*FUSED, *TOKEN_PEERS[1:], "lower resolution"), _GPU),
        image_case("ViT-B/16 384², eager", _B384, 384, (64,), (*FEW, "tome"), {**_GPU, "compiled": False}),
        image_case("ViT-B/16 384², training step", _B384, 384, (64,), FUSED, {**_GPU, **_TRAIN}),
        image_case("ViT-B/16 512²", _B, 512, (64,), FUSED, _GPU, options={"img_size": 512}),
        image_case("ViT-B/16 224²", _B, 224, (256,), FUSED, _GPU),
        Case(
            "ViViT-L/16×2 224²",
            "vivit_large_patch16x2_224",
            (3, 32, 224, 224),
            (8,),
            (AGAIN, "TokenLearner, 16 tokens at 12"),
            _GPU,
        ),
    ),
    "tiny": (
        image_case("test_vit 160²", "test_vit", 160, (2, 1), (*FUSED, *ALL_PEERS), seconds=0.02),
        image_case("test_vit 160², training step", "test_vit", 160, (2,), FEW, _TRAIN, seconds=0.02),
    ),
}

SETTINGS: dict[str, Callable[[Any], str]] = {
    "tome": lambda merges: f"{sum(merges)} merges",
    "top-k": lambda keep: ", ".join(f"{count} from layer {layer}" for layer, count in keep.items()),
    "average pooling": lambda it: f"{it[1]} tokens at layer {it[0]}",
    "patch merger": lambda it: f"{it[1]} tokens at layer {it[0]}",
    "lower resolution": lambda grid: f"{grid[0]}×{grid[1]} patches",
    "narrower": lambda it: f"{it[0]} layers, {it[1]} heads",
    "smaller": lambda it: f"{it[0]} layers, {it[1]} heads",
    "shortened": lambda depth: f"{depth} layers",
}


def variant(name: str, host: nn.Module, size: tuple[int, ...]) -> tuple[nn.Module, str]:
    """The model and its setting; a peer has about the MACs of the host with 8 learned tokens."""
    if name == AGAIN:
        return copy.deepcopy(host), ""
    if name in INSERTED:
        return tokenlearner.insert(copy.deepcopy(host), **INSERTED[name]), ""
    learned = tokenlearner.insert(copy.deepcopy(host), **INSERTED[LEARNED])
    share = tokenlearner.cost(learned, size).macs / tokenlearner.cost(host, size).macs
    choice = at_macs(name, host, share, size)
    return PEERS[name].build(host, choice.setting), SETTINGS[name](choice.setting)


def measure(plan: str, output: Path, only: str, minutes: float, rounds: int) -> None:
    document = begun(plan, output)
    done, stop = {(row["case"], row["variant"]) for row in document["rows"]}, time.monotonic() + 60 * minutes
    wanted = [
        (case, name)
        for case in PLANS[plan]
        for name in case.variants
        if (case.name, name) not in done and (only in case.name or only in name)
    ]
    pressed = {row["case"] for row in document["together"]}
    wanted += [
        (case, TOGETHER)
        for case in PLANS[plan]
        if case.pressing and case.name not in pressed and (only in case.name or only in TOGETHER)
    ]
    for case, name in wanted:
        if time.monotonic() > stop:
            sys.exit(f"{minutes:g} minutes are over before {case.name}, {name}; call again to go on")
        row = together(case, rounds) if name == TOGETHER else row_of(case, name, rounds)
        document["together" if name == TOGETHER else "rows"].append(row)
        write_whole({output: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()})
        print(*lines_of(row), sep="\n", flush=True)


def begun(plan: str, output: Path) -> dict[str, Any]:
    """The document so far; one file is of one machine, or its rows would not go together."""
    machine = {
        "command": f"python benchmarks/performance.py {plan}",
        "hardware": hardware(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
    }
    if not output.exists():
        return {**machine, "rows": [], "together": []}
    document = {"together": [], **json.loads(output.read_text(encoding="utf-8"))}
    if {key: document[key] for key in machine} != machine:
        sys.exit(f"{output} is of another plan, machine or version; move it away, or give another --output")
    return document


def row_of(case: Case, name: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    host = timm.create_model(case.host, **case.options).eval()
    model, setting = variant(name, host, case.size)
    about, rows = timed(case, {"host": host, name: model}, rounds)
    row = {
        "case": case.name,
        "variant": name,
        "setting": setting,
        **about,
        "host": [entry.to_dict() for entry in rows[::2]],
        "measured": [entry.to_dict() for entry in rows[1::2]],
    }
    if name == LEARNED and case.has_parts:
        row["parts"] = [parts(host, model, case.size, batch_size, rounds) for batch_size in case.batch_sizes]
        row["bytes_read_per_second"] = bytes_read_per_second()
    return row


def together(case: Case, rounds: int) -> dict[str, Any]:
    """Learned tokens and the peers that press them in the same rounds; the speed-ups are over learned tokens."""
    torch.manual_seed(0)
    host = timm.create_model(case.host, **case.options).eval()
    models = {name: variant(name, host, case.size)[0] for name in (LEARNED, *case.pressing)}
    about, rows = timed(case, models, rounds)
    return {"case": case.name, "variant": TOGETHER, **about, "measured": [entry.to_dict() for entry in rows]}


def timed(case: Case, models: Mapping[str, nn.Module], rounds: int) -> tuple[dict[str, Any], list[BenchRow]]:
    """What ``bench`` finds for each batch size and model, and under what circumstances."""
    load = os.getloadavg()[0]
    rows = bench(
        models,
        case.size,
        batch_sizes=case.batch_sizes,
        rounds=rounds,
        seconds_per_round=case.seconds,
        **{"device": "cpu", **case.conditions},
    )
    commit = git_commit(ROOT, ("src", "benchmarks/*.py"))
    return {"commit": commit, "load_before": round(load, 2), "rounds": rounds}, rows


def parts(
    host: nn.Module, model: nn.Module, size: tuple[int, ...], batch_size: int, rounds: int
) -> list[dict[str, Any]]:
    """The pass up to the layer that learns, the learning, and the pass from there on: of each the MACs of one input and
    the median seconds of a batch, of the host and of the model, and the bytes of the weights that any batch reads.
    """
    (at,) = tokenlearner.learners(model)
    counted, plain = tokenlearner.cost(model, size), tokenlearner.cost(host, size)
    index = next(i for i, part in enumerate(counted.layers) if part.tokens and part.name.endswith(f".{at}"))
    before = sum(part.macs for part in counted.layers[:index])
    learning = counted.layers[index].macs - counted.layers[index + 1].macs  # the next layer has as many tokens
    macs = {
        "before": (before, before),
        "learning": (0, learning),
        "after": (plain.macs - before, counted.macs - before - learning),
    }
    learner, layers = tokenlearner.learners(model)[at], host_of(model).layers()
    learned = bytes_of(learner)
    after = sum(map(bytes_of, list(layers)[at:])) - learned
    weights = {"before": bytes_of(model) - learned - after, "learning": learned, "after": after}
    x, taken = torch.randn(batch_size, *size), {"host": [], "model": []}
    passes = (("host", host.eval()), ("model", model.eval()))
    with torch.inference_mode():
        once = max(sum(split_seconds(it, at, x, calls=2)) for _, it in passes)
        for turn in range(rounds):
            for who, it in passes[:: 1 if turn % 2 == 0 else -1]:
                taken[who].append(split_seconds(it, at, x, calls=max(1, round(SECONDS_PER_ROUND / once))))
    columns = {who: [statistics.median(column) for column in zip(*rows)] for who, rows in taken.items()}
    return [
        {
            "part": part,
            "macs": counts,
            "seconds": (columns["host"][i], columns["model"][i]),
            "weights": weights[part],
        }
        for i, (part, counts) in enumerate(macs.items())
    ]


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def bytes_read_per_second(size: int = 2**28) -> float:
    """How fast this machine reads memory from one end to the other: the median of 15 sums."""
    x, seconds = torch.ones(size // 4), []
    for _ in range(15):
        start = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / statistics.median(seconds)


def split_seconds(model: nn.Module, at: int, x: Tensor, calls: int) -> tuple[float, ...]:
    """Of one pass, as the mean of ``calls``: to the layer ``at``, in its TokenLearner's hook, and from there on."""
    times: list[float] = []

    def note(module: nn.Module, args: Any) -> None:
        times.append(time.perf_counter())

    layer = host_of(model).layers()[at]
    handles = [layer.register_forward_pre_hook(note, prepend=True), layer.register_forward_pre_hook(note)]
    try:
        for _ in range(calls):
            times.append(time.perf_counter())
            model(x)
            times.append(time.perf_counter())
    finally:
        for handle in handles:
            handle.remove()
    start, entered, learned, end = (times[i::4] for i in range(4))
    marks = ((start, entered), (entered, learned), (learned, end))
    return tuple(statistics.mean(b - a for a, b in zip(*pair)) for pair in marks)


def lines_of(row: Mapping[str, Any]) -> Iterator[str]:
    for entry in row["measured"]:
        yield (
            f"{row['case']}, {entry['name']}, batch {entry['batch_size']}: {entry['images_per_second']:.4g}/s, "
            f"{entry['speedup']:.3f}× of {entry['mac_ratio']:.3f}×, realised {entry['realised']:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*PLANS, "report"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    if arguments.step == "report":
        from performance_report import write_report

        write_report(arguments.output or ROOT / "docs/performance.md")
        return
    output = arguments.output or OUTPUTS.get(arguments.step)
    if output is None:
        parser.error("tiny is no result to keep: say with --output where it goes")
    measure(arguments.step, output, arguments.only, arguments.minutes, arguments.rounds)


if __name__ == "__main__":
    main()
