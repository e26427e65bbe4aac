"""Ridge regression against scikit-learn's, the drawing of shots, and few-shot scores redone by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import Ridge
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner.data.images import LabelledImages, scan_class_folders
from tokenlearner.errors import InputError
from tokenlearner.evaluation.fewshot import draw_shots, extract, few_shot, ridge
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.saving import Preprocessing

# ---- ridge


def signs(labels: np.ndarray, classes: int) -> np.ndarray:
    return np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)


@pytest.mark.parametrize("l2", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("n", "d"), [(7, 20), (40, 6), (12, 12), (1, 5)])  # unknowns: n, d, d, n
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ridge_is_scikit_learns(n, d, l2, dtype):
    random = np.random.default_rng(n * d)
    features = torch.tensor(random.normal(3.0, 2.0, (n, d)), dtype=dtype)  # off centre: the bias matters
    labels = random.integers(0, 4, n)  # class 4 has none
    weight, bias = ridge(features, torch.tensor(labels), 5, l2)
    X = features.double().numpy()
    sklearn = Ridge(alpha=l2, fit_intercept=True, solver="svd").fit(X, signs(labels, 5))
    assert weight.dtype == bias.dtype == torch.float64
    np.testing.assert_allclose(weight.T, sklearn.coef_, rtol=0, atol=1e-8)
    np.testing.assert_allclose(bias, sklearn.intercept_, rtol=0, atol=1e-8)
    fresh = random.normal(3.0, 2.0, (9, d))
    np.testing.assert_allclose(fresh @ weight.numpy() + bias.numpy(), sklearn.predict(fresh), rtol=0, atol=1e-8)


# ---- shots

LABELS = [2, 0, 1, 1, 0, 2, 2, 0, 1, 2, 0, 2]  # four, three and five


@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_as_many_of_every_class_and_none_twice(shots, seed):
    drawn = draw_shots(LABELS, shots, np.random.default_rng(seed))
    assert [LABELS[i] for i in drawn] == [0] * shots + [1] * shots + [2] * shots
    assert len(set(drawn)) == len(drawn)
    assert all(type(i) is int for i in drawn)


def test_shots_are_the_seeds():
    draws = [draw_shots(LABELS, 2, np.random.default_rng(seed)) for seed in range(20)]
    assert draws == [draw_shots(LABELS, 2, np.random.default_rng(seed)) for seed in range(20)]
    assert {i for drawn in draws for i in drawn} == set(range(12))  # every item has its chance
    assert len(set(map(tuple, draws))) > 10


def test_too_few_for_the_shots():
    assert {2, 3, 8} < set(draw_shots(LABELS, 3, np.random.default_rng(0)))  # all there are of class 1
    with pytest.raises(InputError, match="class 1 has 3 images, fewer than the 4 shots asked for"):
        draw_shots(LABELS, 4, np.random.default_rng(0))


# ---- end to end

COLOURS = {"ash": (150, 90, 90), "birch": (90, 150, 90), "cedar": (90, 90, 150)}
SIDE = 8


def paint(folder: Path, each: int, seed: int) -> LabelledImages:
    """``each`` pictures a class, so noisy that a few shots get some of them wrong."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.array(colour) + random.normal(0, 35, 3) + random.normal(0, 30, (SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return scan_class_folders(folder)


@pytest.fixture
def train(tmp_path) -> LabelledImages:
    return paint(tmp_path / "train", 6, seed=1)


@pytest.fixture
def test(tmp_path) -> LabelledImages:
    return paint(tmp_path / "test", 10, seed=2)


