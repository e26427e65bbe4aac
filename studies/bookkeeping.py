"""What all studies need to keep of their runs, and how they compare them."""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
from pathlib import Path
from typing import Any

from scipy.stats import t as student

REPOSITORY = Path(__file__).parents[1]
RULE = (
    "better or worse: the means differ by more than the 95 % margin (Student's t, n1 + n2 - 2 degrees of freedom, "
    "times the pooled standard error); undecided: they do not"
)


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


def compare(scores: list[float], plain: list[float]) -> dict[str, Any]:
    """The difference of the means, its 95 % margin and the verdict; no verdict without two runs of each."""
    difference, n1, n2 = statistics.mean(scores) - statistics.mean(plain), len(scores), len(plain)
    if min(n1, n2) < 2:
        return {"difference": round(difference, 2), "pooled_standard_error": None, "margin": None, "verdict": None}
    freedom = n1 + n2 - 2
    pooled = ((n1 - 1) * statistics.variance(scores) + (n2 - 1) * statistics.variance(plain)) / freedom
    error = math.sqrt(pooled * (1 / n1 + 1 / n2))
    margin = float(student.ppf(0.975, freedom)) * error
    verdict = "better" if difference > margin else "worse" if difference < -margin else "undecided"
    return {
        "difference": round(difference, 2),
        "pooled_standard_error": round(error, 2),
        "margin": round(margin, 2),
        "verdict": verdict,
    }
