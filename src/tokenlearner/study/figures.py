"""Pictures of studies: bars and lines with the deviation over the seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter


def draw_figure(
    title: str, draws: Sequence[Callable[[Axes, dict[str, Any]], None]], summary: dict[str, Any], path: Path
) -> None:
    """A panel for each of ``draws``, side by side."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.0 if len(draws) == 1 else 5.5 * len(draws), 4.4), dpi=150, layout="constrained")
        axes = figure.subplots(1, len(draws), squeeze=False)[0]
        for axis, draw in zip(axes, draws):
            draw(axis, summary)
        axes[0].set_title(title, loc="left")
        figure.savefig(path, metadata={"Software": None})


def bars(axis: Axes, summary: Mapping[str, Any], ylabel: str = "accuracy, %") -> None:
    """One bar a variant, the first of another colour, over an axis that starts a little below the lowest."""
    variants = list(summary["variants"].values())
    means = [v["mean"] for v in variants]
    errors = [v["deviation"] or 0 for v in variants]
    colours = ["0.6", *["tab:blue"] * (len(variants) - 1)]
    axis.bar(range(len(variants)), means, yerr=errors, color=colours, capsize=3)
    for i, (mean, error) in enumerate(zip(means, errors)):
        axis.annotate(f"{mean:.1f}", (i, mean + error), ha="center", va="bottom", fontsize=8)
    name_variants(axis, variants)
    low = min(mean - error for mean, error in zip(means, errors))
    high = max(mean + error for mean, error in zip(means, errors))
    axis.set_ylim(max(0.0, low - 0.15 * (high - low) - 3), high + 0.05 * (high - low) + 3)
    axis.set_ylabel(ylabel)


def groups(
    axis: Axes,
    ticks: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float] | None]],
    *,
    xlabel: str = "",
    ylabel: str = "accuracy, %",
    title: str = "",
) -> None:
    """Bars side by side at every tick: for each of ``series`` the (mean, deviation) there, or None where there is none.

    They start at 0, so that lengths compare.
    """
    width = 0.8 / len(series)
    for k, (name, values) in enumerate(series.items()):
        there = [(i, value) for i, value in enumerate(values) if value is not None]
        places = [i + (k - (len(series) - 1) / 2) * width for i, _ in there]
        means, errors = [mean for _, (mean, _) in there], [error for _, (_, error) in there]
        axis.bar(places, means, width, yerr=errors if any(errors) else None, capsize=2, label=name)
        for place, mean, error in zip(places, means, errors):
            axis.annotate(f"{mean:.1f}", (place, mean + error), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if title:
        axis.set_title(title, fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper left")


def mean_and_deviation(summary: Mapping[str, Any], variant: str) -> tuple[float, float] | None:
    """Of a variant of a summary; None if it was not run."""
    found = summary["variants"].get(variant)
    return None if found is None else (found["mean"], found["deviation"] or 0.0)


def columns(axis: Axes, summary: Mapping[str, Any], names: Sequence[str], ylabel: str = "") -> None:
    """A mark for each of these columns of every variant."""
    variants = list(summary["variants"].values())
    for name, marker in zip(names, "osD^v"):
        values = [variant[name] for variant in variants]
        axis.plot(range(len(variants)), values, marker, markersize=5, label=name.replace("_", " "))
    name_variants(axis, variants)
    axis.set_ylabel(ylabel)
    axis.legend(frameon=False, fontsize=8, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))


def name_variants(axis: Axes, variants: Sequence[Mapping[str, Any]]) -> None:
    axis.set_xticks(range(len(variants)), [v["label"] for v in variants], rotation=30, ha="right", fontsize=8)


def against(
    axis: Axes,
    summary: Mapping[str, Any],
    series: Mapping[str, Sequence[tuple[float, str]]],
    *,
    xlabel: str,
    ylabel: str = "accuracy, %",
    level: str | None = None,
) -> None:
    """Lines through (x, variant) points, as far as these have been run; ``level`` is the variant of a dashed line."""
    for name, points in series.items():
        there = [(x, summary["variants"][variant]) for x, variant in points if variant in summary["variants"]]
        axis.errorbar(
            [x for x, _ in there],
            [v["mean"] for _, v in there],
            yerr=[v["deviation"] or 0 for _, v in there],
            marker="o",
            capsize=3,
            label=name,
        )
    if level in summary["variants"]:
        found = summary["variants"][level]
        axis.axhline(found["mean"], color="0.4", linestyle="--", label=found["label"])
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend(frameon=False, fontsize=8)


def scatter(axis: Axes, summary: Mapping[str, Any], x: str, xlabel: str, scale: float = 1.0, key: bool = False) -> None:
    """Score against the column ``x`` times ``scale``, a number a variant and a colour for the first word of its name;
    what the numbers stand for is beside the panel that has ``key``."""
    colours = {word: f"C{i}" for i, word in enumerate(dict.fromkeys(name.split()[0] for name in summary["variants"]))}
    for number, (name, variant) in enumerate(summary["variants"].items(), start=1):
        place = (scale * variant[x], variant["mean"])
        axis.errorbar(
            *place,
            yerr=variant["deviation"] or 0,
            fmt="o",
            color=colours[name.split()[0]],
            markersize=5,
            capsize=2,
            elinewidth=0.8,
            label=f"{number} {variant['label']}",
        )
        axis.annotate(str(number), place, (4, 3), textcoords="offset points", fontsize=7)
    axis.margins(x=0.1, y=0.1)
    costs = [variant[x] for variant in summary["variants"].values()]
    if max(costs) > 3 * min(costs):  # compared by their ratios; on less there would be a tick or two
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_xlabel(xlabel)
    axis.set_ylabel("accuracy, %")
    if key:
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
