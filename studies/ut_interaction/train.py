"""Six interactions of two people, from mp4 files: ViViT and X(2+1)D, plain and with TokenLearner, by one recipe each.

UT-Interaction has two sets of sixty clips, filmed in different places: a model trained on one is scored on the other,
and back. Every run is ``tokenlearner.training.train.train`` on lists of the mp4 files with the recipe beside this
file, and ``tokenlearner.evaluation.accuracy.evaluate`` of the saved model: the weights of the last epoch, two windows
and three crops of every clip; no epoch is picked. The recipes were chosen inside set 1 (README.md). ViViT starts from
our plain ViT of CIFAR-10, inflated; X(2+1)D from scratch, since there is nothing to inflate.

    OMP_NUM_THREADS=1 python studies/ut_interaction/train.py --data DIR --out runs/ut-interaction

DIR holds ``clips.csv`` with the columns file, label, name and set, and the files. A run that is in OUT/results.csv is
not done again, and one that was stopped is gone on with, so the same command continues after a stop. ``--models``,
``--seeds``, ``--sets``, ``--epochs`` and ``--fold`` (choose recipes: three of ten sequences of the training set are
held out instead of the other set) take part of it.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import tokenlearner
from tokenlearner.data.annotations import read_clip_list
from tokenlearner.data.clip_sources import Listing
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.inspection.summary import command_line, git_commit, hardware
from tokenlearner.study import read_rows, write_rows
from tokenlearner.training.recipe import load_recipe
from tokenlearner.training.train import train

HERE = Path(__file__).parent
VIEWS = (2, 3)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vivit": ("vivit.yaml", {"tokens": 0}),
    "vivit-tl8": ("vivit.yaml", {}),
    "x2plus1d": ("x2plus1d.yaml", {"tokens": 0}),
    "x2plus1d-tl8": ("x2plus1d.yaml", {}),
}


def write_lists(data: Path, out: Path, train_set: str, fold: int | None) -> tuple[Path, Path]:
    """(train.csv, val.csv) of absolute paths: the two sets, or parts of the training set where a fold is given."""
    with (data / "clips.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] != "other"]

    def held_out(row: dict[str, str]) -> bool:
        if fold is None:
            return row["set"] != train_set
        return (int(row["sequence"]) - 1) % 10 // 3 == fold

    chosen = [row for row in rows if fold is None or row["set"] == train_set]
    out.mkdir(parents=True, exist_ok=True)
    paths = out / "train.csv", out / "val.csv"
    for path, part in zip(paths, (False, True)):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("file", "label", "name"))
            writer.writerows(
                ((data / row["file"]).resolve(), row["label"], row["name"]) for row in chosen if held_out(row) == part
            )
    return paths


def run(
    model: str, train_set: str, seed: int, data: Path, out: Path, epochs: int | None, fold: int | None
) -> dict[str, Any]:
    """Trains and scores one model: its row of results.csv, accuracies in percent."""
    file, changes = MODELS[model]
    changes = {**changes, "seed": seed, **({} if epochs is None else {"epochs": epochs})}
    recipe = load_recipe(HERE / file, **changes)
    lists = write_lists(data, out / f"set{train_set}", train_set, fold)
    folder = out / f"{model}-set{train_set}-seed{seed}"
    wall, cpu = time.perf_counter(), time.process_time()
    summary = train(lists[0], recipe, folder, listing=Listing(val=lists[1]), resume=(folder / "checkpoints").exists())
    trained = tokenlearner.load(folder)
    cpu_seconds, seconds = time.process_time() - cpu, time.perf_counter() - wall
    clips = read_clip_list(lists[1], trained.label_names)
    scored = evaluate(trained, clips, views=VIEWS, workers=0, batch_size=12)
    of_model = summary["models"][0]
    return {
        "model": model,
        "train_set": train_set,
        "seed": seed,
        "epochs": recipe.epochs,
        "top1": round(100 * scored.top1, 2),
        "mean_class_accuracy": round(100 * scored.to_dict()["mean_per_class"], 2),
        "top1_one_view": round(100 * of_model["accuracy"], 2),
        "clips": scored.images,
        "views": "×".join(map(str, VIEWS)),
        "parameters": of_model["parameters"],
        "macs": of_model["macs"],
        "cpu_seconds": round(cpu_seconds, 1),
        "seconds": round(seconds, 1),
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/ut-interaction"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", choices=("1", "2"), default=["1", "2"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--fold", type=int, choices=(0, 1, 2))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.csv"
    command = command_line("python studies/ut_interaction/train.py", sys.argv[1:])
    rows: list[dict[str, Any]] = list(read_rows(results))
    done = {(row["model"], row["train_set"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        for train_set in args.sets:
            for model in args.models:
                if (model, train_set, seed) in done:
                    continue
                commit = git_commit(HERE)
                row = run(model, train_set, seed, args.data, args.out, args.epochs, args.fold)
                rows.append({**row, "commit": commit, "command": command})
                write_rows(results, rows)
                print(f"{model} trained on set {train_set}, seed {seed}: {row['top1']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
