"""Turns the runs of train.py into what is kept: results.csv, summary.json, a picture, and the best model's weights.

    python studies/ut_interaction/report.py --out runs/ut-interaction [--more runs/other] --data DIR

A model's score is the mean of both directions, one number a seed; the verdict on a TokenLearner compares its three
with those of its plain host by the rule of ``tokenlearner.study``. Of the model with the best mean and of the
TokenLearner with the best mean, the weights of the best run are kept, in fp16. What was written is read again and
scored on the clips of the other set.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import tokenlearner
from tokenlearner.data.annotations import read_clip_list
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.study import RULE, compare, read_rows, write_rows

import matplotlib as mpl
import safetensors
import safetensors.torch
from matplotlib.figure import Figure

from train import VIEWS, write_lists

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "src/tokenlearner/models/weights"
LABELS = {
    "vivit": "ViViT",
    "vivit-tl8": "ViViT, 8 tokens a slice from ½ depth on",
    "x2plus1d": "X(2+1)D",
    "x2plus1d-tl8": "X(2+1)D, 8 tokens a frame in its last 3 blocks",
}
NAMES = {
    "vivit": "vivit_micro_patch8x2_64",
    "vivit-tl8": "tokenlearner_vivit_micro8_64_8at2_mlp",
    "x2plus1d": "x2plus1d_micro",
    "x2plus1d-tl8": "x2plus1d_micro_tokenlearner",
}
PLAIN = {"vivit-tl8": "vivit", "x2plus1d-tl8": "x2plus1d"}
COLOURS = {
    "vivit": "#000000",
    "vivit-tl8": "#0072B2",
    "x2plus1d": "#D55E00",
    "x2plus1d-tl8": "#009E73",
}  # Okabe and Ito


def summarise(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Mean and sample deviation over the seeds, of both directions together and of each."""
    models: dict[str, Any] = {}
    for name, label in LABELS.items():
        runs = [row for row in rows if row["model"] == name]
        seeds = sorted({int(row["seed"]) for row in runs})
        scores = {(int(row["seed"]), row["train_set"]): float(row["top1"]) for row in runs}
        whole = [seed for seed in seeds if all((seed, part) in scores for part in "12")]
        if not whole:
            continue
        both = [statistics.mean(scores[seed, part] for part in "12") for seed in whole]
        models[name] = {
            "label": label,
            "seeds": whole,
            "top1": [round(score, 2) for score in both],
            **spread("top1", both),
            **{
                f"set{part}_to_set{'21'[int(part) - 1]}": {
                    "top1": [scores[seed, part] for seed in whole],
                    **spread("top1", [scores[seed, part] for seed in whole]),
                }
                for part in "12"
            },
            "parameters": int(runs[0]["parameters"]),
            "macs": int(runs[0]["macs"]),
            "epochs": int(runs[0]["epochs"]),
            "cpu_seconds_mean": round(statistics.mean(float(row["cpu_seconds"]) for row in runs), 1),
        }
    for name, plain in PLAIN.items():
        if name in models and plain in models:
            models[name]["against_plain"] = compare(models[name]["top1"], models[plain]["top1"])
    return models


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    return {
        f"{name}_mean": round(statistics.mean(values), 2),
        f"{name}_deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
    }


def draw(models: dict[str, Any], path: Path) -> None:
    """Score against multiply-adds: the mean and its deviation, and beside it a dot for every seed."""
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.0), dpi=160, layout="constrained")
        axis = figure.subplots()
        for name, model in models.items():
            x, deviation = model["macs"] / 1e6, model["top1_deviation"] or 0.0
            axis.errorbar(
                x,
                model["top1_mean"],
                yerr=deviation,
                fmt="o",
                color=COLOURS[name],
                markersize=8,
                capsize=4,
                label=model["label"],
            )
            axis.plot([x + 6] * len(model["top1"]), model["top1"], "o", color=COLOURS[name], markersize=4, alpha=0.55)
        axis.set_xlabel("multiply-adds a clip, million")
        axis.set_ylabel("top-1 on the set not trained on, %")
        axis.margins(0.12)
        axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        figure.savefig(path, metadata={"Software": None})


