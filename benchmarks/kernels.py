"""Times the Triton kernels on a GPU beside PyTorch, eager and compiled, and beside what the GPU could do at best.

python benchmarks/kernels.py            # → benchmarks/kernels.json, or kernels.json in $OUT (some 5 minutes)
python benchmarks/kernels.py --sweep    # also every tile of the learner and the fuser, at the first of SHAPES
python benchmarks/kernels.py --only modules --out somewhere.json

Two floors, from a copy of 2 GiB and a product of two 8192×8192 matrices timed in the same process: the fewest bytes
over the bandwidth, and the operations over the rate. Variants take turns; a round of a module replays a CUDA graph of
it over inputs that together are larger than the L2. All in bfloat16. The learner's share of a model is its own time,
on such feature maps as it gets there, over the model's; a training step is forward and backward without an optimizer.
"""

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenlearner
from tokenlearner.core import TokenFuser, TokenLearner
from tokenlearner.inspection.summary import command_line
from tokenlearner.kernels import obstacle, use

import timm
import torch
from torch import Tensor, nn

DEVICE, DTYPE = "cuda", torch.bfloat16
SHAPES = ((64, 1024, 1024), (64, 1024, 768), (64, 576, 768), (8, 196, 768))  # b, n, d; the first is the one to judge by
TOKENS, HIDDEN = 8, 64
MODELS = (("vit_base_patch16_384", 384, 64), ("vit_large_patch16_384", 384, 32))  # host, image side, batch
ROTATED = 2**28  # bytes of inputs that a variant runs through
ROUNDS = 15

Given = tuple[Tensor, ...]  # the arguments of a module's call
Call = Callable[[int], object]  # with the i-th input


def floors(
    b: int, n: int, d: int, kind: str, bytes_per_second: float, operations_per_second: float
) -> dict[str, float]:
    """Seconds a forward pass takes at least: X read once (and a fuser's output written), and the products.

    Weights and tokens, some hundred KB an image at most, are left out.
    """
    moved = (2 if kind == "fuser" else 1) * b * n * d * DTYPE.itemsize
    operations = 2 * b * n * (d * HIDDEN + HIDDEN * TOKENS + TOKENS * d)
    return {"bytes": moved / bytes_per_second, "operations": operations / operations_per_second}


def captured(calls: Callable[[], None]) -> Callable[[], None]:
    """``calls`` as one CUDA graph, so that no launch is waited for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    return graph.replay


def seconds_of(run: Callable[[], None]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def compare(variants: Mapping[str, Call], inputs: int, *, graph: bool = True) -> dict[str, dict[str, float]]:
    """Median seconds a call of each variant and half their interquartile range, over rounds in turns."""
    runs: dict[str, Callable[[], None]] = {}
    for name, variant in variants.items():

        def calls(variant: Call = variant) -> None:
            for i in range(inputs):
                variant(i)

        calls()  # compiles what is to be compiled
        runs[name] = captured(calls) if graph else calls
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            found[name].append(seconds_of(runs[name]) / inputs)
    quarters = {name: statistics.quantiles(times[1:], n=4) for name, times in found.items()}  # the first warms up
    return {name: {"seconds": middle, "spread": (high - low) / 2} for name, (low, middle, high) in quarters.items()}


def ceilings() -> dict[str, float]:
    x = torch.randn(2**29, device=DEVICE)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    times = compare({"copy": lambda i: y.copy_(x), "product": lambda i: a @ b}, 1)
    return {
        "bytes_per_second": 2 * x.nbytes / times["copy"]["seconds"],
        "operations_per_second": 2 * 8192**3 / times["product"]["seconds"],
    }


def made(kind: str, d: int) -> Any:
    """A module with weights that show: no mixing matrix of zeros."""
    torch.manual_seed(0)
    if kind == "learner":
        module: nn.Module = TokenLearner(d, TOKENS, hidden_dim=HIDDEN)
    else:
        module = TokenFuser(d, TOKENS, hidden_dim=HIDDEN)
        nn.init.normal_(module.mix.weight, std=0.3)
    return module.to(DEVICE, DTYPE)


def arguments(kind: str, b: int, n: int, d: int) -> list[Given]:
    """Enough inputs to fill ROTATED bytes: feature maps behind a class token, as a host hands them on."""
    count = max(2, -(-ROTATED // (b * n * d * DTYPE.itemsize)))
    maps = [torch.randn(b, n + 1, d, device=DEVICE, dtype=DTYPE)[:, 1:].unflatten(1, (1, n)) for _ in range(count)]
    return [(x,) if kind == "learner" else (torch.randn(b, TOKENS, d, device=DEVICE, dtype=DTYPE), x) for x in maps]


def gradient(module: nn.Module, given: Given) -> Given:
    """Forward and backward, from a gradient of ones; the inputs' own gradients too, as in the middle of a model."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    out = module(*leaves)
    return torch.autograd.grad(out, [*leaves, *module.parameters()], torch.ones_like(out))


