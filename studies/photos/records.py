"""What train.py keeps of its runs and report.py reads: tables, settings, the commit."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

from recipes import Settings

REPOSITORY = Path(__file__).parents[2]


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the file at once, so that a stop at any moment leaves a whole one."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        columns = dict.fromkeys(column for row in reversed(rows) for column in row)  # older rows may have fewer
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def git_commit() -> str:
    """HEAD, with ``-dirty`` behind it if the code is not the one of that commit."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
        return found.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--", "src", "studies") else commit


def read_settings(path: Path) -> tuple[dict[str, Any], Settings]:
    """What a settings.json says: data set and scoring, and the recipe. The first ones had the recipe only."""
    values = {"dataset": "cifar10", "tune": False, "limit": None} | json.loads(path.read_text())
    return {key: values.pop(key) for key in ("dataset", "tune", "limit")}, Settings(**values)
