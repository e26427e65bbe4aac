"""Runs that are repeated, stopped and gone on with: the same numbers as in one go."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from noisy_photos import draw_photos

import tokenlearner
from tokenlearner.training import checkpoint
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.train import train

# Everything that draws random numbers or keeps a state is on.
RECIPE = Recipe(
    model="test_vit",
    image_size=32,
    tokens=2,
    epochs=4,
    batch_size=8,
    accumulate=2,
    workers=0,
    ema=0.9,
    drop_path=0.2,
    checkpoint_steps=1,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=1),
    augment=AugmentRecipe(erasing=0.5, mixup=0.8, cutmix=1.0),
)


class StoppedError(Exception):
    """In place of a kill, where the test must live on."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """36 pictures of two classes."""
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 18)


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    train(photos, RECIPE, output)
    return output


def rows(output: Path) -> list[dict[str, str]]:
    """Every row of metrics.csv in order, numbers as they were written."""
    with (output / "metrics.csv").open(newline="") as file:
        return sorted(
            ({k: v for k, v in row.items() if v} for row in csv.DictReader(file)), key=lambda r: int(r["step"])
        )


def same_run(one: Path, other: Path) -> bool:
    weights = [tokenlearner.load(output).state_dict() for output in (one, other)]
    same = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    return same and rows(one) == rows(other)


def test_the_same_seed_gives_the_same_run_with_any_number_of_workers(photos, unbroken, tmp_path):
    train(photos, replace(RECIPE, workers=2), tmp_path)
    assert len(rows(unbroken)) == 4
    assert same_run(unbroken, tmp_path)


def test_another_seed_gives_another_run(photos, unbroken, tmp_path):
    train(photos, replace(RECIPE, seed=1), tmp_path)
    losses = [[row["train_loss"] for row in rows(output)] for output in (unbroken, tmp_path)]
    assert not set(losses[0]) & set(losses[1])


@pytest.mark.parametrize("saves", range(1, 12))
def test_a_run_stopped_at_any_checkpoint_goes_on_as_if_it_had_not(photos, unbroken, tmp_path, monkeypatch, saves):
    """3 steps of 2 parts an epoch: after every step but the last, and after the epoch, there is a checkpoint."""
    write, written = checkpoint.WholeCheckpoints.save_checkpoint, []

    def stop_after(self, *arguments, **options):
        write(self, *arguments, **options)
        written.append(arguments)
        if len(written) == saves:
            raise StoppedError

    monkeypatch.setattr(checkpoint.WholeCheckpoints, "save_checkpoint", stop_after)
    with pytest.raises(StoppedError):
        train(photos, RECIPE, tmp_path)
    monkeypatch.undo()
    summary = train(photos, RECIPE, tmp_path, resume=True)
    assert same_run(unbroken, tmp_path)
    assert (
        summary["models"][0]["accuracy"] == json.loads((unbroken / "summary.json").read_text())["models"][0]["accuracy"]
    )


# ---- processes that are killed, and processes that share the work


def command(*arguments: object, processes: int = 1) -> tuple[list[str], dict[str, str]]:
    """A training command in processes of its own, on one thread each."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return [*start, "tokenlearner", "train", *map(str, arguments)], {**os.environ, "OMP_NUM_THREADS": "1"}


def recipe_file(folder: Path, recipe: Recipe) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(asdict(recipe)))  # JSON is YAML
    return path


@pytest.mark.slow
def test_a_run_killed_again_and_again_goes_on_as_if_it_had_not_been(photos, unbroken, tmp_path):
    """kill -9 at moments nobody chose; a checkpoint is written at every step, so that some hit the writing of one."""
    arguments, environment = command(photos, "--recipe", recipe_file(tmp_path, RECIPE), "--output", tmp_path / "run")
    kills = 0
    while True:
        process = subprocess.Popen([*arguments, "--resume"][: None if kills else -1], env=environment)
        checkpoints = tmp_path / "run" / "checkpoints"
        before = latest(checkpoints)
        while process.poll() is None and (kills >= 3 or latest(checkpoints) == before):
            time.sleep(0.001)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)  # a new file has just begun to be written, or just been finished
        process.wait()
        kills += 1
    assert (kills, process.returncode) == (3, 0)
    assert same_run(unbroken, tmp_path / "run")


def latest(folder: Path) -> set[tuple[str, int]]:
    """The files and when they were written last; empty where there are none."""
    try:
        return {(file.name, file.stat().st_mtime_ns) for file in folder.iterdir()}
    except FileNotFoundError:  # the folder, or a file that was just moved into its place
        return set()