@pytest.fixture
def vit() -> nn.Module:
    """In training mode, where its dropout would change every feature; its own head has nothing to do with the task."""
    model = VisionTransformer(
        img_size=SIDE, patch_size=4, num_classes=7, embed_dim=12, depth=2, num_heads=2, global_pool="avg", drop_rate=0.5
    )
    model.preprocessing = Preprocessing((3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3, "nearest", 1.0)
    return model.train()


def damage(images: LabelledImages, *indices: int) -> list[str]:
    for i in indices:
        images.files[i].write_bytes(b"")
    return [str(images.files[i]) for i in indices]


def by_hand(
    model: nn.Module, train: LabelledImages, test: LabelledImages, shots: int, draw: int, seed: int, l2: float
) -> float:
    """The accuracy of one draw, from the features of single pictures and scikit-learn."""

    def read(images: LabelledImages, indices: list[int]) -> tuple[np.ndarray, np.ndarray]:
        indices = [i for i in indices if images.files[i].stat().st_size]
        features = [extract(model, images.subset([i]), 1, 0)[0][0].double().numpy() for i in indices]
        return np.stack(features), np.array([images.labels[i] for i in indices])

    X, y = read(train, draw_shots(train.labels, shots, np.random.default_rng((seed, draw))))
    sklearn = Ridge(alpha=l2, fit_intercept=True, solver="svd").fit(X, signs(y, len(train.classes)))
    X, y = read(test, list(range(len(test))))
    return float((sklearn.predict(X).argmax(axis=1) == y).mean())


def test_features_are_what_the_head_sees(vit, train):
    vit = insert(vit, 2, at=1).train()
    vit.preprocessing = Preprocessing((3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3, "nearest", 1.0)
    broken = damage(train, 0, 7)
    features, labels, indices, damaged = extract(vit, train, 5, 0)
    kept = [i for i in range(18) if i not in (0, 7)]
    assert indices.tolist() == kept
    assert labels.tolist() == [train.labels[i] for i in kept]
    assert [entry.path for entry in damaged] == broken

    seen = []
    vit.eval().head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    vit(torch.stack([vit.preprocessing.transform()(Image.open(train.files[i])) for i in kept]))
    assert torch.allclose(features, seen[0], atol=1e-5)
    assert features.std(dim=0).min() > 1e-3  # pictures differ, or any features would do
    assert not features.requires_grad


@pytest.mark.parametrize(("shots", "l2", "seed"), [(1, 1.0, 0), (3, 1.0, 0), (3, 0.1, 5), (6, 10.0, 0)])
def test_scores_are_those_by_hand(vit, train, test, shots, l2, seed):
    result = few_shot(vit, train, test, shots=shots, draws=3, l2=l2, seed=seed, batch_size=4, workers=0)
    expected = [by_hand(vit, train, test, shots, draw, seed, l2) for draw in range(3)]
    assert result.top1 == pytest.approx(expected, abs=1e-9)
    assert all(1 / 3 < top1 < 1 for top1 in expected)
    assert len(set(expected)) > 1 or shots == 6  # six are all there are
    assert result.to_dict() == {
        "top1": pytest.approx(sum(expected) / 3),
        "top1_of_draws": pytest.approx(expected),
        "shots": shots,
        "l2": l2,
        "images": 30,
        "damaged": {"count": 0, "files": []},
    }


def test_scores_from_workers(vit, train, test):
    options = {"shots": 2, "draws": 2, "seed": 3}
    assert few_shot(vit, train, test, workers=1, **options) == few_shot(vit, train, test, workers=0, **options)


def test_damaged_files_are_left_out_and_named(vit, train, test):
    drawn = [draw_shots(train.labels, 3, np.random.default_rng((0, draw))) for draw in range(2)]
    never = sorted(set(range(18)) - {*drawn[0], *drawn[1]})[0]
    once = min(set(drawn[0]) - set(drawn[1]))
    twice = max(set(drawn[0]) & set(drawn[1]))
    damage(train, never)
    broken = damage(train, *sorted((once, twice)))
    broken += damage(test, 3, 29)
    result = few_shot(vit, train, test, shots=3, draws=2, workers=0)
    assert result.top1 == pytest.approx([by_hand(vit, train, test, 3, draw, 0, 1.0) for draw in range(2)], abs=1e-9)
    assert result.images == 28
    assert [(entry.path, entry.reason) for entry in result.damaged] == [(path, "the file is empty") for path in broken]
    assert result.to_dict()["damaged"]["count"] == 4


def test_a_class_without_a_readable_shot_is_never_guessed(vit, train, test):
    damage(train, *range(6, 12))  # every birch
    result = few_shot(vit, train, test, shots=2, draws=2, workers=0)
    assert result.top1 == pytest.approx([by_hand(vit, train, test, 2, draw, 0, 1.0) for draw in range(2)], abs=1e-9)
    assert 0 < max(result.top1) <= 2 / 3
    birches = test.subset(range(10, 20))
    assert few_shot(vit, train, birches, shots=2, draws=2, workers=0).top1 == (0.0, 0.0)


def test_a_draw_without_a_readable_shot(vit, train, test):
    drawn = [draw_shots(train.labels, 1, np.random.default_rng((0, draw))) for draw in range(2)]
    damage(train, *drawn[0])
    assert set(drawn[1]) - set(drawn[0])  # or there would be nothing at all to read
    with pytest.raises(InputError, match="none of the 3 images of a draw could be decoded"):
        few_shot(vit, train, test, shots=1, draws=2, workers=0)


@pytest.mark.parametrize("which", ["train", "test"])
def test_nothing_readable(vit, train, test, which):
    broken = {"train": train, "test": test}[which]
    damage(broken, *range(len(broken)))
    count = {"train": 9, "test": 30}[which]
    with pytest.raises(InputError, match=f"none of the {count} images could be decoded"):
        few_shot(vit, train, test, shots=3, draws=1, workers=0)


def test_different_classes_are_refused(vit, train, test):
    renamed = LabelledImages(test.files, test.labels, ("ash", "birch", "elm"))
    reordered = LabelledImages(test.files, test.labels, ("birch", "ash", "cedar"))
    for other in (renamed, reordered):
        with pytest.raises(InputError, match="the two sets have different classes"):
            few_shot(vit, train, other, shots=1, draws=1, workers=0)


def test_a_class_with_nothing_to_train_on_is_refused(vit, train, test):
    firs = LabelledImages(train.files, train.labels, (*train.classes, "fir", "gum"))
    with pytest.raises(InputError, match="2 classes have no image to train on, the first: fir"):
        few_shot(vit, firs, LabelledImages(test.files, test.labels, firs.classes), shots=1, workers=0)
    # Scoring needs no picture of every class.
    ashes = test.subset(range(10))
    top1 = few_shot(vit, train, ashes, shots=3, draws=1, workers=0).top1
    assert top1 == pytest.approx([by_hand(vit, train, ashes, 3, 0, 0, 1.0)])


def test_more_shots_than_pictures(vit, train, test):
    with pytest.raises(InputError, match="class 0 has 6 images, fewer than the 7 shots"):
        few_shot(vit, train, test, shots=7, workers=0)


@pytest.mark.parametrize("options", [{"shots": 0}, {"draws": 0}, {"l2": 0.0}, {"l2": -1.0}])
def test_settings_that_make_no_sense(vit, train, test, options):
    with pytest.raises(InputError, match="shots and draws must be at least 1 and l2 above 0"):
        few_shot(vit, train, test, workers=0, **options)
