"""Commands that run a trained model on data: evaluate, predict, maps."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tokenlearner.cli.options import FrameFps, Json, Listed, OnError, Views, app
from tokenlearner.cli.printing import print_table, show, warn_damaged, warn_missing
from tokenlearner.data.listing import Listing
from tokenlearner.errors import InputError


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
