"""ReaL accuracy of a model whose answers are known, and which label list belongs to which file."""

import json
from pathlib import Path

import pytest
import torch
from by_colour import by_colour, draw
from torch import nn

from tokenlearner.errors import InputError
from tokenlearner.evaluation.real import evaluate_real, read_real_labels, real_index

REAL = Path(__file__).parents[3] / "shared" / "data" / "imagenet" / "real_labels_val50k.json"
MODEL_CLASSES = "abcdef"

# Number in the file's name → the class its picture looks like, and ReaL's list for that number, of seven.
SHOWN = {1: 4, 2: 0, 3: 5, 5: 3, 6: 2, 7: 1}
LABELS = [[2, 4], [0], [1, 2, 3], [0], [], [2, 0], [5]]
RIGHT, SCORED = 3, 5  # 1, 2 and 6; 3 and 7 are wrong; 5 has no label


def name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Not in the order of their numbers, and without the fourth."""
    return [draw(tmp_path / name(number), SHOWN[number]) for number in (7, 3, 1, 5, 2, 6)]


# ---- the place of a file


@pytest.mark.parametrize("suffix", [".JPEG", ".jpeg", ".jpg", ".JPG", ".png"])
@pytest.mark.parametrize(("number", "index"), [(1, 0), (10, 9), (50_000, 49_999)])
def test_the_number_in_the_name_is_the_place(suffix, number, index):
    stem = f"ILSVRC2012_val_{number:08d}"
    assert real_index(f"/data/ILSVRC2012_val_00000777/{stem}{suffix}") == index
    assert real_index(Path("val", "n01440764", stem + suffix)) == index


@pytest.mark.parametrize(
    "wrong",
    [
        "ILSVRC2012_val_00000000.JPEG",
        "ILSVRC2012_val_0000001.JPEG",
        "ILSVRC2012_val_000000001.JPEG",
        "ILSVRC2012_val_0000000a.JPEG",
        "ILSVRC2012_test_00000001.JPEG",
        "my_ILSVRC2012_val_00000001.JPEG",
        "n01440764_10026.JPEG",
        "ILSVRC2012_val_00000001.JPEG/cat.JPEG",
    ],
)
def test_a_name_that_is_not_the_validation_sets(wrong):
    with pytest.raises(InputError, match=f"{wrong} has no place in ReaL's list"):
        real_index(wrong)


# ---- the list


def test_the_list_is_read_as_it_is(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps(LABELS))
    assert read_real_labels(tmp_path / "real.json") == LABELS
    assert read_real_labels(str(tmp_path / "real.json")) == LABELS


@pytest.mark.parametrize("content", ["", "[[1], [2]", b"\xff\xfe\xff"])
def test_what_is_no_json(tmp_path, content):
    path = tmp_path / "real.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"real\.json is not readable as ReaL labels"):
        read_real_labels(path)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json is not readable as ReaL labels: .*No such file"):
        read_real_labels(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "content", [{"1": [2]}, [1, 2], [[1], None], [[1], ["2"]], [[1.0]], [[True]], [[3], [-1]], [[[1]]], 7]
)
def test_json_that_is_no_list_of_lists_of_indices(tmp_path, content):
    (tmp_path / "real.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not a list of lists of class indices"):
        read_real_labels(tmp_path / "real.json")


@pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not there")
def test_the_official_list():
    labels = read_real_labels(REAL)
    assert len(labels) == 50_000
    assert labels[:3] == [[], [970, 795], [230, 231]]
    assert sum(map(bool, labels)) == 46_837  # as Beyer et al. count them
    assert {label for entry in labels for label in entry} <= set(range(1000))


# ---- scores


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_right_is_any_of_the_labels(files, batch_size):
    result = evaluate_real(by_colour(MODEL_CLASSES), files, LABELS, batch_size=batch_size)
    assert result.to_dict() == {
        "top1": pytest.approx(RIGHT / SCORED),
        "images": SCORED,
        "unlabelled": 1,
        "damaged": {"count": 0, "files": []},
    }


@pytest.mark.parametrize(("label_list", "top1"), [([2, 4], 1.0), ([4], 1.0), ([4, 1], 1.0), ([2], 0.0), ([5, 3], 0.0)])
def test_one_picture(tmp_path, label_list, top1):
    file = draw(tmp_path / name(2), 4)
    result = evaluate_real(by_colour(MODEL_CLASSES), [file], [[], label_list])
    assert (result.top1, result.images, result.unlabelled) == (top1, 1, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_damaged_files_are_left_out_and_named(files, batch_size):
    files[0].write_text("damaged")  # 7, which is wrong
    files[3].write_bytes(b"")  # 5, which has no label and need not be read
    files[4].write_bytes(b"")  # 2, which is right
    result = evaluate_real(by_colour(MODEL_CLASSES), files, LABELS, batch_size=batch_size)
    assert (result.top1, result.images, result.unlabelled) == (pytest.approx(2 / 3), 3, 1)
    assert [damaged.path for damaged in result.damaged] == [str(files[0]), str(files[4])]
    assert result.damaged[0].reason.startswith("not an image")
    assert result.to_dict()["damaged"]["files"][1] == {"file": str(files[4]), "reason": "the file is empty"}


def test_raise_stops_at_the_damaged_file(files):
    files[4].write_bytes(b"")
    with pytest.raises(InputError, match=r"val_00000002\.JPEG: the file is empty"):
        evaluate_real(by_colour(MODEL_CLASSES), files, LABELS, on_error="raise")


def test_a_training_model_is_scored_in_evaluation_mode(files):
    model = nn.Sequential(nn.Dropout(1.0), by_colour(MODEL_CLASSES)).train()  # all black: class 0, right for 2 and 6
    model.preprocessing = model[1].preprocessing
    assert evaluate_real(model, files, LABELS).top1 == pytest.approx(RIGHT / SCORED)


def test_a_number_past_the_end_of_the_list(files):
    assert evaluate_real(by_colour(MODEL_CLASSES), files, LABELS[:7]).images == SCORED
    with pytest.raises(InputError, match=r"val_00000007\.JPEG is past the end of the 6 ReaL labels"):
        evaluate_real(by_colour(MODEL_CLASSES), files, LABELS[:6])


def test_a_file_of_another_set_is_refused(files, tmp_path):
    with pytest.raises(InputError, match=r"cat\.png has no place in ReaL's list"):
        evaluate_real(by_colour(MODEL_CLASSES), [*files, draw(tmp_path / "cat.png", 0)], LABELS)


def test_nothing_to_score(files):
    model = by_colour(MODEL_CLASSES)
    with pytest.raises(InputError, match="none of the 6 files could be scored: 0 damaged, the rest unlabelled"):
        evaluate_real(model, files, [[]] * 7)
    files[0].write_bytes(b"")
    with pytest.raises(InputError, match="none of the 6 files could be scored: 1 damaged, the rest unlabelled"):
        evaluate_real(model, files, [[]] * 6 + [[5]])
    with pytest.raises(InputError, match="none of the 0 files"):
        evaluate_real(model, [], LABELS)


def test_a_model_that_does_not_say_how_images_are_prepared(files):
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        evaluate_real(nn.Flatten(), files, LABELS)


def test_no_gradients_are_kept(files):
    model, seen = by_colour(MODEL_CLASSES), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    with torch.enable_grad():
        evaluate_real(model, files, LABELS)
    assert seen == [False]
