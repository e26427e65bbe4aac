"""The command line: parse, call, print. Everything it calls can be called from Python.

Exit codes: 0, 1 for bad input (one sentence on stderr), 2 for bad usage.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, Token

from tokenlearner import __version__
from tokenlearner.data.listing import Listing
from tokenlearner.errors import InputError
from tokenlearner.training.recipe_files import (
    AtArgument,
    CommandLineCompressRecipe,
    CommandLineRecipe,
    CompressRecipeArgument,
    RecipeArgument,
    config_reader,
    plain_recipe,
)

app = App(
    name="tokenlearner",
    help="Learn a few tokens from a feature map and run every later layer of a vision transformer on those.\n\n"
    "Example: `tokenlearner demo`",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),  # no --optimizer.empty-betas
    suppress_keyboard_interrupt=False,  # main says that it stopped
    help_format="markdown",
)


def input_shape(_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """``3 224 224`` or ``3,224,224``; for clips four numbers."""
    numbers = [number for token in tokens for number in token.value.split(",")]
    if len(numbers) not in (3, 4) or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"--input-size requires 3 numbers, or 4 for clips, not {' '.join(numbers)}")
    return tuple(map(int, numbers))


RecipeFile = Annotated[
    Path | None, Parameter(name="--recipe", help="YAML or TOML file; options given here override it.")
]
FrameFps = Annotated[float | None, Parameter(help="Folders of pictures are videos of so many frames a second.")]
Listed = Annotated[Listing, Parameter(name="*", group="Videos")]
Views = Annotated[
    tuple[int, int], Parameter(help="Of a video: windows, and crops of each, whose outputs are averaged.")
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document instead of a table.")]
OnError = Annotated[
    Literal["skip", "raise"], Parameter(help="Damaged files: name, count and skip them, or stop at the first.")
]
Kind = Literal["conv", "mlp", "conv1", "gate", "grid", "dense", "average"]
Fuser = Literal["fuser", "unpool", "reproject"]


@app.command
def demo(
    *,
    video: Annotated[bool, Parameter(negative="", help="Clips of moving digits instead, told apart by order.")] = False,
    output: Annotated[Path | None, Parameter(help="Folder for all of it; runs/demo or runs/demo-video.")] = None,
    epochs: Annotated[int | None, Parameter(help="Fewer for a quick look.")] = None,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Train a plain ViT and one with 8 learned tokens on handwritten digits, and show what the tokens bought.

    Takes minutes on two cores; nothing is downloaded. Leaves report.html, summary.json, the models and pictures to try
    them on. Example: `tokenlearner demo`
    """
    if video:
        from tokenlearner.training.video_demo import video_demo as run
    else:
        from tokenlearner.training.demo import demo as run

    report = sys.stderr if json else sys.stdout
    output = output or Path("runs/demo-video" if video else "runs/demo")
    summary = run(output, epochs=epochs, seed=seed, log=lambda line: print(line, file=report, flush=True))
    show(summary, json, lambda: print_models(summary, f"report: {output / 'report.html'}"))


@app.command
def train(
    data: Path,
    *,
    output: Annotated[Path, Parameter(help="Folder for the model, report.html, summary.json and metrics.csv.")],
    recipe_file: RecipeFile = None,
    resume: Annotated[
        bool, Parameter(negative="", help="Go on with the run in --output, by its recipe, at its last checkpoint.")
    ] = False,
    recipe: RecipeArgument = CommandLineRecipe(),  # noqa: B008 - cyclopts reads the default
    listed: Listed = Listing(),  # noqa: B008
    on_error: OnError = "skip",
    json: Json = False,
) -> None:
    """Train a ViT with learned tokens on your own pictures or videos.

    DATA holds one folder a class, or `train` and `val` folders that do; or tar shards; or it is a CSV of file,label, or
    a list of Charades, Kinetics or AViD. Several processes: `torchrun --nproc-per-node 8 -m tokenlearner train …`

    Example: `tokenlearner train photos --model vit_tiny_patch16_224 --tokens 8 --at 0.5 --output runs/photos`
    """
    from tokenlearner.training.train import train as run

    summary = run(data, plain_recipe(recipe), output, on_error=on_error, resume=resume, listing=listed)
    if summary:  # one process of several writes
        show(summary, json, lambda: print_models(summary, f"model and report: {output}"))


