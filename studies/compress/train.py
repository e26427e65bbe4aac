"""A converged ViT of CIFAR-10 made cheaper: TokenLearner, token merging and pruning, smaller ViTs, side by side.

Every method starts from the same trained host (but for the smaller ViTs, which have to start anew), is trained for the
same few epochs by the recipe beside this file, with the host as teacher, and is scored on all 10,000 test images. Its
setting is the one that comes nearest to the cost of 8 tokens at half depth: in MACs, and once more in time measured on
this machine. ``naive`` is the insertion fine-tuned on the labels alone, ``host`` the host trained on as the others are,
and ``unlabelled`` learns the host's features alone and is scored by the host's own head. Every model is scored twice,
by its last weights (``accuracy``) and by their average over the training (``accuracy_averaged``): some gain by it, some
lose.

    python studies/npz_to_folders.py DIR/cifar10_train.npz runs/cifar10-folders/train
    python studies/npz_to_folders.py DIR/cifar10_test.npz runs/cifar10-folders/val
    OMP_NUM_THREADS=1 tokenlearner train runs/cifar10-folders --recipe studies/compress/host.yaml --output runs/host
    OMP_NUM_THREADS=1 python studies/compress/train.py --host runs/host --data runs/cifar10-folders --out runs/compress

A run that is in OUT/compress.csv is not done again, and one that was stopped is gone on with, so the same command
continues after a stop. ``--methods``, ``--seeds``, ``--budgets`` and ``--only`` take part of it. Every run is timed
beside the host when it is done; ``--time`` times the models of all of them together, on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tokenlearner
from tokenlearner.data.images import LabelledImages, scan_class_folders
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import command_line, git_commit, hardware
from tokenlearner.study import read_rows, write_rows
from tokenlearner.study.pictures import InMemory, decoded
from tokenlearner.training.build import start_maps
from tokenlearner.training.fit import fit
from tokenlearner.training.recipe import Recipe, load_recipe
from tokenlearner.training.unlabelled import fit_features

import lightning as L
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from peers import PEERS, at_latency, at_macs

HERE = Path(__file__).parent
TOKENS = 8
PEER_METHODS = ("tome", "top-k", "evit", "average pooling", "patch merger", "lower resolution", "shortened", "narrower")
FROM_SCRATCH = ("narrower", "shallower", "smaller")
OURS = ("tokenlearner", "naive", "elastic", "unlabelled")
METHODS = ("host", *OURS, *PEER_METHODS)


class Run(NamedTuple):
    """One row. ``at`` and ``tokens`` are those of insert, or of the setting of a peer; ``budget`` is what is equal."""

    method: str
    seed: int
    epochs: int
    at: float | None = None
    tokens: int | None = None
    budget: str = "macs"

    @property
    def folder(self) -> str:
        parts = (self.method.replace(" ", "-"), self.at, self.tokens, self.budget, self.epochs, self.seed)
        return "-".join(str(part) for part in parts if part is not None)


def runs(methods: list[str], seeds: list[int], budgets: list[str], ten_percent: int, host_epochs: int) -> list[Run]:
    """Every method once at equal MACs, seed by seed; then at a quarter of the depth, with fewer tokens and so on."""

    def of(method: str, seed: int) -> Iterator[Run]:
        if method == "host":
            yield Run(method, seed, ten_percent)
        elif method in OURS[1:]:
            yield Run(method, seed, ten_percent, 0.5, TOKENS)
        elif method == "tokenlearner":
            yield Run(method, seed, ten_percent, 0.5, TOKENS)
            yield Run(method, seed, ten_percent, 0.25, TOKENS)
            yield Run(method, seed, 2 * ten_percent, 0.5, TOKENS)
            yield from (Run(method, seed, ten_percent, 0.5, tokens) for tokens in (4, 2))
        else:
            yield from (Run(method, seed, ten_percent, budget=budget) for budget in budgets)
            if method in FROM_SCRATCH:  # what one would have done without a host: as long as it was trained
                yield Run(method, seed, host_epochs)

    found = [run for seed in seeds for method in methods for run in of(method, seed)]
    first = {(run.method, run.seed): run for run in reversed(found)}
    return sorted(found, key=lambda run: first[run.method, run.seed] is not run)


def made(run: Run, host: nn.Module, setting: Any) -> nn.Module:
    """The model of a run before its training."""
    if run.method == "host":
        return copy.deepcopy(host)
    if run.method in PEERS:
        return PEERS[run.method].build(host, setting)
    return tokenlearner.insert(copy.deepcopy(host), run.tokens, run.at)


def setting_of(run: Run, host: nn.Module, out: Path) -> Any:
    """Of a peer, at the cost of TokenLearner. Measured once: all seeds have the same, and runs that go on too."""
    if run.method not in PEERS:
        return None
    file = out / "settings.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    inserted = tokenlearner.insert(copy.deepcopy(host), TOKENS, 0.5)
    if "latency" not in known:
        speeds = measure_speed({"host": host, "it": inserted}, torch.randn(64, 3, 32, 32), rounds=25)
        known["latency"] = 1 / speeds[1].ratio
    key = f"{run.method}, {run.budget}"
    if key not in known and run.budget == "macs":
        share = cost(inserted, (3, 32, 32)).macs / cost(host, (3, 32, 32)).macs
        known[key] = at_macs(run.method, host, share, (3, 32, 32))._asdict()
    elif key not in known:
        known[key] = at_latency(run.method, host, known["latency"], torch.randn(64, 3, 32, 32), rounds=9)._asdict()
    file.write_text(json.dumps(known, indent=1))
    return from_json(run.method, known[key]["setting"])


def from_json(method: str, setting: Any) -> Any:
    """The setting of a peer as it takes it, whose lists and numbers JSON has changed."""
    if isinstance(setting, dict):  # JSON's keys are strings
        return {int(layer): kept for layer, kept in setting.items()}
    return tuple(setting) if isinstance(setting, list) and method != "tome" else setting


def recipe_of(run: Run, base: Recipe) -> Recipe:
    recipe = replace(base, epochs=run.epochs, seed=run.seed, elastic=run.method == "elastic")
    if run.method in FROM_SCRATCH:
        of_host = load_recipe(HERE / "host.yaml").optimizer  # its features are of another width
        return replace(recipe, optimizer=of_host, distill=replace(recipe.distill, features=0.0))
    return recipe


def in_memory(data: Path, host: Any) -> tuple[InMemory, InMemory]:
    """The training and test pictures as ``crop: shifted`` prepares them, but moved over grey; decoded once."""
    side, padding = host.preprocessing.input_size[1], host.preprocessing.input_size[1] // 8
    mean, std = (torch.tensor(values)[:, None, None] for values in (host.preprocessing.mean, host.preprocessing.std))
    parts = {padding: decoded(data / "train", side, None), 0: decoded(data / "val", side, None)}
    assert all(list(classes) == list(host.label_names) for _, _, classes in parts.values())
    train_set, val_set = (InMemory(x, labels, mean, std, moved) for moved, (x, labels, _) in parts.items())
    return train_set, val_set


def do(
    run: Run, host: nn.Module, sets: tuple[InMemory, InMemory], test: LabelledImages, out: Path
) -> list[dict[str, Any]]:
    """Trains and scores one model: its row, or for elastic tokens one for each number of them."""
    recipe = recipe_of(run, load_recipe(HERE / "recipe.yaml"))
    setting = setting_of(run, host, out)
    L.seed_everything(run.seed, workers=True, verbose=False)
    student, folder = made(run, host, setting), out / run.folder
    train_set, val_set = sets
    if run.method in OURS and run.method != "naive":
        start_maps(student, recipe, train_set)
    wall, cpu = time.perf_counter(), time.process_time()
    teacher = copy.deepcopy(host)  # it will be frozen
    options: dict[str, Any] = {"checkpoints": True, "resume": True}
    if run.method == "unlabelled":
        fit_features(student, teacher, train_set, val_set, recipe, folder, **options)
    else:
        taught = run.method != "naive" and run.epochs <= 10
        options |= {"num_classes": len(host.label_names), "teacher": teacher if taught else None}
        fit(student, train_set, val_set, recipe, folder, **options)
    cpu_seconds, seconds = time.process_time() - cpu, time.perf_counter() - wall
    weights = {"accuracy_averaged": copy.deepcopy(student.state_dict()), "accuracy": last_weights(folder)}
    torch.save(weights["accuracy"], folder / "weights.pt")
    rows = []
    for tokens in (8, 4, 2, 1) if run.method == "elastic" else (run.tokens,):
        if run.method == "elastic":
            tokenlearner.set_num_tokens(student, tokens)
        student.preprocessing, student.label_names = host.preprocessing, host.label_names
        scores = {}
        for score, state in weights.items():
            student.load_state_dict(state)
            scores[score] = round(evaluate(student, test, views=(1, 1), workers=0).top1, 4)
        speeds = measure_speed({"host": host, "it": student}, torch.randn(64, 3, 32, 32), rounds=15)
        rows.append(
            {
                "method": run.method,
                "seed": run.seed,
                "at": run.at,
                "tokens": tokens,
                "budget": run.budget,
                "setting": json.dumps(setting),
                "accuracy": scores["accuracy"],
                "accuracy_averaged": scores["accuracy_averaged"],
                "epochs": run.epochs,
                "macs": cost(student, (3, 32, 32)).macs,
                "host_macs": cost(host, (3, 32, 32)).macs,
                "images_per_second": round(speeds[1].images_per_second, 1),
                "host_images_per_second": round(speeds[0].images_per_second, 1),
                "cpu_seconds": round(cpu_seconds, 1),
                "seconds": round(seconds, 1),
            }
        )
    return rows


def last_weights(folder: Path) -> dict[str, Any]:
    """Those after the last step of the run in ``folder``; what Lightning calls the model's state is their average."""
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)
    state = checkpoint["current_model_state"]
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def time_together(rows: list[dict[str, Any]], host: nn.Module) -> list[dict[str, Any]]:
    """``rows`` with the images a second of all their models measured anew, in turns in one process."""

    def model_of(row: dict[str, Any]) -> str:
        """What its speed hangs on: not the seed, nor which of our ways it was trained."""
        method = "tokenlearner" if row["method"] in OURS else row["method"]
        return method if method == "host" else " ".join((method, row["at"], row["tokens"], row["setting"]))

    models = {"host": host}
    for row in rows:
        if model_of(row) not in models:
            run = Run(row["method"], 0, 1, float(row["at"] or 0), int(row["tokens"] or 0))
            models[model_of(row)] = made(run, host, from_json(run.method, json.loads(row["setting"])))
    speeds = {speed.name: speed for speed in measure_speed(models, torch.randn(64, 3, 32, 32), rounds=25)}
    base = speeds["host"].images_per_second
    return [
        {
            **row,
            "images_per_second": round(base * speeds[model_of(row)].ratio, 1),
            "host_images_per_second": round(base, 1),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/compress"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of runs, as the column run has them")
    parser.add_argument("--budgets", nargs="+", choices=("macs", "latency"), default=["macs", "latency"])
    parser.add_argument("--time", action="store_true", help="only time the models of all rows again, side by side")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "compress.csv"
    if args.time:
        write_rows(results, time_together(list(read_rows(results)), tokenlearner.load(args.host)))
        return
    command = command_line("python studies/compress/train.py", sys.argv[1:])
    host: Any = tokenlearner.load(args.host)
    host_epochs = json.loads((args.host / "recipe.json").read_text())["epochs"]
    test, sets = scan_class_folders(args.data / "val", host.label_names), in_memory(args.data, host)
    of_host = {
        "host": str(args.host),
        "host_accuracy": round(evaluate(host, test, views=(1, 1), workers=0).top1, 4),
        "host_epochs": host_epochs,
    }
    rows: list[dict[str, Any]] = list(read_rows(results))
    done = {row["run"] for row in rows}
    for run in runs(args.methods, args.seeds, args.budgets, host_epochs // 10, host_epochs):
        if run.folder in done or (args.only and run.folder not in args.only):
            continue
        commit = git_commit(HERE)
        new = do(run, host, sets, test, args.out)
        about = {**of_host, "commit": commit, "command": command, "hardware": hardware(), "run": run.folder}
        rows = [*read_rows(results), *({**row, **about} for row in new)]  # another process may have added some
        write_rows(results, rows)
        print(f"{run.folder}: {100 * new[0]['accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
