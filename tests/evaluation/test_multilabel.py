"""Mean average precision against scikit-learn's and by hand; the model's scores are the colours of the pictures."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn

from tokenlearner.data.images import LabelledImages, scan_class_folders
from tokenlearner.errors import InputError
from tokenlearner.evaluation.multilabel import average_precision, evaluate_multilabel
from tokenlearner.insertion.saving import Preprocessing

CLASSES = ("walrus", "ant", "zebra")
SIDE = 4


@pytest.fixture
def model() -> nn.Module:
    """Logit j is 40·(c − 0.25) for the level c in [0, 1] of colour channel j: −10 to 30, where sigmoids are all 1."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.preprocessing = Preprocessing((3, SIDE, SIDE), (0.25,) * 3, (1 / 40,) * 3, "nearest", 1.0)
    model.label_names = CLASSES
    return model


def paint(folder: Path, colours: Sequence[Sequence[int]], labels: Sequence[tuple[int, ...]]) -> LabelledImages:
    files = []
    for i, colour in enumerate(colours):
        files.append(folder / f"{i:03}.png")
        Image.fromarray(np.full((SIDE, SIDE, 3), colour, np.uint8)).save(files[-1])
    return LabelledImages(tuple(files), tuple(labels), CLASSES)


def by_scikit_learn(colours: np.ndarray, labels: Sequence[tuple[int, ...]]) -> dict[str, float]:
    positive = np.array([[j in label for j in range(3)] for label in labels])
    return {
        name: average_precision_score(positive[:, j], colours[:, j])
        for j, name in enumerate(CLASSES)
        if positive[:, j].any()
    }


@pytest.fixture
def colours() -> np.ndarray:
    """Forty pictures with ties in every channel, and more of them in the last, half of it in the brightest levels."""
    random = np.random.default_rng(1)
    levels = [np.arange(60, 72), np.arange(0, 255, 15), np.array([0, 64, 250, 251, 252, 253, 254])]
    return np.stack([random.choice(channel, 40) for channel in levels], axis=1)


@pytest.fixture
def labels(colours) -> list[tuple[int, ...]]:
    """Bright channels are likelier positive, so that the order of the scores counts. The first picture has no class."""
    random = np.random.default_rng(2)
    likely = (colours.argsort(axis=0).argsort(axis=0) + 10) / 80
    return [(), *(tuple(np.flatnonzero(random.random(3) < row).tolist()) for row in likely[1:])]


@pytest.fixture
def images(tmp_path, colours, labels) -> LabelledImages:
    return paint(tmp_path, colours, labels)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_scikit_learns(model, images, colours, labels, batch_size):
    result = evaluate_multilabel(model, images, which="these", batch_size=batch_size, workers=0)
    expected = by_scikit_learn(colours, labels)
    assert result.average_precision == pytest.approx(expected, abs=1e-6)
    assert len({round(value, 3) for value in expected.values()} - {1.0}) == 3
    mean = sum(expected.values()) / 3
    assert result.mean_average_precision == pytest.approx(mean, abs=1e-6)
    assert result.to_dict() == {
        "mean_average_precision": pytest.approx(mean, abs=1e-6),
        "average_precision": pytest.approx(expected, abs=1e-6),
        "images": 40,
        "which": "these",
        "damaged": {"count": 0, "files": []},
    }


def test_scores_from_workers_and_in_another_order(model, images):
    result = evaluate_multilabel(model, images, workers=0)
    assert evaluate_multilabel(model, images, workers=1, batch_size=7) == result
    backwards = images.subset(range(39, -1, -1))
    assert evaluate_multilabel(model, backwards, workers=0, batch_size=7) == result


def test_by_hand(model, tmp_path):
    """Walrus: the first and the third. Ant: one of four that tie. Zebra: the two brightest, of equal sigmoids."""
    colours = [(90, 7, 250), (80, 7, 254), (70, 7, 252), (60, 7, 253)]
    images = paint(tmp_path, colours, [(0,), (2,), (0, 1), (2,)])
    result = evaluate_multilabel(model, images, workers=0)
    assert result.average_precision == pytest.approx({"walrus": (1 + 2 / 3) / 2, "ant": 1 / 4, "zebra": 1.0})
    assert result.mean_average_precision == pytest.approx((5 / 6 + 1 / 4 + 1) / 3)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_whose_logits_look_like_probabilities(model, tmp_path, batch_size):
    """Logits 1.3 and 1.0: each alone, torchmetrics keeps the 1.0 and makes the 1.3 a sigmoid, 0.8."""
    images = paint(tmp_path, [(72, 72, 72), (70, 70, 70)], [(0, 1, 2), ()])
    assert evaluate_multilabel(model, images, workers=0, batch_size=batch_size).mean_average_precision == 1.0


