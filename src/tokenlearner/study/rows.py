"""The CSV of a study: a row a run, whole at any moment."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once, so that a stop at any moment leaves a whole one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        columns = dict.fromkeys(column for row in reversed(rows) for column in row)  # older rows may have fewer
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def git_commit(folder: Path) -> str:
    """HEAD of the repository that ``folder`` is in, with ``-dirty`` behind it if ``src`` or ``studies`` differ from it;
    ``unknown`` outside of one.
    """

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
        return found.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    root = git("rev-parse", "--show-toplevel")
    dirty = root and git("-C", root, "status", "--porcelain", "--", "src", "studies")
    return f"{commit}-dirty" if dirty else commit