def test_a_kill_in_the_middle_of_writing_leaves_the_last_checkpoint(photos, unbroken, tmp_path, monkeypatch):
    write, written = torch.save, []

    def torn(content, file, *arguments, **options):
        written.append(content)
        if len(written) == 5:
            file.write(b"half a checkpo")
            raise StoppedError
        write(content, file, *arguments, **options)

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(StoppedError):
        train(photos, RECIPE, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "checkpoints" / "last.tmp").read_bytes() == b"half a checkpo"
    train(photos, RECIPE, tmp_path, resume=True)
    assert same_run(unbroken, tmp_path)


@pytest.mark.slow
def test_two_processes_share_the_work_and_agree(photos, tmp_path):
    """Of 37 files, one of them no picture, 9 are held out: in batches of 8, the second has none for one process."""
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "red" / "00.png").write_bytes(b"no picture")
    (photos / "red" / "18.png").write_bytes((photos / "red" / "01.png").read_bytes())
    plain = replace(
        RECIPE, epochs=2, held_out=0.25, ema=None, drop_path=0.0, augment=AugmentRecipe(None, (1.0, 1.0), 0.0, 0.0)
    )
    scores: dict[int, dict] = {}
    for processes in (1, 2):
        output = tmp_path / f"by-{processes}"
        options = ["--recipe", recipe_file(tmp_path, plain), "--output", output, "--accumulate", 2 // processes]
        arguments, environment = command(photos, *options, processes=processes)
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        scores[processes] = json.loads((output / "summary.json").read_text())
    assert (scores[2]["held_out"], scores[2]["damaged"]) == (9, scores[1]["damaged"])
    assert scores[2]["models"][0]["accuracy"] == scores[1]["models"][0]["accuracy"]
    for one, two in zip(rows(tmp_path / "by-1"), rows(tmp_path / "by-2"), strict=True):
        assert {k: float(v) for k, v in two.items()} == pytest.approx({k: float(v) for k, v in one.items()}, rel=1e-4)
    one, two = (tokenlearner.load(tmp_path / f"by-{n}").state_dict() for n in (1, 2))
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


TRAIN_AND_KEEP = """
import os, sys, torch, tokenlearner
from timm.models.vision_transformer import VisionTransformer
from pathlib import Path
from tokenlearner.training.fit import fit
from tokenlearner.training.recipe import OptimizerRecipe, Recipe

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
torch.manual_seed(rank)  # every process begins with weights of its own
model = VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
model = tokenlearner.insert(model, 2, at=1, kind="gate", fuser="fuser")
begin = {k: v.clone() for k, v in model.state_dict().items()}
images = torch.randn(13, 3, 8, 8, generator=torch.Generator().manual_seed(5))
samples = [(image, i % 3, i) for i, image in enumerate(images)]
recipe = Recipe(epochs=2, batch_size=4, workers=0, drop_path=0.3, optimizer=OptimizerRecipe(lr=1e-2, warmup_epochs=0))
fitted = fit(model, samples, samples, recipe, folder, num_classes=3)
torch.save([begin, model.state_dict(), fitted.history], folder / f"rank-{rank}.pt")
"""


@pytest.mark.slow
def test_processes_end_with_the_same_parameters_learned_module_included(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TRAIN_AND_KEEP)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, script, tmp_path], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    (begin, first, history), (other_begin, second, other_history) = (
        torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)
    )
    learned = [key for key in first if "token_learner" in key or "token_fuser" in key]
    assert len(learned) > 6
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(begin["patch_embed.proj.weight"], other_begin["patch_embed.proj.weight"])
    moved = {key for key in learned if not torch.equal(begin[key], first[key])}
    assert moved >= {"blocks.1.token_learner.alpha.conv.weight", "blocks.1.token_fuser.beta.fc2.weight"}
    assert history == other_history


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_as_if_they_had_not_been(photos, tmp_path):
    options = [photos, "--recipe", recipe_file(tmp_path, replace(RECIPE, epochs=2, accumulate=1)), "--output"]
    arguments, environment = command(*options, tmp_path / "unbroken", processes=2)
    subprocess.run(arguments, env=environment, check=True, capture_output=True, timeout=250)
    arguments, _ = command(*options, tmp_path / "run", processes=2)
    process = subprocess.Popen(arguments, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run/checkpoints/last.ckpt").exists():
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)  # torchrun and both processes, in the middle of the first epoch
    process.wait()
    assert not (tmp_path / "run/summary.json").exists()
    subprocess.run([*arguments, "--resume"], env=environment, check=True, capture_output=True, timeout=250)
    assert same_run(tmp_path / "unbroken", tmp_path / "run")
