"""Which images come in which batch, and what is random about them, as functions of the seed alone.

Order, augmentation, mixup and dropout depend on the seed, the epoch and the place in the epoch, never on how many
numbers somebody drew before or on how many workers decode. A run can therefore be repeated, and one that was killed can
go on in the middle of an epoch, with the numbers it would have had.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from tokenlearner.errors import InputError

# What the numbers are for: no two uses may draw the same ones.
_ORDER, _SAMPLE, _STEP, _TOKENS = range(4)


class Draw(NamedTuple):
    """An image's place in the data set and the seed of what is random about it this time."""

    place: int
    seed: int


class EpochBatches(Sampler[list[Draw]]):
    """A batch sampler for one process of several, each batch in ``parts`` that are computed one after the other.

    All processes get the same number of equally large lists. In training (``shuffle``) an epoch leaves out its last,
    smaller batch unless it is one of the first two, and fills it up to a multiple of the processes and parts with
    images of its beginning where it must be kept. In evaluation no image is left out or seen twice: some lists are
    shorter by one or empty.

    Args:
        length: Images of the data set.
        batch_size: Images of a batch, over all processes and parts.
        start: (epoch, lists of it done already) to go on from.

    Raises:
        InputError: The batch does not divide by processes times parts.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        if batch_size % (processes * parts):
            raise InputError(
                f"batch_size {batch_size} can't be split evenly over {processes} processes and {parts} parts"
            )
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.processes, self.parts = rank, processes, parts
        self.share = batch_size // (processes * parts)
        self.start, self.epoch = start, start[0]
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def _batches(self) -> int:
        size = self.share * self.processes * self.parts
        return self.length // size if self.shuffle and self.length >= 2 * size else math.ceil(self.length / size)

    def __len__(self) -> int:
        return self._batches * self.parts

    def __iter__(self) -> Iterator[list[Draw]]:
        done = self.start[1] if self.epoch == self.start[0] else 0
        lanes = self.processes * self.parts
        size = self.share * lanes
        order = np.arange(self.length)
        if self.shuffle:
            order = numbers(self.seed, _ORDER, self.epoch).permutation(self.length)
        for number in range(done, len(self)):
            first = number // self.parts * size
            batch = order[first : first + size]
            if self.shuffle and len(batch) % lanes:
                batch = np.concatenate([batch, np.resize(order, -len(batch) % lanes)])
            lane = number % self.parts * self.processes + self.rank
            yield [Draw(int(i), seed_of(self.seed, _SAMPLE, self.epoch, int(i))) for i in batch[lane::lanes]]


class Seeded(Dataset[Any]):
    """``dataset`` by :class:`Draw`, its random number generators set anew for every sample.

    For every batch where ``dataset`` makes whole batches (``__getitems__``).
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        seed_sample(draw.seed)
        return self.dataset[draw.place]

    def __getitems__(self, draws: list[Draw]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        if fetch is None or not draws:
            return [self[draw] for draw in draws]
        seed_sample(draws[0].seed)
        return fetch([draw.place for draw in draws])


def seed_step(seed: int, epoch: int, part: int, rank: int) -> None:
    """Sets the generators for a training step: dropout, stochastic depth, mixup."""
    drawn = seed_of(seed, _STEP, epoch, part, rank)
    seed_sample(drawn)
    torch.manual_seed(drawn)


def draw_tokens(seed: int, epoch: int, step: int, most: int) -> int:
    """From 1 to ``most`` tokens, each number as likely, for an optimizer step of every process."""
    return int(numbers(seed, _TOKENS, epoch, step).integers(1, most, endpoint=True))


def seed_sample(seed: int) -> None:
    """Python's, NumPy's and PyTorch's generators on the CPU, where samples are made.

    ``torch.manual_seed`` would set those of every other device too, which takes longer than to decode a small image.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def seed_of(*key: int) -> int:
    """32 bits that differ for every key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def numbers(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