@app.command
def compress(
    model: str,
    data: Path,
    *,
    output: Annotated[Path, Parameter(help="New folder for the model, report.html and summary.json.")],
    host: Annotated[str | None, Parameter(help="timm's name of the model whose weights MODEL holds.")] = None,
    macs: Annotated[
        float | None, Parameter(help="Share of the model's multiply-adds to come to: chooses --at and the tokens.")
    ] = None,
    latency: Annotated[
        float | None, Parameter(help="Share of its time for one input on this machine: chooses --at and the tokens.")
    ] = None,
    unlabelled: Annotated[
        bool, Parameter(negative="", help="DATA is any pictures: train towards the model's features alone.")
    ] = False,
    recipe_file: RecipeFile = None,
    resume: Annotated[bool, Parameter(negative="", help="Go on with the run in --output.")] = False,
    recipe: CompressRecipeArgument = CommandLineCompressRecipe(),  # noqa: B008 - cyclopts reads the default
    listed: Listed = Listing(),  # noqa: B008
    on_error: OnError = "skip",
    json: Json = False,
) -> None:
    """Make a trained model cheaper: learned tokens go in, and it is trained towards what it was before.

    MODEL is a saved folder, the name of a model with weights, or a checkpoint file of --host. DATA is what `train`
    takes, of the classes the model knows; of a model without a head any pictures. Both models are scored on the same
    held-out part and timed side by side.

    Example: `tokenlearner compress runs/photos photos --tokens 8 --at 0.5 --epochs 5 --output runs/cheaper`
    """
    from tokenlearner.training.compress import compress as run

    log = sys.stderr if json else sys.stdout
    summary = run(
        model,
        data,
        output,
        plain_recipe(recipe),
        host=host,
        macs=macs,
        latency=latency,
        unlabelled=unlabelled,
        on_error=on_error,
        resume=resume,
        listing=listed,
        log=lambda line: print(line, file=log, flush=True),
    )
    if summary:  # one process of several writes
        show(summary, json, lambda: print_models(summary, f"model and report: {output}"))


@app.command
def shards(
    data: Path,
    out: Path,
    *,
    size: Annotated[int, Parameter(help="Pixels of the short side; smaller pictures are left so.")] = 256,
    per_shard: Annotated[int, Parameter(help="Pictures in a tar.")] = 1000,
    quality: Annotated[int, Parameter(help="Of the JPEGs, 1 to 100.")] = 90,
    on_error: OnError = "skip",
    json: Json = False,
) -> None:
    """Pack pictures into a few large tars, which train and evaluate take as DATA, and webdataset's readers too.

    DATA is what `train` takes. OUT is a new folder for the tars and dataset.json.

    Example: `tokenlearner shards photos photos-256 --size 256`
    """
    from rich.console import Console
    from rich.progress import Progress

    from tokenlearner.data.sharding import write_shards

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pictures", total=None)
        summary = write_shards(
            data,
            out,
            size=size,
            per_shard=per_shard,
            quality=quality,
            on_error=on_error,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )

    def table() -> None:
        written = [shard for part in summary["splits"].values() for shard in part]
        print_table(("shard", "samples"), [(shard["file"], f"{shard['samples']:,}") for shard in written])
        warn_damaged(summary["damaged"])
        print(f"{summary['images']:,} pictures of {summary['classes']} classes in {out}")

    show(summary, json, table)


@app.command
def evaluate(
    model: Path,
    data: Path,
    *,
    protocol: Annotated[
        Literal["top1", "map", "real", "fewshot"],
        Parameter(
            help="top1: accuracy on class folders. map: mean average precision of images with any number of classes. "
            "real: ImageNet validation files against --real-labels. "
            "fewshot: ridge regression on the frozen features of --shots images a class."
        ),
    ] = "top1",
    images: Annotated[
        Literal["auto", "all", "held-out"],
        Parameter(help="top1, map: which of DATA; auto takes its val folder, else what training held out, else all."),
    ] = "auto",
    real_labels: Annotated[Path | None, Parameter(help="real: ReaL's real.json.")] = None,
    shots: Annotated[int, Parameter(help="fewshot: training images a class.")] = 5,
    l2: Annotated[float, Parameter(help="fewshot: strength of the ridge.")] = 1.0,
    seed: Annotated[int, Parameter(help="fewshot: which images are drawn.")] = 0,
    views: Views = (4, 3),
    listed: Listed = Listing(),  # noqa: B008
    batch_size: Annotated[int, Parameter(help="Images or views at once.")] = 64,
    workers: int = 2,
    on_error: OnError = "skip",
    device: Annotated[
        str, Parameter(help="auto, cpu, cuda or, say, cuda:1; auto is cuda where there is one.")
    ] = "auto",
    json: Json = False,
) -> None:
    """Score a model: a folder it was saved in, or the name of one with weights.

    Example: `tokenlearner evaluate runs/photos photos`
    """
    from tokenlearner.evaluation.protocols import score
    from tokenlearner.models import open_trained

    result = score(
        open_trained(model),
        model,
        data,
        protocol=protocol,
        images=images,
        real_labels=real_labels,
        shots=shots,
        l2=l2,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        on_error=on_error,
        device=device,
        views=views,
        listing=listed,
    )

    def table() -> None:
        names = {
            "top1": "top-1",
            "top5": "top-5",
            "mean_per_class": "mean per class",
            "mean_average_precision": "mean average precision",
        }
        rows = [
            (names.get(key, key), f"{value:.2%}" if key in names else f"{value:,}")
            for key, value in result.items()
            if isinstance(value, int | float)
        ]
        if "views" in result:
            rows.append(("views", "×".join(map(str, result["views"]))))
        print_table((protocol, result.get("which", str(data))), rows)
        warn_damaged(result["damaged"])
        warn_missing(result.get("missing"))

    show(result, json, table)


