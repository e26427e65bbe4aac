"""Turns the runs of train.py into what is kept in studies/photos/DATASET: tables, summary.json and a picture.

    python studies/photos/report.py --out runs/cifar10 --keep-weights
    python studies/photos/report.py --out runs/flowers

prints the table for the README too. The verdict on a model compares its mean with plain's: the difference is *better*
or *worse* if it is larger than its 95 % margin, and *undecided* otherwise. The margin is Student's t with n₁ + n₂ − 2
degrees of freedom times the pooled standard error; a difference smaller than that is one this many seeds can't tell.

``--keep-weights`` (CIFAR-10) keeps of each model in ``KEPT`` the seed with the best test score, in fp16, with a card.
What was written is read again and scored on all test photos on the CPU, in float32; that number stands in the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenlearner
from tokenlearner.study import RULE, compare, read_rows

import matplotlib as mpl
import safetensors
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import nn

from photos import DATASETS, Augmentation, Batches, Images, load
from recipes import MODELS, Settings
from records import REPOSITORY, read_settings

HERE = Path(__file__).parent
WEIGHTS = REPOSITORY / "src/tokenlearner/models/weights"
KEPT = ("plain", "tl8-half", "tl8-three-quarters")
SIZES = {(128, 4, 4): "micro", (192, 12, 3): "ti"}  # (width, depth, heads) in the names of presets
COLOURS = {  # Okabe and Ito's, told apart with any colour vision
    "plain": "#000000",
    "tl8-half": "#0072B2",
    "tl8-three-quarters": "#D55E00",
    "tl8-half-fuser": "#009E73",
}


def summarise(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Mean and sample standard deviation per model, what each costs, and how it compares with plain."""
    models: dict[str, Any] = {}
    for name, variant in MODELS.items():
        runs = sorted((row for row in rows if row["model"] == name), key=lambda row: int(row["seed"]))
        if not runs:
            continue
        scores, speeds = ([float(row[key]) for row in runs] for key in ("top1", "images_per_second"))
        models[name] = {
            "label": variant.label,
            "n": len(runs),
            "top1_mean": round(statistics.mean(scores), 2),
            "top1_deviation": round(statistics.stdev(scores), 2) if len(runs) > 1 else None,
            "top1": scores,
            "seeds": [int(row["seed"]) for row in runs],
            "parameters": int(runs[0]["parameters"]),
            "macs": int(runs[0]["macs"]),
            "tokens": runs[0]["tokens"],
            "images_per_second": speeds,
            "images_per_second_mean": round(statistics.mean(speeds), 1),
            "cpu_seconds_mean": round(statistics.mean(float(row["cpu_seconds"]) for row in runs), 1),
        }
    for name, model in models.items():
        if name != "plain" and "plain" in models:
            model["against_plain"] = compare(model["top1"], models["plain"]["top1"])
    return models


def table(models: dict[str, Any]) -> str:
    """For the README, in Markdown. Speed is the fastest seed's: what else the machine did can only slow a run down."""
    base = models.get("plain")
    lines = [
        "| model | top-1, % | against plain | multiply-adds | training, images/s (fastest seed) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, m in models.items():
        macs, speed = f"{m['macs'] / 1e6:.1f} M", f"{max(m['images_per_second']):,.0f}"
        if base and name != "plain":
            macs += f" ({m['macs'] / base['macs']:.2f}×)"
            speed += f" ({max(m['images_per_second']) / max(base['images_per_second']):.2f}×)"
        lines.append(f"| {m['label']} | {_mean(m)} (n = {m['n']}) | {_against(m)} | {macs} | {speed} |")
    return "\n".join(lines)


def _mean(model: dict[str, Any]) -> str:
    deviation = model["top1_deviation"]
    return f"{model['top1_mean']:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")


def _against(model: dict[str, Any]) -> str:
    found = model.get("against_plain")
    if found is None:
        return ""
    difference = f"{found['difference']:+.2f}".replace("-", "−")
    if found["verdict"] is None:
        return f"{difference}, too few runs"
    return f"{found['verdict']} ({difference}, margin {found['margin']:.2f})"


def draw(models: dict[str, Any], title: str, path: Path) -> None:
    """Accuracy against multiply-adds: the mean and its deviation, and beside it a dot for every seed."""
    costs = [m["macs"] / 1e6 for m in models.values()]
    least, span = min(costs), max(costs) - min(costs) or min(costs)
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.0), dpi=160, layout="constrained")
        axis = figure.subplots()
        for (name, m), x in zip(models.items(), costs):
            colour, deviation = COLOURS[name], m["top1_deviation"] or 0.0
            axis.errorbar(x, m["top1_mean"], yerr=deviation, fmt="o", color=colour, markersize=8, capsize=4)
            axis.plot([x + 0.02 * span] * m["n"], m["top1"], "o", color=colour, markersize=4, alpha=0.55, mew=0)
            on_left = x == least  # the next one is close to it on its right
            axis.annotate(
                m["label"].replace(" from ", "\nfrom "),
                (x, m["top1_mean"]),
                xytext=(-9 if on_left else 16, 0),
                textcoords="offset points",
                ha="right" if on_left else "left",
                va="center",
                color=colour,
                fontsize=9,
            )
        axis.set_xlim(least - 0.42 * span, least + 1.28 * span)
        axis.margins(y=0.18)
        axis.set_xlabel("multiply-adds an image, million")
        axis.set_ylabel("top-1 on the test set, %")
        runs = sorted({m["n"] for m in models.values()})
        seeds = " or ".join(map(str, runs)) + (" seeds" if runs[-1] > 1 else " seed")
        axis.set_title(f"{title}: mean ± sample deviation of {seeds}", fontsize=10, loc="left")
        figure.savefig(path, metadata={"Software": None})


