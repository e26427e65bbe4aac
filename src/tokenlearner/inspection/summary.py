"""What a run came to: one ``summary.json`` for machines, one table for people."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tokenlearner.insertion.saving import write_whole
from tokenlearner.inspection.cost import describe_tokens


@dataclass(frozen=True)
class ModelResult:
    """One trained model. ``accuracy`` is a share (0 to 1) of held-out images or clips, or whatever else ``metric``
    names; ``macs`` are for one image or clip.
    """

    name: str
    accuracy: float
    parameters: int
    macs: int
    images_per_second: float
    """Clips, where ``inputs`` says so."""
    tokens_per_layer: tuple[int, ...]
    images_per_second_spread: float = 0.0
    speedup: float = 1.0
    """Median over rounds of this model's images per second over the first model's in the same round."""
    train_seconds: float = 0.0
    metric: str = "accuracy"
    inputs: Literal["images", "clips"] = "images"
    history: Sequence[Mapping[str, float]] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "accuracy": self.accuracy,
            "metric": self.metric,
            "inputs": self.inputs,
            "parameters": self.parameters,
            "macs": self.macs,
            "flops": 2 * self.macs,
            "images_per_second": round(self.images_per_second, 1),
            "images_per_second_spread": round(self.images_per_second_spread, 1),
            "speedup": round(self.speedup, 3),
            "tokens_per_layer": list(self.tokens_per_layer),
            "train_seconds": round(self.train_seconds, 1),
        }


def columns(results: Sequence[ModelResult]) -> tuple[str, ...]:
    """Titles of the table that ends every run, for the terminal and the report alike; ``results`` share their inputs.

    There is always at least one result.
    """
    inputs, metric = results[0].inputs, results[0].metric
    return (
        "model",
        "cosine" if metric == "cosine" else "accuracy",
        "parameters",
        f"MACs / {inputs.removesuffix('s')}",
        f"{inputs}/s",
        "tokens per layer",
    )


def score(result: ModelResult) -> str:
    if result.metric == "cosine":
        return f"{result.accuracy:.4f}"
    return f"{result.accuracy:.2%}" + ("" if result.metric == "accuracy" else f" {result.metric}")


def cells(result: ModelResult, first: ModelResult) -> tuple[str, ...]:
    """A row of that table: what ``result`` came to, and its MACs and speed beside those of ``first``."""
    macs, speed = count(result.macs), f"{result.images_per_second:,.0f}"
    if result is not first:
        macs += f" ({result.macs / first.macs:.2f}×)"
        speed += f" ({result.speedup:.2f}×)"
    return (
        result.name,
        score(result),
        f"{result.parameters:,}",
        macs,
        speed,
        describe_tokens(result.tokens_per_layer),
    )


def count(number: float) -> str:
    """1,234,567 as 1.23 M."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * scale:  # 999,999 is 1 M, not 1e+03 k
            return f"{number / scale:.3g} {unit}"
    return f"{number:g}"


def write_summary(path: Path, seconds: float, results: Sequence[ModelResult], **more: Any) -> dict[str, Any]:
    """Writes ``{"seconds", "models": […], …}`` and returns it."""
    summary = {
        "seconds": round(seconds, 1),
        "models": [result.to_dict() for result in results],
        **more,
        "hardware": hardware(),
        "torch": torch.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: (json.dumps(summary, indent=2) + "\n").encode()})
    return summary


def hardware() -> str:
    """The machine in words: processor, threads torch uses, GPU."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {torch.get_num_threads()} threads{gpu}"


def command_line(program: str, arguments: Sequence[str]) -> str:
    """The line that was typed, to be kept with what it measured: folders of this machine, which say nothing on another,
    are ``DIR`` in it, and a file keeps its name.
    """

    def anywhere(argument: str) -> str:
        option, equals, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
        path = Path(value)
        if not path.is_absolute():
            return argument
        return option + equals + (f"DIR/{path.name}" if path.suffix else "DIR")

    return f"{program} {shlex.join(anywhere(argument) for argument in arguments)}".rstrip()


def git_commit(folder: Path, of: Sequence[str] = ("src", "studies/*.py", "studies/*.yaml")) -> str:
    """HEAD of the repository that ``folder`` is in, with ``-dirty`` behind it if one of the paths ``of`` differs from
    it; ``unknown`` outside of one.
    """

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()
        except OSError:  # git is not installed
            return ""

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    root = git("rev-parse", "--show-toplevel")
    dirty = root and git("-C", root, "status", "--porcelain", "--", *of)
    return f"{commit}-dirty" if dirty else commit


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
