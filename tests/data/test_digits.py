"""The embedded digits: split fairly, and jittered by no more than is said."""

import pytest
import torch

from tokenlearner.data import digits


@pytest.fixture(scope="module")
def data():
    return digits.load(held_out=0.25)


def test_the_split_is_stratified_and_leaves_nothing_out(data):
    assert (len(data.train), len(data.test), len(data.test_pictures)) == (1347, 450, 450)
    for labels, total in ((data.train.labels, 1347), (data.test.labels, 450)):
        shares = labels.bincount() / total
        assert (shares - 0.1).abs().max() < 0.005  # sklearn's set has 174 to 183 of each
    digests = [{image.numpy().tobytes() for image in part.images} for part in (data.train, data.test)]
    assert not digests[0] & digests[1]


def test_images_are_what_a_saved_model_makes_of_the_pictures(data):
    for i in (0, 100, 449):
        x = digits.PREPROCESSING.transform()(data.test_pictures[i])
        assert torch.equal(x, data.test.images[i])
    assert data.train.images.mean().abs() < 0.01
    assert (data.train.images.std() - 1).abs() < 0.02


def test_a_jitter_of_nothing_changes_nothing(data, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size: torch.full(size, 0.5))
    images = data.train.images[:8]
    assert torch.allclose(digits.jitter(images), images, atol=1e-5)


def test_a_jitter_to_the_limit_shifts_by_six_percent(monkeypatch):
    draws = torch.tensor([0.5, 0.5, 1.0, 0.5]).reshape(4, 1)  # no turn, no scale, x at its limit, no y
    monkeypatch.setattr(torch, "rand", lambda *size: draws.expand(size))
    image = torch.full((1, 1, 12, 12), digits.BLACK)
    image[..., 6] += 1  # one bright column
    centre = (digits.jitter(image) - digits.BLACK).sum(dim=(0, 1, 2)) @ torch.arange(12.0) / 12
    assert centre == pytest.approx(6 - 0.06 * 12, abs=1e-4)  # the picture is read from further right, so moves left


def test_training_images_differ_each_time_and_test_images_do_not(data):
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.test[0][0], data.test[0][0])
    image, label, index = data.test.__getitems__([3, 5])[1]
    assert (label, index) == (int(data.test.labels[5]), 5)
    assert torch.equal(image, data.test.images[5])


def test_a_turned_digit_is_black_around_it(data):
    turned = digits.jitter(data.train.images[:64])
    assert turned.min() >= digits.BLACK - 1e-4
    assert turned.max() <= data.train.images[:64].max() + 1e-4