@app.command
def predict(
    model: Path,
    files: Annotated[list[Path], Parameter(consume_multiple=True)],
    /,
    *,
    top: int = 5,
    views: Views = (4, 3),
    frame_fps: FrameFps = None,
    on_error: OnError = "skip",
    json: Json = False,
) -> None:
    """Label pictures, or videos where the model takes clips: files, or folders of them.

    MODEL is a saved folder, or the name of a model with weights.

    Example: `tokenlearner predict runs/photos holiday.jpg`
    """
    from tokenlearner.data.images import Damaged, damaged_entries
    from tokenlearner.evaluation.predict import find_inputs
    from tokenlearner.evaluation.predict import predict as run
    from tokenlearner.models import open_trained

    loaded = open_trained(model)
    found = find_inputs(loaded, files, frame_fps)
    predictions = list(run(loaded, found, top=top, on_error=on_error, views=views))
    damaged = damaged_entries(Damaged(p.file, p.error) for p in predictions if p.error)
    if damaged["count"] == len(predictions):
        warn_damaged(damaged)
        raise InputError(f"none of the {len(predictions)} files could be read")
    rows = [
        {"file": p.file, "predictions": [{"label": name, "probability": value} for name, value in p.labels]}
        for p in predictions
        if not p.error
    ]

    def table() -> None:
        shown = [
            (p.file, "  ".join(f"{name} {value:.1%}" for name, value in p.labels)) for p in predictions if not p.error
        ]
        print_table(("file", f"top {top}"), shown)
        warn_damaged(damaged)

    show({"predictions": rows, "damaged": damaged}, json, table)