def test_a_class_without_positives_is_not_in_the_mean(model, tmp_path):
    images = paint(tmp_path, [(90, 7, 50), (80, 9, 60), (70, 8, 70)], [(0,), (0, 2), ()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate_multilabel(model, images, workers=0, batch_size=2)
    assert result.average_precision == pytest.approx({"walrus": 1.0, "zebra": 1 / 2})
    assert result.mean_average_precision == pytest.approx(3 / 4)
    assert result.images == 3


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_damaged_files_are_left_out_and_named(model, images, colours, labels, batch_size):
    broken = [0, 5, 6, 39]
    for i in broken:
        images.files[i].write_bytes(b"")
    kept = [i for i in range(40) if i not in broken]
    result = evaluate_multilabel(model, images, batch_size=batch_size, workers=0)
    expected = by_scikit_learn(colours[kept], [labels[i] for i in kept])
    assert result.average_precision == pytest.approx(expected, abs=1e-6)
    assert result.images == 36
    assert [(d.path, d.reason) for d in result.damaged] == [(str(images.files[i]), "the file is empty") for i in broken]
    assert result.to_dict()["damaged"]["count"] == 4


def test_raise_stops_at_the_damaged_file(model, images):
    images.files[5].write_bytes(b"")
    with pytest.raises(InputError, match=r"005\.png: the file is empty"):
        evaluate_multilabel(model, images, workers=0, on_error="raise")


def test_a_class_whose_images_are_all_damaged_has_no_score(model, tmp_path):
    images = paint(tmp_path, [(90, 7, 50), (80, 9, 60), (70, 8, 70)], [(0,), (1,), (1,)])
    images.files[0].write_bytes(b"")
    result = evaluate_multilabel(model, images, workers=0)
    assert result.average_precision == pytest.approx({"ant": 1.0})
    images.files[1].write_bytes(b"")
    images.files[2].write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the 3 images could be decoded; the first: .*000\.png: the file is"):
        evaluate_multilabel(model, images, workers=0)


def test_a_training_model_is_scored_in_evaluation_mode(model, images):
    dropping = nn.Sequential(model, nn.Dropout(0.9)).train()
    dropping.preprocessing = model.preprocessing
    assert evaluate_multilabel(dropping, images, workers=0) == evaluate_multilabel(model, images, workers=0)


# ---- what can't be scored


def test_images_of_one_class_each_are_for_another_protocol(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    with pytest.raises(InputError, match="exactly one class here: score with --protocol top1"):
        evaluate_multilabel(model, scan_class_folders(tmp_path), workers=0)


def test_images_without_any_class(model, tmp_path):
    images = paint(tmp_path, [(90, 7, 50), (80, 9, 60)], [(), ()])
    with pytest.raises(InputError, match="none of the 2 images has a class"):
        evaluate_multilabel(model, images, workers=0)


@pytest.mark.parametrize("classes", [CLASSES[:2], (*CLASSES, "bee")])
def test_a_model_of_other_classes(model, tmp_path, classes):
    images = LabelledImages(paint(tmp_path, [(90, 7, 50)], [(0,)]).files, ((0,),), classes)
    with pytest.raises(InputError, match=f"the model has 3 outputs and the images {len(classes)} classes"):
        evaluate_multilabel(model, images, workers=0)


def test_a_model_whose_output_is_not_a_number(model, images):
    class Broken(nn.Module):
        preprocessing = model.preprocessing

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return model(x).log()  # of the channels below 64, which are negative

    with pytest.raises(InputError, match=r"the model's output for .*\d\d\d\.png is not a number"):
        evaluate_multilabel(Broken(), images, workers=0)


def test_a_model_that_does_not_say_how_images_are_prepared(images):
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        evaluate_multilabel(nn.Flatten(), images, workers=0)


@pytest.mark.parametrize(("batch_size", "workers"), [(0, 0), (4, -1)])
def test_sizes_that_make_no_sense(model, images, batch_size, workers):
    with pytest.raises(InputError, match="batch_size must be at least 1 and workers at least 0"):
        evaluate_multilabel(model, images, batch_size=batch_size, workers=workers)


# ---- one class


@pytest.mark.parametrize(
    ("scores", "targets", "expected"),
    [
        ([3.0, 2.0, 1.0], [1, 0, 0], 1.0),
        ([3.0, 2.0, 1.0], [0, 0, 1], 1 / 3),
        ([3.0, 2.0, 2.0, 1.0], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),
        ([1e6, 2e6, 3e6], [0, 0, 1], 1.0),  # sigmoids all 1
        ([-1e6, -2e6, -3e6], [1, 0, 0], 1.0),  # and all 0
        ([float("inf"), float("inf"), 1.0], [0, 1, 0], 1 / 2),
        ([5.0], [1], 1.0),
    ],
)
def test_only_the_order_of_the_scores_counts(scores, targets, expected):
    found = average_precision(torch.tensor(scores), torch.tensor(targets, dtype=torch.bool))
    assert found == pytest.approx(expected)


def test_many_scores():
    """As many as 2**17, so that float32 ranks or counts would have room to go wrong."""
    random = np.random.default_rng(0)
    scores = random.normal(size=2**17).astype(np.float32).round(4)
    targets = random.random(2**17) < 1 / (1 + np.exp(3 - scores))
    found = average_precision(torch.tensor(scores), torch.tensor(targets))
    assert found == pytest.approx(average_precision_score(targets, scores), abs=1e-6)
