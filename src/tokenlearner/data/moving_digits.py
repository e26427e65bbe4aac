"""Handwritten digits that hop around a ring: clips whose label is the order of the hops and nothing else.

Each of scikit-learn's 1,797 scans stands on eight places of a ring, once each, in one of eight orders, from a random
place on. Every frame and every set of frames is therefore as likely under one label as under another: whoever looks at
the frames one by one, or at their average, can only guess. No download; the digits are split as in ``digits.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

FRAMES, SIDE = 8, 20
MEAN, STD = 0.049, 0.188  # of the training frames, values in [0, 1]
_RADIUS, _DIGIT = 6, 8

# Name of the class → the places in the order they are visited, counted clockwise.
ORDERS = {
    "clockwise": (0, 1, 2, 3, 4, 5, 6, 7),
    "counter-clockwise": (0, 7, 6, 5, 4, 3, 2, 1),
    "by threes clockwise": (0, 3, 6, 1, 4, 7, 2, 5),
    "by threes counter-clockwise": (0, 5, 2, 7, 4, 1, 6, 3),
    "there and back": (0, 2, 4, 6, 7, 5, 3, 1),
    "back and there": (0, 1, 3, 5, 7, 6, 4, 2),
    "by twos clockwise": (0, 2, 4, 6, 1, 3, 5, 7),
    "by twos counter-clockwise": (0, 6, 4, 2, 7, 5, 3, 1),
}
CLASSES = tuple(ORDERS)


@dataclass(frozen=True)
class MovingDigits:
    train: Clips
    test: Clips


class Clips(Dataset[tuple[Tensor, int, int]]):
    """Clips (1, t, h, w) of ``digits``, normalised; ``labels`` are positions in :data:`CLASSES`.

    With ``starts`` every clip is fixed. Without, digit, order and first place are drawn anew each time: an epoch has as
    many clips as there are digits times classes, of which no two need be alike.
    """

    def __init__(
        self,
        digits: Float[Tensor, "n 8 8"],
        labels: Int[Tensor, " clips"],
        starts: Int[Tensor, " clips"] | None = None,
    ) -> None:
        self.digits, self.labels, self.starts = digits, labels, starts

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int, int]]:
        """A batch at once, which is how a DataLoader asks where it can."""
        labels, which = self.labels[indices], torch.tensor(indices) % len(self.digits)
        if self.starts is None:
            starts, which = torch.randint(FRAMES, (len(indices),)), torch.randint(len(self.digits), (len(indices),))
        else:
            starts = self.starts[indices]
        clips = (draw(self.digits[which], labels, starts) - MEAN) / STD
        return [(clip, int(label), index) for clip, label, index in zip(clips, labels, indices)]


def draw(
    digits: Float[Tensor, "b 8 8"], labels: Int[Tensor, " b"], starts: Int[Tensor, " b"]
) -> Float[Tensor, "b 1 t h w"]:
    """Each digit on its way, values in [0, 1], black around it."""
    at_places = torch.stack([_at(digits, place) for place in range(FRAMES)], dim=1)  # (b, place, h, w)
    places = (torch.tensor(list(ORDERS.values()))[labels] + starts[:, None]) % FRAMES
    return at_places[torch.arange(len(digits))[:, None], places][:, None]


def _at(digits: Float[Tensor, "b 8 8"], place: int) -> Float[Tensor, "b h w"]:
    """The frame with the digit at one of the eight places of the ring, which count clockwise from the top."""
    angle, centre = 2 * math.pi * place / FRAMES, (SIDE - _DIGIT) / 2
    top, left = round(centre - _RADIUS * math.cos(angle)), round(centre + _RADIUS * math.sin(angle))
    rest = SIDE - _DIGIT
    return F.pad(digits, (left, rest - left, top, rest - top))


def load(clips: int = 2048, held_out: float = 0.25, seed: int = 0) -> MovingDigits:
    """``clips`` to train on in an epoch, drawn anew each time, and one clip of every held-out digit."""
    data = load_digits()
    digits = torch.from_numpy(data.images / 16).float()
    train, test = train_test_split(np.arange(len(digits)), test_size=held_out, stratify=data.target, random_state=seed)
    labels = torch.arange(len(CLASSES))
    starts = torch.randint(FRAMES, (len(test),), generator=torch.Generator().manual_seed(seed))
    return MovingDigits(
        train=Clips(digits[train], labels.repeat(clips // len(labels))),
        test=Clips(digits[test], torch.arange(len(test)) % len(CLASSES), starts),
    )
