"""Commands about models and data themselves: cost, paper, export, data."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tokenlearner.cli.opening import InputSize, Learned, LearnedOptions, open_model, own_input_size
from tokenlearner.cli.options import Json, Listed, app
from tokenlearner.cli.printing import print_table, progress_bar, show, warn_damaged, warn_missing
from tokenlearner.data.listing import Listing
from tokenlearner.errors import InputError


@app.command
def cost(
    model: str,
    *,
    learned: LearnedOptions = Learned(),  # noqa: B008
    input_size: InputSize = None,
    json: Json = False,
) -> None:
    """Count parameters, MACs, FLOPs and tokens of a saved model or a timm name, layer by layer.

    Example: `tokenlearner cost vit_base_patch16_224 --tokens 8 --at 0.5`
    """
    from tokenlearner.inspection.cost import cost as count

    built = open_model(model, learned, on="meta")
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
    from tokenlearner.data.statistics import statistics

    with progress_bar("files") as progress:
        document = statistics(data, listing=listed, progress=progress)
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