def keep(name: str, best: dict[str, str], folder: Path, lists: tuple[Path, Path]) -> dict[str, Any]:
    """Writes the weights of one run, a single file that says all about them, and scores what was written."""
    target = WEIGHTS / f"{NAMES[name]}.ut_interaction.safetensors"
    config = json.loads((folder / "config.json").read_text())
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata() | {key: json.dumps(config[key]) for key in ("preprocessing", "labels")}
    state = safetensors.torch.load_file(folder / "model.safetensors")
    halved = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    target.write_bytes(safetensors.torch.save(halved, metadata))
    model = tokenlearner.load(folder)
    model.load_state_dict(safetensors.torch.load_file(target))
    scored = evaluate(model.float(), read_clip_list(lists[1], model.label_names), views=VIEWS, workers=0, batch_size=12)
    return {
        "file": target.name,
        "model": name,
        "seed": int(best["seed"]),
        "train_set": best["train_set"],
        "bytes": target.stat().st_size,
        "frames": model.preprocessing.frames,
        "fps": model.preprocessing.fps,
        "top1_reported": float(best["top1"]),
        "top1_of_saved_fp16": round(100 * scored.top1, 2),
        "per_class": {label: round(100 * share, 1) for label, share in scored.per_class.items()},
    }


def card(kept: dict[str, Any], of: dict[str, Any], best: dict[str, str]) -> str:
    other = "21"[int(kept["train_set"]) - 1]
    direction = of[f"set{kept['train_set']}_to_set{other}"]
    values = {
        **kept,
        "name": kept["file"].removesuffix(".safetensors"),
        "title": of["label"],
        "other": other,
        "parameters": of["parameters"],
        "mega_macs": of["macs"] / 1e6,
        "epochs": of["epochs"],
        "n": len(of["seeds"]),
        "mean": f"{direction['top1_mean']:.1f} ± {direction['top1_deviation'] or 0:.1f}",
        "both": f"{of['top1_mean']:.1f} ± {of['top1_deviation'] or 0:.1f}",
        "classes": ", ".join(f"{label} {share:.0f} %" for label, share in kept["per_class"].items()),
        "start": "from scratch" if kept["model"].startswith("x2") else "from our CIFAR-10 model, inflated",
        "recipe": "x2plus1d.yaml" if kept["model"].startswith("x2") else "vivit.yaml",
        "command": best["command"],
        "commit": best["commit"],
        "hardware": best["hardware"],
        "minutes": float(best["cpu_seconds"]) / 60,
    }
    return (HERE / "card.md").read_text().format(**values)


def keep_best(
    name: str, of: dict[str, Any], found: list[tuple[dict[str, str], Path]], args: argparse.Namespace
) -> dict[str, Any]:
    """Keeps the best run of a model, with its card."""
    best, home = max(((row, f) for row, f in found if row["model"] == name), key=lambda pair: float(pair[0]["top1"]))
    lists = write_lists(args.data, args.out / f"set{best['train_set']}", best["train_set"], None)
    kept = keep(name, best, home / f"{name}-set{best['train_set']}-seed{best['seed']}", lists)
    (WEIGHTS / kept["file"]).with_suffix(".md").write_text(card(kept, of, best))
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="More folders of runs.")
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    folders = [args.out, *args.more]
    found = [(row, folder) for folder in folders for row in read_rows(folder / "results.csv")]
    rows = [row for row, _ in found]
    models = summarise(rows)
    best_of = [max(names, key=lambda key: models[key]["top1_mean"]) for names in (models, PLAIN.keys() & models.keys())]
    weights = [keep_best(name, models[name], found, args) for name in dict.fromkeys(best_of)]
    summary = {
        "data": "UT-Interaction, six classes, 60 clips a set; trained on one set and scored on the other, and back",
        "rule": RULE,
        "views": "×".join(map(str, VIEWS)),
        "hardware": sorted({row["hardware"] for row in rows}),
        "models": models,
        "weights": weights,
    }
    write_rows(HERE / "results.csv", rows)
    (HERE / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    draw(models, HERE / "accuracy.png")
    for label, model in models.items():
        print(label, model["top1_mean"], model["top1_deviation"], model.get("against_plain"))
    print(weights)


if __name__ == "__main__":
    main()