@app.command
def cost(
    model: str,
    *,
    tokens: Annotated[int | None, Parameter(help="Count the timm model with a TokenLearner of so many tokens.")] = None,
    at: AtArgument = 0.5,
    kind: Kind = "mlp",
    fuser: Fuser | None = None,
    extra_layers: int = 0,
    over: Literal["slice", "neighbours", "window"] = "slice",
    window: int | None = None,
    input_size: Annotated[
        tuple[int, ...] | None,
        Parameter(
            help="Channels, (frames,) height, width, such as 3,32,224,224; the model's own when not given.",
            converter=input_shape,
            consume_multiple=True,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Count parameters, MACs, FLOPs and tokens of a saved model or a timm name, layer by layer.

    Example: `tokenlearner cost vit_base_patch16_224 --tokens 8 --at 0.5`
    """
    from tokenlearner.inspection.cost import cost as count

    learned = {"at": at, "kind": kind, "fuser": fuser, "extra_layers": extra_layers, "over": over, "window": window}
    built = open_model(model, tokens, learned)
    try:
        counted = count(built, input_size or own_input_size(built))
    except ValueError as error:
        raise InputError(str(error)) from error

    def table() -> None:
        rows = [
            (
                part.name,
                "" if part.tokens is None else str(part.tokens),
                f"{part.parameters:,}",
                f"{part.macs / 1e6:,.1f}",
            )
            for part in counted.layers
        ]
        print_table(("part", "tokens", "parameters", "million MACs"), rows)
        print(counted)

    show(counted.to_dict(), json, table)


@app.command
def paper(*, json: Json = False) -> None:
    """Show every printed cost of the paper's models and modules beside our count, and where it contradicts itself.

    Example: `tokenlearner paper`
    """
    from tokenlearner.models import paper_rows

    rows = paper_rows()

    def table() -> None:
        shown = [
            (
                row["table"],
                row["name"],
                f"{row['printed']:g}",
                f"{row['counted']:.4g} {row['unit']}",
                f"{row['ratio']:.3f}",
                "" if row["fits"] else row["note"] or "does not fit",
            )
            for row in rows
        ]
        print_table(("table", "model", "printed", "counted", "ratio", "note"), shown)

    show(rows, json, table)


@app.command
def maps(
    model: Path,
    files: Annotated[list[Path], Parameter(consume_multiple=True)],
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder for the sheets.")] = Path("maps"),
    layer: Annotated[int | None, Parameter(help="With several TokenLearners, the layer of the one to draw.")] = None,
    columns: Annotated[int, Parameter(help="Pictures on a sheet.")] = 8,
    frame_fps: FrameFps = None,
    on_error: OnError = "skip",
    json: Json = False,
) -> None:
    """Draw what each token looks at: a column a picture, a row a token.

    Of every video, where the model takes clips: a sheet of its frames, and a film of each frame beside its maps.

    Example: `tokenlearner maps runs/photos holiday.jpg --output maps`
    """
    from tokenlearner.evaluation.clips import takes_clips
    from tokenlearner.evaluation.films import write_films
    from tokenlearner.evaluation.predict import find_inputs, write_sheets
    from tokenlearner.models import open_trained

    loaded = open_trained(model)
    found = find_inputs(loaded, files, frame_fps)
    draw: Any = write_films if takes_clips(loaded) else write_sheets
    document = draw(loaded, found, output, layer=layer, columns=columns, on_error=on_error).to_dict()

    def table() -> None:
        rows: list[tuple[str, ...]]
        if "films" in document:
            rows = [(film["sheet"], film["video"], film["file"]) for film in document["films"]]
            print_table(("sheet", "film", "video"), rows)
        else:
            rows = [
                (sheet["path"], ", ".join(Path(file).name for file in sheet["files"])) for sheet in document["sheets"]
            ]
            print_table(("sheet", "pictures"), rows)
        warn_damaged(document["damaged"])

    show(document, json, table)


@app.command
def export(
    model: Path,
    files: Annotated[
        list[Path] | None, Parameter(consume_multiple=True, help="Pictures or videos to compare the two on.")
    ] = None,
    /,
    *,
    output: Annotated[Path, Parameter(help="Folder for the file and preprocessing.json.")],
    format: Annotated[  # noqa: A002
        Literal["onnx", "pt2"], Parameter(help="onnx, or PyTorch's exported program.")
    ] = "onnx",
    precision: Annotated[
        Literal["fp32", "fp16"], Parameter(help="Of weights and arithmetic; inputs and outputs stay fp32.")
    ] = "fp32",
    opset: Annotated[int | None, Parameter(help="onnx: version of the operators, 18 to 25.")] = None,
    measure: Annotated[bool, Parameter(help="Time the file beside that of the host without its TokenLearner.")] = True,
    json: Json = False,
) -> None:
    """Write a trained model as one file that runs without this package, once it has been seen to compute the same.

    MODEL is a saved folder, or the name of a model with weights. Example:
    `tokenlearner export runs/photos --output runs/photos-onnx`
    """
    from tokenlearner.export import export_model
    from tokenlearner.models import open_trained

    report = sys.stderr if json else sys.stdout
    summary = export_model(
        open_trained(model),
        output,
        format=format,
        precision=precision,
        inputs=files,
        opset=opset,
        measure=measure,
        log=lambda line: print(line, file=report, flush=True),
    )
    show(summary, json, lambda: print(f"{output / summary['file']}: {summary['bytes'] / 1e6:,.1f} MB"))


@app.command(name="data")
def show_data(
    data: Path,
    *,
    output: Annotated[Path | None, Parameter(help="PNG file to draw the counts into.")] = None,
    listed: Listed = Listing(),  # noqa: B008
    json: Json = False,
) -> None:
    """Count what a set of pictures or videos holds: classes, clips, hours, sizes, rates and damaged files.

    DATA is what `train` takes, or a folder of pictures or videos without classes. Every picture is decoded, of every
    video the first frame. Example: `tokenlearner data videos --output videos.png`
    """
    from rich.console import Console
    from rich.progress import Progress

    from tokenlearner.data.statistics import statistics

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("files", total=None)
        document = statistics(
            data, listing=listed, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if output is not None:
        from tokenlearner.inspection.statistics import draw_statistics

        draw_statistics(document, output)

    def table() -> None:
        from tokenlearner.data.statistics import table_rows

        for columns, rows in table_rows(document):
            print_table(columns, rows)
        warn_damaged(document["damaged"])
        warn_missing(document["missing"])
        if output is not None:
            print(f"drawn in {output}")

    show(document, json, table)


def open_model(name: str, tokens: int | None, learned: dict[str, Any]) -> Any:
    """A saved folder, or a timm name built with new weights (cost reads none of them)."""
    if Path(name).is_dir():
        from tokenlearner.insertion.saving import load

        if tokens is not None:
            raise InputError(f"{name} is a saved model, so --tokens and what goes with it are already decided")
        return load(name)
    from tokenlearner.training.build import build_model

    if os.sep in name:
        raise InputError(f"there is no folder {name}; give a saved model's folder or a name of timm's")
    given = [key for key in ("fuser", "extra_layers", "window") if learned[key]]
    if tokens is None and (given or learned["over"] != "slice"):
        raise InputError(
            "--fuser, --extra-layers, --over and --window go with --tokens, which says that there is a TokenLearner"
        )
    recipe = CommandLineRecipe(model=name, tokens=tokens or 0, **learned)
    return build_model(plain_recipe(recipe), num_classes=None, on="meta")


def own_input_size(model: Any) -> tuple[int, ...]:
    from tokenlearner.insertion.saving import Preprocessing

    preprocessing = Preprocessing.of(model)
    return preprocessing.model_input if preprocessing else (3, 224, 224)


def show(document: Any, as_json: bool, table: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        table()


def print_models(summary: dict[str, Any], last: str) -> None:
    from tokenlearner.inspection.summary import ModelResult, cells, columns

    models = [
        ModelResult(
            **{k: v for k, v in row.items() if k != "flops"} | {"tokens_per_layer": tuple(row["tokens_per_layer"])}
        )
        for row in summary["models"]
    ]
    print_table(columns(models), [cells(model, models[0]) for model in models])
    warn_damaged(summary.get("damaged"))
    warn_missing(summary.get("missing"))
    if init := summary.get("init"):
        print(f"from {init['from']}: {len(init['new'])} tensors new, {len(init['unused'])} left out (see summary.json)")
    print(f"{summary['seconds']:.0f} s in all; {last}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(cell.encode(errors="backslashreplace").decode() for cell in row))  # file names may not be UTF-8
    width = None if sys.stdout.isatty() else 160  # a pipe has no width, and rich would take 80
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)  # [red] is a folder, no colour


def warn_damaged(damaged: dict[str, Any] | None, most: int = 10) -> None:
    if not damaged or not damaged["count"]:
        return
    print(f"{damaged['count']} damaged {'file' if damaged['count'] == 1 else 'files'} skipped:", file=sys.stderr)
    for entry in damaged["files"][:most]:
        print(f"  {entry['file']}: {entry['reason']}", file=sys.stderr)
    if damaged["count"] > most:
        print(f"  … and {damaged['count'] - most} more", file=sys.stderr)


def warn_missing(missing: dict[str, Any] | None, most: int = 10) -> None:
    if not missing or not missing["count"]:
        return
    print(
        f"{missing['count']} listed {'file is' if missing['count'] == 1 else 'files are'} not there:", file=sys.stderr
    )
    for file in missing["files"][:most]:
        print(f"  {file}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    if missing["count"] > most:
        print(f"  … and {missing['count'] - most} more", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script; exits with 0, 1 or 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        read_recipe_file(arguments)
        app(arguments, exit_on_error=False, result_action="return_none")
    except CycloptsError:
        sys.exit(2)  # cyclopts has printed what was wrong
    except (InputError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if os.environ.get("RANK", "0") == "0":  # torchrun's other processes would say the same
            print(f"tokenlearner: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output (head, say) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("tokenlearner: stopped", file=sys.stderr)
        sys.exit(130)


def read_recipe_file(arguments: Sequence[str]) -> None:
    """Hands `--recipe FILE` to cyclopts as configuration before it parses the rest."""
    app.config = None
    for i, argument in enumerate(arguments):
        if argument == "--recipe" and i + 1 < len(arguments):
            app.config = [config_reader(arguments[i + 1])]
        elif argument.startswith("--recipe="):
            app.config = [config_reader(argument.split("=", 1)[1])]


if __name__ == "__main__":
    main()
