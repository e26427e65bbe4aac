"""Runs on pictures in memory: what a sample is, what is random about it, and a training that can be stopped."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from coloured_sets import TINY, draw_set
from PIL import Image

from tokenlearner.errors import InputError
from tokenlearner.study import pictures
from tokenlearner.study.pictures import (
    InMemory,
    ViT,
    build,
    decoded,
    from_scratch,
    moments,
    moments_of,
    moved_and_flipped,
    parts_of,
    reopened,
    sets_of,
    trained,
)
from tokenlearner.study.settings import size_of
from tokenlearner.study.study import Job

MEAN, STD = torch.tensor([0.1, 0.2, 0.3])[:, None, None], torch.tensor([0.5, 0.25, 1.0])[:, None, None]
TOKENS = ViT("2 tokens", tokens=2, at=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw_set(folder / "colours", train=32, test=8)
    return folder


def a_job(data, folder, variant=TOKENS, settings=TINY) -> Job:
    return Job(variant, settings, 3, data, folder)


# ---- pictures


def test_without_padding_a_picture_is_its_bytes_normed():
    pixels = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    dataset = InMemory(pixels, torch.arange(5) + 10, MEAN, STD, 0)
    assert len(dataset) == 5
    samples = dataset.__getitems__([4, 1])
    assert [(int(label), place) for _, label, place in samples] == [(14, 4), (11, 1)]
    for x, _, place in samples:
        for c, y, column in itertools.product(range(3), range(4), range(6)):
            expected = (int(pixels[place, c, y, column]) / 255 - float(MEAN[c])) / float(STD[c])
            assert float(x[c, y, column]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(dataset[2][0], dataset.__getitems__([2])[0][0])


def test_pictures_are_moved_and_flipped_as_a_loop_would():
    padding = 1
    x = torch.randn(64, 2, 3, 5)
    found = moved_and_flipped(x, padding)
    ways = []
    for before, after in zip(x, found):
        matching = []
        for down, right, flipped in itertools.product((-1, 0, 1), (-1, 0, 1), (False, True)):
            moved = torch.zeros_like(before)
            for c, y, column in itertools.product(range(2), range(3), range(5)):
                source = 4 - column if flipped else column
                if 0 <= y + down < 3 and 0 <= source + right < 5:
                    moved[c, y, column] = before[c, y + down, source + right]
            if torch.equal(moved, after):
                matching.append((down, right, flipped))
        assert len(matching) == 1  # all pixels of a picture go the same way
        ways += matching
    assert {way[:2] for way in ways} == set(itertools.product((-1, 0, 1), (-1, 0, 1)))
    assert 16 < sum(flipped for *_, flipped in ways) < 48


def test_training_pictures_are_moved_and_those_that_are_scored_are_not(data):
    train_set, test_set, classes = sets_of(data, TINY, 8)
    assert (train_set.padding, test_set.padding, classes) == (1, 0, ("blue", "red"))
    assert sets_of(data, TINY, 32)[0].padding == 4
    torch.testing.assert_close(test_set[0][0], test_set[0][0])
    assert any(not torch.equal(train_set[0][0], train_set[0][0]) for _ in range(4))
    torch.testing.assert_close(test_set.mean, train_set.mean)


def test_moments_are_those_of_every_channel():
    pixels = torch.randint(256, (7, 3, 2, 2), dtype=torch.uint8)
    mean, std = moments(pixels)
    values = pixels.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(mean.flatten(), values.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(std.flatten(), values.std(axis=1, ddof=1), rtol=1e-5)


def test_sets_are_decoded_with_their_classes(data):
    pixels, labels, classes = decoded(data / "colours" / "test", 8, None)
    assert (tuple(pixels.shape), pixels.dtype, classes) == ((16, 3, 8, 8), torch.uint8, ("blue", "red"))
    with Image.open(data / "colours" / "test" / "red" / "03.png") as picture:
        expected = np.asarray(picture)
    np.testing.assert_array_equal(pixels[8 + 3].permute(1, 2, 0), expected)
    assert labels.tolist() == [0] * 8 + [1] * 8
    assert tuple(decoded(data / "colours" / "test", 4, None)[0].shape) == (16, 3, 4, 4)
    mean, _ = moments_of(data, TINY)
    torch.testing.assert_close(mean, moments(decoded(data / "colours" / "train", 8, None)[0])[0])


def test_some_of_the_pictures_are_the_same_each_time(data):
    folder = data / "colours" / "train"
    everything, all_labels, _ = decoded(folder, 8, None)
    some, labels, _ = decoded(folder, 8, 10)
    decoded.cache_clear()
    again, _, _ = decoded(folder, 8, 10)
    assert len(some) == 10
    assert set(labels.tolist()) == {0, 1}
    torch.testing.assert_close(some, again)
    places = [next(i for i, x in enumerate(everything) if torch.equal(x, one)) for one in some]
    assert len(set(places)) == 10
    assert all_labels[places].tolist() == labels.tolist()


def test_a_set_needs_two_parts_of_the_same_classes(tmp_path):
    draw_set(tmp_path / "colours", train=1, test=1)
    (tmp_path / "colours" / "test").rename(tmp_path / "colours" / "val")
    assert parts_of(tmp_path / "colours") == (tmp_path / "colours" / "train", tmp_path / "colours" / "val")
    sets_of(tmp_path, TINY, 8)
    (tmp_path / "colours" / "val" / "red").rename(tmp_path / "colours" / "val" / "rose")
    decoded.cache_clear()
    with pytest.raises(InputError, match="val has other classes than"):
        sets_of(tmp_path, TINY, 8)
    assert parts_of(tmp_path / "flowers") is None
    with pytest.raises(InputError, match="must hold the set as flowers/train and flowers/test"):
        sets_of(tmp_path, replace(TINY, data="flowers"), 8)


# ---- models


@pytest.mark.parametrize(
    ("variant", "tokens"),
    [
        (ViT("plain"), "4 4"),
        (TOKENS, "4 2"),
        (ViT("at half", tokens=2, at=0.5), "4 2"),
        (ViT("more", tokens=2, at=1, extra_layers=2), "4 2 2 2"),
        (ViT("deep", tokens=2, at=1, depth=3), "4 2 2"),
        (ViT("pooled", pooling=((1, 1),)), "4 1"),
        (ViT("other grid", side=12, patch=4), "9 9"),
        (ViT("other patches", patch=2), "16 16"),
    ],
    ids=lambda value: value.label if isinstance(value, ViT) else "",
)
def test_a_variant_is_built_as_it_says(variant, tokens, tmp_path):
    model = build(variant, TINY, 2)
    counted = size_of(model, pictures.input_size(a_job(tmp_path, tmp_path, variant)), TINY)
    assert counted["tokens_per_layer"] == tokens
    assert counted["parameters"] == sum(p.numel() for p in model.parameters())
    position = model.pos_embed[0, 0]  # of the upper left patch: sines of 0 and cosines of 0
    assert sorted(position.round().tolist()) == [0.0] * 4 + [1.0] * 4


# ---- runs


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """Two epochs in one go."""
    job = a_job(data, tmp_path_factory.mktemp("runs") / "whole", settings=replace(TINY, epochs=2))
    return job, *trained(job)


def test_a_run_learns(run, data):
    job, model, fitted = run
    _, test_set, _ = sets_of(data, job.settings, job.settings.side)
    numbers = from_scratch(job)  # reads what is there
    assert numbers["accuracy"] == round(fitted.accuracy, 4) >= 0.9
    assert (numbers["epochs"], numbers["tokens_per_layer"]) == (2, "4 2")
    samples = [test_set[i] for i in range(len(test_set))]
    with torch.no_grad():
        guesses = model(torch.stack([x for x, *_ in samples])).argmax(dim=1)
    right = [int(guess) == int(label) for guess, (_, label, _) in zip(guesses, samples)]
    assert sum(right) / len(right) == pytest.approx(fitted.accuracy)


def test_a_run_that_is_done_can_be_opened_again(run, tmp_path):
    job, model, _ = run
    again = reopened(job)
    assert not again.training
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    with pytest.raises(InputError, match=r"weights.pt is gone, though the run is done: delete .*nothing"):
        reopened(replace(job, folder=tmp_path / "nothing"))


class Killed(Exception):  # noqa: N818 - no error of the code's
    pass


def test_a_run_that_was_killed_goes_on_to_the_same_end(run, data, tmp_path, monkeypatch):
    _, model, fitted = run
    job = a_job(data, tmp_path / "killed", settings=replace(TINY, epochs=2))
    whole, batches = InMemory.__getitems__, []

    def until_killed(self, places):
        batches.append(places)
        if len(batches) == 8 + 2 + 3:  # in the middle of the second epoch: 8 batches to learn from, 2 that are scored
            raise Killed
        return whole(self, places)

    monkeypatch.setattr(InMemory, "__getitems__", until_killed)
    with pytest.raises(Killed):
        trained(job)
    assert not (job.folder / pictures.WEIGHTS).exists()
    again, refitted = trained(job)
    assert len(batches) == 8 + 2 + 3 + 8 + 2
    assert refitted.history == fitted.history
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
