"""The linear layers that run on learned tokens, one image at a time: how fast their weights are read.

python benchmarks/late_linears.py  # → benchmarks/late_linears.json (a minute, on an idle CPU)

8 tokens and the class token from half depth on, in float32. Every way but the last computes the same; summing the
weights is the least that reading them can take.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tokenlearner  # noqa: F401 - before timm
from tokenlearner.inspection.speed import seconds_in_turns
from tokenlearner.inspection.summary import git_commit, hardware

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUT = Path(__file__).parent / "late_linears.json"
HOSTS = {"ViT-B/16 224²": "vit_base_patch16_224", "ViT-S/16 224²": "vit_small_patch16_224"}
TOKENS, ROUNDS = 9, 25


def ways(linears: list[nn.Linear]) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """A function a layer, for each way of doing it."""

    def transposed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = linear.weight.T.contiguous()
        return lambda x: torch.addmm(linear.bias, x[0], weight)[None]

    def packed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TOKENS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, linear.bias, "none", [], "")

    def summed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: linear.weight.sum()

    return {
        "`F.linear`, as the host does it": [lambda x, at=at: F.linear(x, at.weight, at.bias) for at in linears],
        "the weights kept transposed": [transposed(linear) for linear in linears],
        "the weights packed once by oneDNN": [packed(linear) for linear in linears],
        "the weights summed": [summed(linear) for linear in linears],
    }


@torch.inference_mode()
def measure(host: str) -> dict[str, Any]:
    blocks = timm.create_model(host).eval().blocks
    linears = [module for module in blocks[len(blocks) // 2 :].modules() if isinstance(module, nn.Linear)]
    inputs = {n: torch.randn(1, TOKENS, n) for n in {linear.in_features for linear in linears}}

    def run(way: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        return [f(inputs[linear.in_features]) for f, linear in zip(way, linears)]

    found = ways(linears)
    *results, _ = map(run, found.values())
    torch.testing.assert_close(results[1:], results[:1] * len(results[1:]), rtol=1e-4, atol=1e-4)
    passes = [partial(run, way) for way in found.values()]
    # Once a round: a second call right after it would find a part of the weights in the cache.
    seconds = seconds_in_turns(passes, torch.device("cpu"), rounds=ROUNDS, seconds_per_round=0.0)
    weights = 4 * sum(linear.weight.numel() for linear in linears)
    return {"weights": weights, "seconds": dict(zip(found, map(statistics.median, seconds)))}


def main() -> None:
    document = {
        "command": "python benchmarks/late_linears.py",
        "what": f"the linear layers from half depth on, {TOKENS} tokens",
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": git_commit(OUTPUT.parent, ("src", "benchmarks/*.py")),
        "rounds": ROUNDS,
        "hosts": {name: measure(host) for name, host in HOSTS.items()},
    }
    OUTPUT.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(document, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
