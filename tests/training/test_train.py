"""Training on files: what is refused before anything is lost, how a run is gone on with, and every kind of data."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from noisy_photos import draw_photos

import tokenlearner
from tokenlearner.data.sharding import write_shards
from tokenlearner.errors import InputError
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.training import train as training
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.train import train

RECIPE = Recipe(
    model="test_vit",
    image_size=32,
    tokens=2,
    epochs=2,
    batch_size=8,
    workers=0,
    ema=0.5,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=0),
    augment=AugmentRecipe(auto_augment=None, color_jitter=0.0),
)


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch) -> None:
    """Most of such a run would be the second in which its speed is taken."""
    monkeypatch.setattr(training, "measure_speed", partial(measure_speed, seconds_per_round=0.001))


# The runs below were made in another folder; test_a_run_may_be_moved has that.
MOVED = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """20 pictures of two classes."""
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 10)


@pytest.fixture(scope="module")
def finished_once(photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "measure_speed", partial(measure_speed, seconds_per_round=0.001))
        train(photos, RECIPE, output)
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def epochs(output: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, one an epoch in runs as short as these."""
    with (output / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def copied(run: Path, output: Path) -> Path:
    for name, content in files(run).items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)
    return output


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    return copied(finished_once, tmp_path / "finished")


@pytest.fixture
def unfinished(finished) -> Path:
    """As a kill between the last checkpoint and the summary leaves it."""
    (finished / "summary.json").unlink()
    (finished / "report.html").unlink()
    return finished


@pytest.fixture
def others(photos, tmp_path) -> Path:
    """The same data with one picture of another name."""
    output = copied(photos, tmp_path / "others")
    (output / "red" / "00.png").rename(output / "red" / "zz.png")
    return output


def refused(output: Path, words: str, *arguments: object, **options: object) -> None:
    """An ``InputError`` with these words (a pattern), and not a byte of ``output`` changed."""
    before = files(output)
    with pytest.raises(InputError, match=words):
        train(*arguments, output, **options)
    after = files(output)
    assert sorted(after) == sorted(before)
    assert [name for name in before if before[name] != after[name]] == []


# ---- what is refused


def test_an_unfinished_run_is_not_written_over(photos, unfinished):
    refused(unfinished, "holds a run that has not ended: go on with it with --resume, or give", photos, RECIPE)


def test_a_finished_run_is_written_over(photos, finished):
    """Nothing of the old one may stay, its checkpoint least of all."""
    train(photos, replace(RECIPE, epochs=1), finished)
    assert json.loads((finished / "recipe.json").read_text())["epochs"] == 1
    assert len(epochs(finished)) == 1
    train(photos, Recipe(), finished, resume=True)
    assert len(epochs(finished)) == 1


def test_a_run_is_not_gone_on_with_on_other_data(unfinished, others):
    refused(unfinished, "was on other data than it is given now", others, RECIPE, resume=True)


def test_a_finished_run_resumed_with_other_data_keeps_its_summary_and_its_held_out_files(finished, others):
    """`evaluate` would score images the model was trained on, were they written down as held out."""
    refused(finished, "was on other data than it is given now", others, RECIPE, resume=True)


@pytest.mark.parametrize(
    "change", [{"epochs": 3}, {"at": 1}, {"optimizer": replace(RECIPE.optimizer, lr=1e-2)}], ids=str
)
def test_a_run_is_not_gone_on_with_by_another_recipe(photos, unfinished, change):
    name = "optimizer.lr is 0.001 there and 0.01 here" if "optimizer" in change else r"(epochs|at) is .* there and"
    words = rf"--resume goes on with the recipe in .*recipe\.json: {name}"
    refused(unfinished, words, photos, replace(RECIPE, **change), resume=True)


@pytest.mark.parametrize("run", ["unfinished", "finished"])
@pytest.mark.parametrize("damage", [b"", b"no checkpoint", "half"])
def test_a_damaged_checkpoint_is_named(photos, request, run, damage):
    output = request.getfixturevalue(run)
    path = output / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "half" else damage)
    words = r"last\.ckpt is no checkpoint of a training run .*delete it to start from the beginning"
    refused(output, words, photos, RECIPE, resume=True)


def test_a_checkpoint_of_something_else_is_named(photos, unfinished):
    torch.save({"state_dict": {}}, unfinished / "checkpoints" / "last.ckpt")
    refused(unfinished, r"last\.ckpt is no checkpoint of a training run", photos, RECIPE, resume=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"epoch": 3}', '{"optimizer": null}', '{"augment": 3}'])
def test_a_damaged_recipe_is_named(photos, unfinished, content):
    (unfinished / "recipe.json").write_text(content)
    refused(unfinished, r"recipe\.json is not a recipe of this version", photos, RECIPE, resume=True)


def test_there_must_be_a_folder_to_resume_in(photos, tmp_path):
    with pytest.raises(InputError, match=r"there is no run to resume in .*gone: the folder does not exist"):
        train(photos, RECIPE, tmp_path / "gone", resume=True)
    assert not (tmp_path / "gone").exists()


def test_labels_the_loss_is_not_for_leave_the_run_before_as_it_is(photos, finished):
    table = listed(photos, finished.parent / "several.csv", lambda name: f"{name};dark")
    refused(finished, "use --loss sigmoid", table, RECIPE)


