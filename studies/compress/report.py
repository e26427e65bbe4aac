"""Turns the runs of train.py into compress.csv, summary.json, results.md and a picture.

    python studies/compress/report.py --out runs/compress [runs/other]

Every row of the table is one way to make the host cheaper: mean and sample deviation over the seeds, in points from the
host, and the verdict on it beside TokenLearner with the same budget by the rule of ``tokenlearner.study``. Last comes
the mean of the same runs by their averaged weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokenlearner.study import RULE, compare, read_rows, write_rows

import matplotlib as mpl
from matplotlib.figure import Figure

HERE = Path(__file__).parent
LABELS = {
    "host": "the host, trained on as the others are",
    "tokenlearner": "TokenLearner",
    "naive": "TokenLearner, fine-tuned on the labels alone",
    "unlabelled": "TokenLearner, taught the host's features alone",
    "elastic": "elastic TokenLearner",
    "tome": "ToMe merging",
    "top-k": "top-k pruning",
    "evit": "top-k pruning, the rest fused (EViT)",
    "average pooling": "average pooling of the grid",
    "patch merger": "PatchMerger",
    "lower resolution": "lower resolution",
    "shortened": "shortened host",
    "narrower": "narrower ViT, from scratch",
}


def summarise(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    groups: defaultdict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in ("method", "at", "tokens", "budget", "epochs"))].append(row)
    epochs = min(int(row["epochs"]) for row in rows)
    ours = groups.get(("tokenlearner", "0.5", "8", "macs", str(epochs)), [])
    found = []
    for (method, at, tokens, budget, trained), runs in groups.items():
        points = [difference(run) for run in runs]
        entry: dict[str, Any] = {
            "method": method,
            "label": label_of(method, at, tokens),
            "budget": budget,
            "epochs": int(trained),
            "seeds": sorted(int(run["seed"]) for run in runs),
            "points": [round(point, 2) for point in points],
            "points_mean": round(statistics.mean(points), 2),
            "points_deviation": round(statistics.stdev(points), 2) if len(points) > 1 else None,
            "points_averaged": round(statistics.mean(difference(run, "accuracy_averaged") for run in runs), 2),
            "macs_share": round(int(runs[0]["macs"]) / int(runs[0]["host_macs"]), 3),
            "speedup": round(
                statistics.median(float(r["images_per_second"]) / float(r["host_images_per_second"]) for r in runs), 2
            ),
            "setting": runs[0]["setting"],
        }
        if ours and runs is not ours:
            entry["against_tokenlearner"] = compare(points, [difference(run) for run in ours])
        found.append(entry)
    order = list(LABELS)
    return sorted(found, key=lambda e: (order.index(e["method"]), e["epochs"], e["budget"] != "macs", -e["macs_share"]))


def difference(run: dict[str, str], score: str = "accuracy") -> float:
    return 100 * (float(run[score]) - float(run["host_accuracy"]))


def label_of(method: str, at: str, tokens: str) -> str:
    if not tokens:
        return LABELS[method]
    share = {"0.5": "½", "0.25": "¼", "0.75": "¾"}[at]
    return f"{LABELS[method]}, {tokens} token{'' if tokens == '1' else 's'} at {share}"


def table(summary: dict[str, Any]) -> str:
    columns = ("", "equal", "epochs", "MACs", "images/s", "points from the host", "beside TokenLearner", "averaged")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for entry in summary["methods"]:
        spread = "" if entry["points_deviation"] is None else f" ± {entry['points_deviation']:.2f}"
        against = entry.get("against_tokenlearner") or {}
        verdict = ""
        if against:
            verdict = f"{against['difference']:+.2f}"
            verdict += f" ({against['verdict']}, margin {against['margin']:.2f})" if against["verdict"] else ""
        equal = {"macs": "MACs", "latency": "time"}[entry["budget"]] if entry["setting"] != "null" else ""
        cost = f"{entry['epochs']} | {entry['macs_share']:.2f}× | {entry['speedup']:.2f}×"
        points = f"{entry['points_mean']:+.2f}{spread} | {verdict} | {entry['points_averaged']:+.2f}"
        lines.append(f"| {entry['label']} | {equal} | {cost} | {points} |")
    return "\n".join(lines)


def draw(summary: dict[str, Any], path: Path) -> None:
    """Points from the host against speed, of the runs of a tenth of its epochs."""
    entries = [entry for entry in summary["methods"] if entry["epochs"] == summary["epochs"]]
    colours = mpl.colormaps["tab20"].colors
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.0, 4.6), dpi=160, layout="constrained")
        axis = figure.subplots()
        axis.axhline(0, color="black", linewidth=0.8)
        for i, entry in enumerate(entries):
            at_equal_time = " (equal time)" if entry["budget"] == "latency" else ""
            axis.errorbar(
                entry["speedup"],
                entry["points_mean"],
                yerr=entry["points_deviation"] or 0,
                fmt="s" if at_equal_time else "o",
                color=colours[i % len(colours)],
                capsize=3,
                label=entry["label"] + at_equal_time,
            )
        axis.set_xlabel("images a second, the host's = 1")
        axis.set_ylabel("points from the host")
        axis.margins(0.1, 0.1)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    rows = [row for folder in args.out for row in read_rows(folder / "compress.csv")]
    summary = {
        "data": "CIFAR-10, all 10,000 test images",
        "rule": RULE,
        "host_accuracy": float(rows[0]["host_accuracy"]),
        "host_epochs": int(rows[0]["host_epochs"]),
        "epochs": min(int(row["epochs"]) for row in rows),
        "hardware": sorted({row["hardware"] for row in rows}),
        "methods": summarise(rows),
    }
    write_rows(HERE / "compress.csv", rows)
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (HERE / "results.md").write_text(table(summary) + "\n")
    draw(summary, HERE / "compress.png")
    print(table(summary))


if __name__ == "__main__":
    main()