@torch.no_grad()
def errors(plain: nn.Module, fused: nn.Module, given: Given) -> dict[str, float]:
    """‖out − exact‖ / ‖exact‖ for the first image; exact is float64 on the CPU."""
    one = tuple(tensor[:1] for tensor in given)
    exact = copy.deepcopy(plain).cpu().double()(*(tensor.cpu().double() for tensor in one))
    found = {"plain": plain(*one), "kernel": fused(*one)}
    return {name: ((out.cpu().double() - exact).norm() / exact.norm()).item() for name, out in found.items()}


def modules(best: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Learner and fuser by themselves: forward, and forward with backward."""
    for kind in ("learner", "fuser"):
        for b, n, d in SHAPES:
            yield module_row(kind, b, n, d, best)


def module_row(kind: str, b: int, n: int, d: int, best: dict[str, float]) -> dict[str, Any]:
    torch._dynamo.reset()
    given, plain, fused = arguments(kind, b, n, d), made(kind, d), use(made(kind, d))
    if (reason := obstacle(fused, given[0][-1])) is not None:
        sys.exit(f"the {kind}'s kernel can't be timed: {reason}")
    variants = {"plain": plain, "compiled": torch.compile(plain), "kernel": fused}
    with torch.no_grad():
        forward = compare({name: lambda i, m=m: m(*given[i]) for name, m in variants.items()}, len(given))
    training = compare({name: lambda i, m=m: gradient(m, given[i]) for name, m in variants.items()}, len(given))
    floor = floors(b, n, d, kind, **best)
    return {
        "kind": kind,
        "b": b,
        "n": n,
        "d": d,
        "errors": errors(plain, fused, given[0]),
        "floor": floor,
        "gap": forward["kernel"]["seconds"] / max(floor.values()),
        "forward": forward,
        "training": training,
    }


def models(best: dict[str, float]) -> Iterator[dict[str, Any]]:
    """What the learner is of a model, and what its kernel changes end to end."""
    for name, side, b in MODELS:
        for compiled in (False, True):
            yield model_row(name, side, b, compiled)


def model_row(name: str, side: int, b: int, compiled: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    host = timm.create_model(name, img_size=side, num_classes=1000)
    plain = tokenlearner.insert(host, TOKENS, at=0.5).to(DEVICE, DTYPE)
    pair = {"plain": plain, "kernel": use(copy.deepcopy(plain))}
    images = torch.randn(b, 3, side, side, device=DEVICE, dtype=DTYPE)
    learners = {switch: next(iter(tokenlearner.learners(model).values())) for switch, model in pair.items()}
    given = arguments("learner", b, (side // 16) ** 2, plain.embed_dim)
    if compiled:
        pair, learners = ({k: torch.compile(m) for k, m in both.items()} for both in (pair, learners))

    def step(model: nn.Module) -> Given:
        parameters = list(model.parameters())
        return torch.autograd.grad(model(images).float().logsumexp(1).sum(), parameters, allow_unused=True)

    with torch.no_grad():
        forward = compare({k: lambda i, m=m: m(images) for k, m in pair.items()}, 1, graph=False)
        alone = compare({k: lambda i, m=m: m(*given[i]) for k, m in learners.items()}, len(given))
    training = compare({k: lambda i, m=m: step(m) for k, m in pair.items()}, 1, graph=False)
    both = compare({k: lambda i, m=m: gradient(m, given[i]) for k, m in learners.items()}, len(given))
    return {
        "host": name,
        "b": b,
        "compiled": compiled,
        "forward": forward,
        "training": training,
        "learner": {"forward": alone, "training": both},
        "share": {k: alone[k]["seconds"] / forward[k]["seconds"] for k in pair},
        "training_share": {k: both[k]["seconds"] / training[k]["seconds"] for k in pair},
        "backward_share": {k: (both[k]["seconds"] - alone[k]["seconds"]) / training[k]["seconds"] for k in pair},
    }


def sweep(best: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Every tile, the fastest first: what the package's own tiles should be."""
    from tokenlearner.kernels import fuser, learner

    yield from sorted(tile_rows("learner", learner.launch, ()), key=fastest)
    yield from sorted(tile_rows("fuser", fuser.launch, (True,)), key=fastest)


def fastest(row: dict[str, Any]) -> float:
    return row.get("seconds", float("inf"))


def tile_rows(kind: str, launch: Callable[..., Tensor], options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    from tokenlearner.kernels.logits import Tile, Weights

    b, n, d = SHAPES[0]
    module, given = made(kind, d), arguments(kind, b, n, d)
    alpha = module.alpha if kind == "learner" else module.beta
    layers = (alpha.norm, alpha.fc1, alpha.fc2)
    weights = Weights(*(tensor.detach() for layer in layers for tensor in (layer.weight, layer.bias)))

    def call(i: int, tile: Tile) -> Tensor:
        *tokens, x = given[i]
        return launch(x.flatten(1, 2), *tokens, weights, alpha.norm.eps, *options, tile)

    for positions in (32, 64, 128):
        for channels in (32, 64, 128):
            for warps, stages in ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (8, 4)):
                tile = Tile(positions, channels, warps, stages)
                row: dict[str, Any] = {"kind": kind, **tile._asdict()}
                try:
                    row |= compare({"kernel": lambda i, tile=tile: call(i, tile)}, len(given))["kernel"]
                except Exception as problem:  # more memory than there is; its class is another in every version
                    row["problem"] = str(problem)[:200]
                yield row


def told(part: str, row: dict[str, Any]) -> str:
    """A row in one line."""
    if part == "modules":
        times = ", ".join(f"{name} {1e6 * time['seconds']:.0f} µs" for name, time in row["forward"].items())
        both = ", ".join(f"{name} {1e6 * time['seconds']:.0f} µs" for name, time in row["training"].items())
        floor = " and ".join(f"{1e6 * seconds:.0f} µs ({name})" for name, seconds in row["floor"].items())
        shape = f"{row['kind']} b={row['b']} n={row['n']} d={row['d']}"
        return f"{shape}: {times}; floors {floor}, gap {row['gap']:.2f}×; with backward {both}; errors {row['errors']}"
    if part == "models":
        how = "compiled" if row["compiled"] else "eager"
        parts = [
            f"{what} {row[what]['plain']['seconds']:.4f} s, with kernel {row[what]['kernel']['seconds']:.4f} s"
            for what in ("forward", "training")
        ]
        shares = {name: {k: f"{v:.1%}" for k, v in row[name].items()} for name in row if name.endswith("share")}
        return f"{row['host']} b={row['b']} {how}: {'; '.join(parts)}; learner {shares}"
    time = f"{1e6 * row['seconds']:.0f} µs" if "seconds" in row else row["problem"][:60]
    return f"{row['kind']} {[row[key] for key in ('positions', 'channels', 'warps', 'stages')]}: {time}"


def main() -> None:
    parts = {"modules": modules, "models": models, "sweep": sweep}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=parts, help="this part alone")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", Path(__file__).parent)) / "kernels.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py times kernels on a CUDA GPU, and PyTorch finds none on this machine.")
    import triton

    best = ceilings()
    document: dict[str, Any] = {
        "command": command_line("python benchmarks/kernels.py", sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rounds": ROUNDS,
        "ceilings": best,
    }
    print(best, flush=True)
    for name in [options.only] if options.only else ["modules", "models", *(["sweep"] if options.sweep else [])]:
        document[name] = []
        for row in parts[name](best):
            document[name].append(row)
            print(told(name, row), flush=True)
            options.out.write_text(json.dumps(document, indent=2) + "\n")  # after each row, should the time run out


if __name__ == "__main__":
    main()