def preset_name(name: str, s: Settings) -> str:
    """As tokenlearner.models.presets names its models."""
    size, inserted = SIZES[s.width, s.depth, s.heads], MODELS[name].inserted
    what = f"{inserted['num_tokens']}at{int(s.depth * inserted['at'])}_mlp" if inserted else "plain"
    return f"tokenlearner_{size}{s.patch}_{s.size}_{what}"


def keep(name: str, best: dict[str, str], out: Path, target: Path, test: Images) -> dict[str, Any]:
    """Writes the weights of one run to ``target``, a single file that says all about them, and scores what was written.

    Beside host and insertion, as tokenlearner.save writes them, its metadata has the preprocessing and the labels.
    """
    folder = out / "weights" / f"{name}-{best['seed']}"
    config = json.loads((folder / "config.json").read_text())
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata() | {key: json.dumps(config[key]) for key in ("preprocessing", "labels")}
    state = {key: value.half() for key, value in safetensors.torch.load_file(folder / "model.safetensors").items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(safetensors.torch.save(state, metadata))
    model = tokenlearner.load(folder)
    model.load_state_dict(safetensors.torch.load_file(target))
    return {
        "file": target.name,
        "seed": int(best["seed"]),
        "bytes": target.stat().st_size,
        "top1_reported": float(best["top1"]),
        "top1_of_saved_fp16": round(score(model, test), 2),
    }


def score(model: nn.Module, images: Images, batch: int = 250) -> float:
    """Top-1 in per cent."""
    of, hits = model.preprocessing, 0
    model = model.float().eval()
    with torch.inference_mode():
        for x, y in Batches(images, batch, Augmentation(of.mean, of.std)):
            hits += int((model(x).argmax(dim=1) == y).sum())
    return 100 * hits / len(images.labels)


def card(name: str, settings: Settings, of: dict[str, Any], best: dict[str, str]) -> str:
    """The model card: card.md with this model's numbers."""
    inserted = MODELS[name].inserted
    arguments = ", ".join(f"{key}={value!r}" for key, value in inserted.items()) if inserted else ""
    numbers = {
        **asdict(settings),
        **of["weights"],
        "name": of["weights"]["file"].removesuffix(".safetensors"),
        "title": f"A ViT with {MODELS[name].label}" if inserted else "A plain ViT",
        "made": f"`tokenlearner.insert(vit, {arguments})`" if inserted else "nothing inserted",
        "parameters": of["parameters"],
        "mega_macs": of["macs"] / 1e6,
        "tokens": of["tokens"],
        "mean": _mean(of),
        "n": of["n"],
        "more": _more(settings),
        "command": best["command"],
        "commit": best["commit"],
        "hardware": best["hardware"],
        "minutes": float(best["cpu_seconds"]) / 60,
        "limits": _limits(settings, of),
    }
    return (HERE / "card.md").read_text().format(**numbers)


def _more(s: Settings) -> str:
    names = {"mixup": "mixup", "cutmix": "cutmix", "affine": "affine warps", "colour": "brightness and contrast"}
    return "".join(f", {words} {value:g}" for key, words in names.items() if (value := getattr(s, key)))


def _limits(settings: Settings, of: dict[str, Any]) -> str:
    if of["top1_mean"] >= 90:
        return ""
    return (
        f"Trained for {settings.epochs} epochs only: far from what a ViT reaches on CIFAR-10 with long training (over "
        "90 %).\nIt shows that the pieces work; it is no classifier to rely on.\n"
    )


def keep_all(models: dict[str, Any], rows: list[dict[str, str]], settings: Settings, given: argparse.Namespace) -> None:
    """Writes weights and cards, and puts what was written into ``models``."""
    _, test = load("cifar10", given.data, settings.size)
    for name in (name for name in KEPT if name in models):
        best = max((row for row in rows if row["model"] == name), key=lambda row: float(row["top1"]))
        target = given.weights / f"{preset_name(name, settings)}.cifar10.safetensors"
        models[name]["weights"] = kept = keep(name, best, given.out, target, test)
        target.with_suffix(".md").write_text(card(name, settings, models[name], best))
        print(f"{target.name}: {kept['top1_of_saved_fp16']:.2f} % as saved ({kept['top1_reported']:.2f} % in the run)")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the --out of train.py")
    parser.add_argument("--to", type=Path, help="default: studies/photos/DATASET")
    parser.add_argument("--keep-weights", action="store_true")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where --keep-weights writes")
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared/data/images")
    return parser.parse_args()


def main() -> None:
    given = read_arguments()
    rows = read_rows(given.out / "results.csv")
    what, settings = read_settings(given.out / "settings.json")
    dataset = what["dataset"]
    if what["limit"] or {row["scored_on"] for row in rows} != {"test"}:
        sys.exit(f"{given.out} has no runs, or some that were not scored on the whole test set")
    if given.keep_weights and dataset != "cifar10":
        sys.exit("--keep-weights is for CIFAR-10")
    to = given.to or HERE / dataset
    to.mkdir(parents=True, exist_ok=True)
    models = summarise(rows)
    if given.keep_weights:
        keep_all(models, rows, settings, given)
    summary = {
        "dataset": dataset,
        "recipe": asdict(settings),
        "verdict": RULE,
        **{key: sorted({row[key] for row in rows}) for key in ("scored_on", "commit", "command", "hardware")},
        "models": models,
    }
    (to / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    for name in ("results.csv", "curves.csv"):
        shutil.copyfile(given.out / name, to / name)
    draw(models, DATASETS[dataset].title, to / "accuracy.png")
    print(table(models))


if __name__ == "__main__":
    main()
