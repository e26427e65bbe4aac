"""The embedded clips: what tells the classes apart is the order of the frames, and nothing but it."""

import pytest
import torch

from tokenlearner.data import moving_digits
from tokenlearner.data.moving_digits import CLASSES, FRAMES, ORDERS, SIDE, draw


@pytest.fixture(scope="module")
def data():
    return moving_digits.load(clips=64)


def test_every_order_visits_every_place_once_and_no_two_are_rotations_of_one_another():
    cycles = set()
    for order in ORDERS.values():
        assert sorted(order) == list(range(FRAMES))
        cycles.add(tuple(order[(order.index(0) + i) % FRAMES] for i in range(FRAMES)))
    assert len(cycles) == len(CLASSES) == 8


def test_the_frames_of_a_clip_are_the_same_under_every_label(data):
    digit = data.test.digits[:1].expand(8, 8, 8)
    clips = draw(digit, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    frames = [sorted(frame.numpy().tobytes() for frame in clip[0]) for clip in clips]
    assert all(one == frames[0] for one in frames)
    assert len({clip.numpy().tobytes() for clip in clips}) == 8


def test_every_place_is_as_likely_in_every_frame_under_every_label(data):
    digit = data.test.digits[:1].expand(8, 8, 8)
    for label in range(8):
        clips = draw(digit, torch.full((8,), label), torch.arange(8))
        for t in range(FRAMES):
            assert len({clip[0, t].numpy().tobytes() for clip in clips}) == 8


def test_the_digit_is_whole_and_moves_clockwise_as_said(data):
    clip = draw(data.test.digits[:1], torch.tensor([CLASSES.index("clockwise")]), torch.tensor([0]))[0, 0]
    assert clip.shape == (FRAMES, SIDE, SIDE)
    for frame in clip:
        assert frame.sum() == pytest.approx(float(data.test.digits[0].sum()))
    top, right = clip[0].nonzero()[:, 0].float().mean(), clip[2].nonzero()[:, 1].float().mean()
    assert top < SIDE / 2 < right  # twelve o'clock first, three o'clock two frames later


def test_training_clips_are_new_each_time_and_held_out_ones_are_not(data):
    torch.manual_seed(0)
    first, again = data.train[3], data.train[3]
    assert first[1:] == again[1:] == (3, 3)
    assert not torch.equal(first[0], again[0])
    assert torch.equal(data.test[3][0], data.test[3][0])
    assert (len(data.train), len(data.test)) == (64, 450)
    assert set(data.test.labels.bincount().tolist()) == {56, 57}


def test_no_digit_is_in_both_parts(data):
    parts = [{digit.numpy().tobytes() for digit in part.digits} for part in (data.train, data.test)]
    assert not parts[0] & parts[1]


def test_pixels_are_normalised():
    clips = torch.stack([clip for clip, _, _ in moving_digits.load(clips=2048).train.__getitems__(list(range(512)))])
    assert clips.shape == (512, 1, FRAMES, SIDE, SIDE)
    assert (abs(float(clips.mean())) < 0.02, abs(float(clips.std()) - 1) < 0.02) == (True, True)
