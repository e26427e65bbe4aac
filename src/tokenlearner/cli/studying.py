"""The command that runs studies."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from tokenlearner.cli.options import Json, app
from tokenlearner.cli.printing import print_table, show
from tokenlearner.errors import InputError


@app.command
def study(
    name: str | None = None,
    *,
    list_all: Annotated[bool, Parameter(name="--list", negative="", help="Name the studies there are.")] = False,
    data: Annotated[
        Path, Parameter(help="Folder with the sets, a folder each: cifar10, flowers, …; moving digits need none.")
    ] = Path(),
    size: Annotated[Literal["cpu", "gpu"], Parameter(help="Minutes a run on a core, or for a GPU.")] = "cpu",
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (0, 1, 2),
    variants: Annotated[tuple[str, ...], Parameter(consume_multiple=True, help="Run these alone.")] = (),
    output: Annotated[Path, Parameter(help="Folder for the CSV, the JSON and the figure.")] = Path("runs/results"),
    runs: Annotated[Path, Parameter(help="Folder of the runs, which studies share.")] = Path("runs/studies"),
    studies: Annotated[Path, Parameter(help="Folder of the studies; a checkout has them.")] = Path("studies"),
    json: Json = False,
) -> None:
    """Run a study of the paper's claims, or of your own: a row a run, a figure, and a verdict on every claim.

    NAME is one of --list, or a Python file with a STUDY. A run that is done is not done again, and one that was stopped
    is gone on with.

    Example: `tokenlearner study placement --data sets`
    """
    from tokenlearner.inspection.summary import command_line
    from tokenlearner.study.study import open_study, run_study, studies_in

    if list_all:
        found = {stem: open_study(stem, studies) for stem in studies_in(studies)}
        if not found:
            raise InputError(f"there are no studies in {studies}: give a checkout's with --studies")
        document = {stem: {"title": it.title, "question": it.question} for stem, it in found.items()}
        rows = [(stem, it.title, it.question) for stem, it in found.items()]
        show(document, json, lambda: print_table(("study", "title", "question"), rows))
        return
    if name is None:
        raise InputError("give the NAME of a study, or --list to see the studies")
    report = sys.stderr if json else sys.stdout
    summary = run_study(
        Path(name).stem,
        open_study(name, studies),
        data,
        output,
        size=size,
        seeds=seeds,
        only=variants,
        runs=runs,
        command=command_line("tokenlearner", sys.argv[1:]),
        log=lambda line: print(line, file=report, flush=True),
    )

    def table() -> None:
        lines = [
            (v["label"], f"{v['mean']:.2f}", f"± {v['deviation']:.2f}" if v["runs"] > 1 else "", str(v["runs"]))
            for v in summary["variants"].values()
        ]
        print_table((summary["title"], summary["score"], "over seeds", "runs"), lines)
        for claim in summary["claims"]:
            difference = "" if claim["margin"] is None else f" ({claim['difference']:+.2f} ± {claim['margin']:.2f})"
            print(f"{claim['text']}: {claim['verdict'] or 'too few runs'}{difference}; paper: {claim['paper']}")
        print(f"written to {output}")

    show(summary, json, table)
