"""One figure of the paper beside our count of it, as ``paper_rows`` and ``module_rows`` list them."""

from __future__ import annotations

from typing import Any


def paper_row(
    table: str, name: str, unit: str, printed: float, counted: float, tolerance: float, model: str, note: str = ""
) -> dict[str, Any]:
    """The row as it is shown and written to JSON; its keys are explained in ``paper_rows``.

    Args:
        table, name: Where the paper prints the figure.
        unit: Of both figures.
        printed, counted: The paper's figure and ours.
        tolerance: How far ours may be off, as a share of the printed one.
        model: What was counted.
        note: What a reader has to know, as where the two differ.
    """
    ratio = counted / printed
    return {
        "table": table,
        "name": name,
        "unit": unit,
        "printed": printed,
        "counted": round(counted, 4),
        "ratio": round(ratio, 4),
        "fits": abs(ratio - 1) <= tolerance,
        "model": model,
        "note": note,
    }
