"""A picture of what a data set holds."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

MOST_NAMES = 40  # classes whose bars still have room for a name


def draw_statistics(document: Mapping[str, Any], path: Path) -> Path:
    """Writes a sheet with the counts of ``statistics``' document: classes, sizes and, of videos, lengths and rates."""
    videos = document["kind"] == "videos"
    figure = Figure(figsize=(13, 7 if videos else 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if videos else 1, 2, squeeze=False).flat
    _draw_classes(next(axes), document["parts"])
    _draw_histogram(next(axes), document["sizes"]["short_side"], "short side (pixels)", "files")
    if videos:
        _draw_histogram(next(axes), document["seconds"]["histogram"], "length (seconds)", "clips")
        _draw_rates(next(axes), document["fps"])
    title = f"{document['data']}: {document['items']:,} {document['kind']}, {document['classes']:,} classes"
    if document["damaged"]["count"]:
        title += f", {document['damaged']['count']:,} damaged"
    figure.suptitle(_printable(title), parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # boxes for a script it lacks will do
        figure.savefig(path, dpi=100, format="png")
    return path


def _draw_classes(axis: Axes, parts: Mapping[str, Any]) -> None:
    """Bars of the parts on one another, the largest class first."""
    total: Counter[str] = Counter()
    for part in parts.values():
        total.update(part["classes"])
    names = [name for name, _ in total.most_common()]
    floor = [0] * len(names)
    for title, part in parts.items():
        heights = [part["classes"].get(name, 0) for name in names]
        axis.bar(range(len(names)), heights, bottom=floor, label=title, width=0.8 if len(names) <= MOST_NAMES else 1.0)
        floor = [low + height for low, height in zip(floor, heights)]
    if len(names) <= MOST_NAMES:
        axis.set_xticks(range(len(names)))
        axis.set_xticklabels([_printable(name)[:24] for name in names], rotation=90, fontsize=7, parse_math=False)
    if len(parts) > 1:
        axis.legend()
    axis.set_xlabel("class")
    axis.set_ylabel("items")


def _draw_histogram(axis: Axes, histogram: Mapping[str, Any], what: str, of: str) -> None:
    edges, counts = histogram["edges"], histogram["counts"]
    axis.bar(edges[:-1], counts, width=[b - a for a, b in pairwise(edges)], align="edge")
    axis.set_xlabel(what)
    axis.set_ylabel(of)


def _draw_rates(axis: Axes, rates: list[Mapping[str, float]], most: int = 12) -> None:
    shown = sorted(rates[:most], key=lambda rate: rate["fps"])
    axis.bar([f"{rate['fps']:g}" for rate in shown], [rate["files"] for rate in shown])
    axis.set_xlabel("frames a second" + (f", the {most} most frequent" if len(rates) > most else ""))
    axis.set_ylabel("files")


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()  # file names need not be valid UTF-8
