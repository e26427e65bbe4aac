"""What the commands print: one JSON document or tables, and warnings to stderr."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def show(document: Any, as_json: bool, table: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        table()


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[float, int], None]]:
    """A bar of ``what`` on a terminal's stderr, gone at the end: a function to call with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
