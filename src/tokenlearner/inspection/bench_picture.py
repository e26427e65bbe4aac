"""A picture of how much of the MACs saved became time saved."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tokenlearner.inspection.bench import BenchRow

_SERIES = ("#4477aa", "#ee6677", "#228833", "#aa8800")  # Paul Tol's bright scheme, as in report.py
_BAR = 0.32  # inches


def draw_bench(rows: Sequence[BenchRow], path: Path) -> Path:
    """Writes a PNG with a group of bars a model: its speed-up at each batch size, beside its MAC ratio as a mark.

    Bars end at the median, their whiskers at the quartiles; the number is the realised fraction. ``rows`` are of one
    call of ``bench``.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    thickness = 0.8 / len(sizes)
    figure = Figure(figsize=(9, 1.2 + len(names) * len(sizes) * _BAR / 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, size in enumerate(sizes):
        series = [row for row in rows if row.batch_size == size]
        places = [names.index(row.name) - 0.4 + thickness * (i + 0.5) for row in series]
        low = [row.speedup - row.speedup_quartiles[0] for row in series]
        high = [row.speedup_quartiles[1] - row.speedup for row in series]
        axis.barh(
            places,
            [row.speedup for row in series],
            height=0.9 * thickness,
            xerr=(low, high),
            color=_SERIES[i % len(_SERIES)],
            label=f"measured, batch {size}",
        )
        for place, row in zip(places, series):
            end = max(row.speedup_quartiles[1], row.mac_ratio)
            axis.annotate(f"{row.realised:.2f}", (end, place), (4, 0), textcoords="offset points", va="center")
    ratios = {row.name: row.mac_ratio for row in rows}
    marks = range(len(names))
    axis.vlines(
        [ratios[name] for name in names],
        [place - 0.42 for place in marks],
        [place + 0.42 for place in marks],
        colors="black",
        linewidth=2,
        label="what the MACs would allow",
    )
    axis.set_yticks(list(marks))
    axis.set_yticklabels([name.encode(errors="backslashreplace").decode() for name in names], parse_math=False)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlim(left=0)
    axis.set_xlabel("times the first model's speed; the number is the realised fraction, speed-up / MAC ratio")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(sizes) + 1, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # boxes for a script it lacks will do
        figure.savefig(path, dpi=110, format="png")
    return path
