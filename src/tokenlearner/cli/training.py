"""Commands that train: demo, train, compress; and shards, which packs what they read."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tokenlearner.cli.options import Json, Listed, OnError, RecipeFile, app
from tokenlearner.cli.printing import print_models, print_table, progress_bar, show, warn_damaged
from tokenlearner.data.listing import Listing
from tokenlearner.training.recipe_files import (
    CommandLineCompressRecipe,
    CommandLineRecipe,
    CompressRecipeArgument,
    RecipeArgument,
    plain_recipe,
)


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
    from tokenlearner.data.sharding import write_shards

    with progress_bar("pictures") as progress:
        summary = write_shards(
            data,
            out,
            size=size,
            per_shard=per_shard,
            quality=quality,
            on_error=on_error,
            progress=progress,
        )

    def table() -> None:
        written = [shard for part in summary["splits"].values() for shard in part]
        print_table(("shard", "samples"), [(shard["file"], f"{shard['samples']:,}") for shard in written])
        warn_damaged(summary["damaged"])
        print(f"{summary['images']:,} pictures of {summary['classes']} classes in {out}")

    show(summary, json, table)
