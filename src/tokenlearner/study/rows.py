"""The CSV of a study: a row a run, whole at any moment."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenlearner.insertion.saving import write_whole


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces the file at once, so that a stop at any moment leaves a whole one."""
    columns = dict.fromkeys(column for row in reversed(rows) for column in row)  # older rows may have fewer
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole({path: file.getvalue().encode()})
