"""Scores of a model whose answers are known, and which images are scored."""

import json
from pathlib import Path

import pytest
import torch
from by_colour import by_colour, draw
from torch import nn

from tokenlearner.data.images import scan_class_folders
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import evaluate, images_to_score

NAMES = ("walrus", "ant", "zebra", "bee", "newt", "cat", "dog")  # not in the order of their folders
# Folder → what its pictures look like, by position in NAMES. Of walrus' pictures three are seen as walrus, and a dog's
# brightness is too far off for walrus to be among the five nearest; zebra is the fifth.
SHOWN = {"walrus": (0, 0, 6, 0), "ant": (1, 2, 1), "zebra": (2, 6)}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, positions in SHOWN.items():
        for i, position in enumerate(positions):
            draw(tmp_path / name / f"{i}.png", position)
    (tmp_path / "ant" / "1b.png").write_text("damaged")
    (tmp_path / "zebra" / "9.jpg").touch()
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores(folder, batch_size):
    result = evaluate(by_colour(NAMES), scan_class_folders(folder, NAMES), batch_size=batch_size, workers=0)
    assert result.images == 9
    assert result.top1 == pytest.approx(6 / 9)
    assert result.top5 == pytest.approx(8 / 9)
    assert result.per_class == pytest.approx({"walrus": 3 / 4, "ant": 2 / 3, "zebra": 1 / 2})  # only those there are
    assert result.to_dict()["mean_per_class"] == pytest.approx((3 / 4 + 2 / 3 + 1 / 2) / 3)
    assert [(Path(d.path).name, d.reason[:12]) for d in result.damaged] == [
        ("1b.png", "not an image"),
        ("9.jpg", "the file is "),
    ]
    assert result.to_dict()["damaged"]["count"] == 2


def test_scores_from_workers(folder):
    result = evaluate(by_colour(NAMES), scan_class_folders(folder, NAMES), workers=1, batch_size=3)
    assert (result.images, result.top1, len(result.damaged)) == (9, pytest.approx(6 / 9), 2)


def test_up_to_five_classes_have_no_top_5(tmp_path):
    for position, name in enumerate("abcde"):
        draw(tmp_path / name / "1.png", position)
    result = evaluate(by_colour("abcde"), scan_class_folders(tmp_path), workers=0, which="these")
    assert (result.top1, result.top5, result.which) == (1.0, None, "these")
    draw(tmp_path / "f" / "1.png", 0)  # the farthest of six from f
    result = evaluate(by_colour("abcdef"), scan_class_folders(tmp_path), workers=0)
    assert (result.top1, result.top5) == (pytest.approx(5 / 6), pytest.approx(5 / 6))


def test_a_training_model_is_scored_in_evaluation_mode(folder):
    model = nn.Sequential(nn.Dropout(0.9), by_colour(NAMES)).train()
    model.preprocessing = model[1].preprocessing
    assert evaluate(model, scan_class_folders(folder, NAMES), workers=0).top1 == pytest.approx(6 / 9)


def test_raise_stops_at_the_damaged_file(folder):
    with pytest.raises(InputError, match=r"ant/1b\.png: not an image"):
        evaluate(by_colour(NAMES), scan_class_folders(folder, NAMES), workers=0, on_error="raise")


def test_nothing_readable_is_no_score(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    reason = r"none of the 2 images could be decoded; the first: .*a/1\.png: the file is empty"
    with pytest.raises(InputError, match=reason):
        evaluate(by_colour("ab"), scan_class_folders(tmp_path), workers=0)


def test_a_model_that_does_not_say_how_images_are_prepared(folder):
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        evaluate(nn.Flatten(), scan_class_folders(folder, NAMES), workers=0)


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (4, -1)])
def test_sizes_that_make_no_sense(folder, batch_size, workers):
    with pytest.raises(InputError, match="batch_size must be at least 1 and workers at least 0"):
        evaluate(by_colour(NAMES), scan_class_folders(folder, NAMES), batch_size=batch_size, workers=workers)


# ---- which images


def note(model_folder: Path, *names: str) -> None:
    model_folder.mkdir(exist_ok=True)
    (model_folder / "held_out.json").write_text(json.dumps({"folder": "data", "files": names}))


def chosen(data: Path, *arguments: object) -> tuple[list[str], str]:
    images, which = images_to_score(by_colour(NAMES), data.parent / "model", data, *arguments)
    assert images.classes == NAMES
    assert all(NAMES[label] in file.parts for file, label in zip(images.files, images.labels))
    return [file.relative_to(data).as_posix() for file in images.files], which


@pytest.fixture
def data(tmp_path) -> Path:
    for name in ("walrus/1.png", "walrus/deep/2.png", "ant/1.png"):
        draw(tmp_path / "data" / name, 0)
    return tmp_path / "data"


EVERYTHING = ["ant/1.png", "walrus/1.png", "walrus/deep/2.png"]


def test_all_where_nothing_is_noted(data):
    assert chosen(data) == (EVERYTHING, "all images")
    with pytest.raises(InputError, match=r"held_out\.json names no file of .*data; score everything with --images all"):
        chosen(data, "held-out")


def test_what_was_held_out(data):
    note(data.parent / "model", "walrus/deep/2.png", "walrus/gone.png")
    held_out = (["walrus/deep/2.png"], "the 1 images held out in training (of 3)")
    assert chosen(data) == chosen(data, "held-out") == held_out
    assert chosen(data, "all") == (EVERYTHING, "all images")


def test_a_note_about_other_files_is_none(data):
    note(data.parent / "model", "dog/1.png")
    assert chosen(data) == (EVERYTHING, "all images")
    with pytest.raises(InputError, match="names no file of"):
        chosen(data, "held-out")


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_a_val_folder_comes_first(data, name):
    note(data.parent / "model", "ant/1.png")
    data.rename(data.parent / "train")
    draw(data / name / "zebra" / "1.png", 0)
    (data.parent / "train").rename(data / "train")
    assert chosen(data) == ([f"{name}/zebra/1.png"], f"the images in {name}/")


def test_folders_the_model_does_not_know(data):
    draw(data / "crow" / "1.png", 0)
    with pytest.raises(InputError, match=r"crow is not one of the 7 known classes: walrus, ant"):
        chosen(data)


def test_a_model_without_labels(data):
    with pytest.raises(InputError, match="names no labels"):
        images_to_score(torch.nn.Identity(), data.parent / "model", data)