def test_a_logger_that_is_not_installed_leaves_the_run_before_as_it_is(photos, finished, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(finished, "pip install wandb", photos, replace(RECIPE, wandb=True))


# ---- what --resume does where there is little or nothing left to do


@MOVED
def test_a_finished_run_gone_on_with_gets_the_same_summary_again(photos, finished):
    before, summary = files(finished), json.loads((finished / "summary.json").read_text())
    again = train(photos, Recipe(), finished, resume=True)
    assert again == json.loads((finished / "summary.json").read_text())
    timing = {"seconds", "images_per_second", "images_per_second_spread", "train_seconds", "speedup"}
    for one, other in zip(again["models"], summary["models"], strict=True):
        assert {k: v for k, v in one.items() if k not in timing} == {k: v for k, v in other.items() if k not in timing}
    after = files(finished)
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"summary.json", "report.html", "checkpoints/last.ckpt"}


@MOVED
def test_the_summary_a_kill_left_out_is_written(photos, unfinished, finished_once):
    train(photos, RECIPE, unfinished, resume=True)
    one, other = (json.loads((run / "summary.json").read_text()) for run in (unfinished, finished_once))
    assert one["models"][0]["accuracy"] == other["models"][0]["accuracy"]
    assert epochs(unfinished) == epochs(finished_once)
    assert (unfinished / "report.html").is_file()


@pytest.mark.parametrize(
    "kept", [{"recipe.json"}, {"recipe.json", "held_out.json"}, set()], ids=["recipe", "recipe and held out", "nothing"]
)
def test_a_run_stopped_before_its_first_checkpoint_begins_anew(photos, finished, finished_once, kept):
    for name in files(finished).keys() - kept:
        (finished / name).unlink()
    summary = train(photos, Recipe() if kept else RECIPE, finished, resume=True)
    assert epochs(finished) == epochs(finished_once)
    assert summary["models"][0]["accuracy"] == float(epochs(finished)[-1]["val_accuracy"])
    weights, expected = (tokenlearner.load(run).state_dict() for run in (finished, finished_once))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@MOVED
def test_workers_may_differ_when_a_run_goes_on(photos, unfinished):
    train(photos, replace(RECIPE, workers=1), unfinished, resume=True)
    recipe = json.loads((unfinished / "recipe.json").read_text())
    assert (recipe["workers"], recipe["epochs"]) == (1, 2)


@MOVED
def test_checkpoints_may_be_more_or_less_frequent_when_a_run_goes_on(photos, unfinished):
    """Without Lightning's warning that it misses the callback it knows by the old number."""
    train(photos, replace(RECIPE, checkpoint_steps=7), unfinished, resume=True)
    assert json.loads((unfinished / "recipe.json").read_text())["checkpoint_steps"] == 7


def test_a_run_may_be_moved(photos, unfinished, finished_once):
    """To another disk, say; without Lightning's warning about it, and without a touch to what is at the old place."""
    before = files(finished_once)
    train(photos, RECIPE, unfinished, resume=True)
    assert epochs(unfinished) == epochs(finished_once)
    assert files(finished_once) == before


# ---- the head under the sigmoid loss


@pytest.mark.parametrize(("loss", "bias"), [("sigmoid", -10.0), ("cross_entropy", 0.0)])
def test_a_new_head_of_the_sigmoid_loss_starts_with_every_class_unlikely(photos, tmp_path, loss, bias):
    still = OptimizerRecipe(lr=0.0, min_lr=0.0)
    train(photos, replace(RECIPE, loss=loss, epochs=1, optimizer=still), tmp_path)
    assert tokenlearner.load(tmp_path).head.bias.tolist() == pytest.approx([bias] * 2)


# ---- kinds of data


def listed(photos: Path, path: Path, label: Callable[[str], str] = str) -> Path:
    """A CSV of all pictures, with the label ``label`` makes of a folder's name."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label"])
        writer.writerows([picture, label(picture.parent.name)] for picture in sorted(photos.rglob("*.png")))
    return path


LEARNING = replace(RECIPE, epochs=6, ema=None, optimizer=OptimizerRecipe(lr=3e-3, warmup_epochs=1))


@pytest.mark.parametrize("kind", ["csv", "shards"])
def test_lists_and_shards_give_a_trained_model(photos, tmp_path, kind):
    data = tmp_path / "list.csv" if kind == "csv" else tmp_path / "shards"
    if kind == "csv":
        listed(photos, data)
    else:
        write_shards(photos, data, per_shard=7)
    summary = train(data, LEARNING, tmp_path / "run")
    assert (summary["train_images"], summary["held_out"], summary["classes"]) == (16, 4, 2)
    assert summary["damaged"]["count"] == 0
    assert summary["models"][0]["accuracy"] == 1.0
    assert tuple(tokenlearner.load(tmp_path / "run").label_names) == ("blue", "red")


def test_several_labels_end_to_end(photos, tmp_path, capsys):
    """Red is also warm, blue is nothing but itself."""
    table = listed(photos, tmp_path / "several.csv", lambda name: "red;warm" if name == "red" else name)
    summary = train(table, replace(LEARNING, loss="sigmoid"), tmp_path / "run")
    (model,) = summary["models"]
    assert model["metric"] == "mean average precision"
    assert model["accuracy"] == pytest.approx(1.0)
    before = epochs(tmp_path / "run")
    assert float(before[-1]["val_map"]) == pytest.approx(model["accuracy"])
    assert summary["classes"] == 3
    assert "ean average precision" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "map 100.0%" in capsys.readouterr().err
    again = train(table, Recipe(), tmp_path / "run", resume=True)
    assert again["models"][0]["accuracy"] == model["accuracy"]
    assert epochs(tmp_path / "run") == before
