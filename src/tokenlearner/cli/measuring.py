"""The command that times models: bench."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from tokenlearner.cli.opening import InputSize, Learned, LearnedOptions, open_model, own_input_size
from tokenlearner.cli.options import Json, app
from tokenlearner.cli.printing import print_table, progress_bar, show
from tokenlearner.errors import InputError

if TYPE_CHECKING:
    from tokenlearner.inspection.bench import BenchRow


@app.command
def bench(
    models: Annotated[list[str], Parameter(help="Saved folders and timm names; the first is compared with.")],
    /,
    *,
    learned: LearnedOptions = Learned(),  # noqa: B008
    input_size: InputSize = None,
    batch_sizes: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (1, 8),
    device: Annotated[str, Parameter(help="auto (the GPU if there is one), cpu, cuda, cuda:1, …")] = "auto",
    precision: Annotated[
        Literal["float32", "bf16"], Parameter(help="bf16 is autocast in training, else weights and inputs too.")
    ] = "float32",
    compiled: Annotated[bool, Parameter(negative="", help="torch.compile the models first.")] = False,
    cuda_graphs: Annotated[bool, Parameter(negative="", help="With --compiled on a GPU: replay CUDA graphs.")] = False,
    mode: Annotated[
        Literal["forward", "train"], Parameter(help="train: forward, loss and backward, without an optimizer.")
    ] = "forward",
    rounds: int = 15,
    seconds: Annotated[float, Parameter(help="Of each model in a round, at least one pass.")] = 0.2,
    output: Annotated[Path | None, Parameter(help="Folder for bench.json and bench.png.")] = None,
    json: Json = False,
) -> None:
    """Time models side by side on this machine: is a MAC saved a microsecond saved?

    With --tokens each timm name is timed bare and with a TokenLearner. A model's realised fraction is its speed-up over
    the first one, divided by how many times fewer MACs it has. Example:
    `tokenlearner bench vit_base_patch16_224 --tokens 8 --at 0.5`
    """
    import torch

    from tokenlearner.insertion.saving import refuse_file
    from tokenlearner.inspection.bench import bench as measure
    from tokenlearner.inspection.speed import usable_device
    from tokenlearner.inspection.summary import hardware

    conditions: dict[str, Any] = {
        "device": str(usable_device(device)),
        "precision": precision,
        "compiled": compiled,
        "cuda_graphs": cuda_graphs,
        "mode": mode,
        "rounds": rounds,
    }
    if output is not None:
        refuse_file(output, "bench.json and bench.png")
    opened = open_models(models, learned)
    size = input_size or common_input_size(opened)
    with progress_bar("rounds") as progress:
        rows = measure(
            opened,
            size,
            batch_sizes=batch_sizes,
            **conditions,
            seconds_per_round=seconds,
            progress=progress,
        )
    entries = [row.to_dict() for row in rows]
    about = {"hardware": hardware(), "torch": torch.__version__}
    document = {"models": entries, "input_size": list(size), **conditions, **about}
    if output is not None:
        write(document, rows, output)

    def table() -> None:
        print_table(*cells_of(rows, "images" if len(size) == 3 else "clips"))
        how = f"{mode}, {precision}, {'compiled' if compiled else 'eager'}, {conditions['device']}"
        print(f"{how}, median of {rounds} alternated rounds; {about['hardware']}, torch {about['torch']}")
        if output is not None:
            print(f"written to {output}")

    show(document, json, table)


def open_models(names: list[str], learned: Learned) -> dict[str, Any]:
    """The models by name, with weights; of a timm name with ``learned.tokens`` also the one that learns them."""
    opened: dict[str, Any] = {}
    for name in names:
        if name in opened or (Path(name).is_dir() and any(Path(name).samefile(o) for o in opened if Path(o).is_dir())):
            raise InputError(f"{name} is given twice")
        if Path(name).is_dir():
            opened[name] = open_model(name, Learned(), on="cpu")
        elif learned.tokens is None:
            opened[name] = open_model(name, learned, on="cpu")
        else:
            opened[name] = open_model(name, Learned(tokens=0), on="cpu")
            if learned.tokens:
                opened[f"{name}, {learned.tokens} tokens at {learned.at}"] = open_model(name, learned, on="cpu")
    if learned.tokens is not None and all(Path(name).is_dir() for name in names):
        raise InputError("--tokens goes with timm names; what a saved model learns is already decided")
    return opened


def common_input_size(models: dict[str, Any]) -> tuple[int, ...]:
    sizes = {name: own_input_size(model) for name, model in models.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {'×'.join(map(str, size))}" for name, size in sizes.items())
        raise InputError(f"the models take inputs of different sizes ({listed}): give one with --input-size")
    return next(iter(sizes.values()))


def write(document: dict[str, Any], rows: "list[BenchRow]", folder: Path) -> None:
    from tokenlearner.insertion.saving import write_whole
    from tokenlearner.inspection.bench_picture import draw_bench

    folder.mkdir(parents=True, exist_ok=True)
    write_whole({folder / "bench.json": (json_module.dumps(document, indent=2) + "\n").encode()})
    draw_bench(rows, folder / "bench.png")


def cells_of(rows: "list[BenchRow]", inputs: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The table's titles and rows."""
    from tokenlearner.inspection.summary import count

    columns = (
        *("model", "batch", f"{inputs}/s", "speed-up (quartiles)", "MACs", "MAC ratio", "realised"),
        *("of matmul rate", "peak memory", "latency at 1", "parameters"),
    )
    cells: list[tuple[str, ...]] = [
        (
            row.name,
            str(row.batch_size),
            f"{row.images_per_second:,.4g} ± {row.images_per_second_spread:,.2g}",
            f"{row.speedup:.2f}× ({row.speedup_quartiles[0]:.2f}–{row.speedup_quartiles[1]:.2f})",
            count(row.macs),
            f"{row.mac_ratio:.2f}×",
            f"{row.realised:.2f}",
            f"{row.matmul_share:.0%}",
            "" if row.peak_memory is None else f"{count(row.peak_memory)}B",
            "" if row.latency is None else f"{1e3 * row.latency:.3g} ms",
            count(row.parameters),
        )
        for row in rows
    ]
    return columns, cells
