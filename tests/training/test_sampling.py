"""Which images come in which batch: every one once, whatever the processes, the parts and the place to go on from."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tokenlearner.errors import InputError
from tokenlearner.training.sampling import Draw, EpochBatches, Seeded, seed_step

Lists = list[list[Draw]]


def epoch(length: int, batch_size: int, number: int = 0, **options) -> Lists:
    """The lists one process gets in one epoch."""
    sampler = EpochBatches(length, batch_size, **{"shuffle": True} | options)
    sampler.set_epoch(number)
    return list(sampler)


def ranks(length: int, batch_size: int, processes: int, **options) -> list[Lists]:
    return [epoch(length, batch_size, processes=processes, rank=rank, **options) for rank in range(processes)]


def places(lists: Lists) -> list[int]:
    return [draw.place for draw in chain(*lists)]


# ---- training


@pytest.mark.parametrize(
    ("length", "batch_size", "sizes"),
    [
        (0, 4, []),
        (1, 1, [1]),
        (3, 1, [1, 1, 1]),
        (1, 4, [1]),
        (3, 4, [3]),
        (4, 4, [4]),
        (7, 4, [4, 3]),
        (8, 4, [4, 4]),
        (11, 4, [4, 4]),
        (12, 4, [4, 4, 4]),
    ],
)
def test_every_image_once_but_for_a_smaller_batch_after_the_second(length, batch_size, sizes):
    for number in range(3):
        lists = epoch(length, batch_size, number)
        assert [len(some) for some in lists] == sizes
        assert len(set(places(lists))) == sum(sizes)
        assert set(places(lists)) <= set(range(length))
    assert len(EpochBatches(length, batch_size, shuffle=True)) == len(sizes)


def test_what_is_left_out_differs_from_epoch_to_epoch():
    left_out = [frozenset(range(11)) - set(places(epoch(11, 4, number))) for number in range(20)]
    assert {len(some) for some in left_out} == {3}
    assert set().union(*left_out) == set(range(11))


def test_the_order_is_the_seeds_and_the_epochs():
    orders = [places(epoch(100, 10, number, seed=seed)) for seed in range(3) for number in range(3)]
    assert orders == [places(epoch(100, 10, number, seed=seed)) for seed in range(3) for number in range(3)]
    assert len(set(map(tuple, orders))) == 9
    assert sorted(orders[0]) == list(range(100)) != orders[0]


def test_the_order_does_not_hang_on_what_was_drawn_before():
    """A run that goes on has drawn other numbers before, from generators in other states."""
    sampler = EpochBatches(50, 10, shuffle=True)
    expected = [epoch(50, 10, number) for number in range(3)]
    for number in (2, 0, 1, 2):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        sampler.set_epoch(number)
        assert list(sampler) == expected[number]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("length", [8, 16, 31, 33])
def test_processes_and_parts_share_the_batches_of_one(length, shuffle):
    """Padding aside, batch b of 2 × 2 has the images, and the seeds, of batch b of one process in one part."""
    whole = epoch(length, 8, 1, shuffle=shuffle, seed=5)
    shared = ranks(length, 8, 2, number=1, parts=2, shuffle=shuffle, seed=5)
    assert [len(lists) for lists in shared] == [2 * len(whole)] * 2
    for number, batch in enumerate(whole):
        pieces = [lists[2 * number + part] for lists in shared for part in range(2)]
        drawn = list(chain(*pieces))
        assert set(drawn) >= set(batch)
        if len(batch) == 8 or not shuffle:
            assert sorted(drawn) == sorted(batch)
        if len(batch) == 8:
            assert [len(piece) for piece in pieces] == [2] * 4


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 11, 12, 13, 20, 23, 24, 25, 47])
@pytest.mark.parametrize(("processes", "parts"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 3)])
def test_all_processes_get_equally_many_equally_large_lists(length, processes, parts):
    """One that had fewer would leave the others waiting; lists of other sizes would weigh their images otherwise."""
    shared = ranks(length, 12, processes, parts=parts)
    assert len({len(lists) for lists in shared}) == 1
    for piece in range(0, len(shared[0]), parts):
        sizes = {len(lists[piece + part]) for lists in shared for part in range(parts)}
        assert len(sizes) == 1
        assert min(sizes) >= 1
    seen = list(chain(*map(places, shared)))
    if length < 24:
        assert set(seen) == set(range(length))
        assert len(seen) - length < processes * parts  # no more of them twice than must be
    else:
        assert len(set(seen)) == len(seen) == length // 12 * 12


# ---- evaluation


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 9, 15, 24, 25])
@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_no_image_is_scored_twice_or_left_out(length, processes, parts):
    shared = ranks(length, 8, processes, parts=parts, shuffle=False)
    assert sorted(chain(*map(places, shared))) == list(range(length))
    assert {len(lists) for lists in shared} == {-(-length // 8) * parts}
    for pieces in zip(*shared, strict=True):
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


def test_a_process_may_have_nothing_to_score():
    sizes = [[len(some) for some in lists] for lists in ranks(9, 8, 4, shuffle=False)]
    assert sizes == [[2, 1], [2, 0], [2, 0], [2, 0]]


def test_every_evaluation_is_in_the_same_order():
    assert places(epoch(10, 4, 0, shuffle=False)) == places(epoch(10, 4, 7, shuffle=False)) == list(range(10))


# ---- going on


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 5, 6])
def test_what_is_done_is_left_out_of_that_epoch_alone(parts, done):
    lists, options = 3 * parts, {"parts": parts, "start": (2, min(done, 3 * parts))}
    unbroken = [epoch(25, 8, number, parts=parts) for number in (2, 3)]
    sampler = EpochBatches(25, 8, shuffle=True, **options)
    assert list(sampler) == unbroken[0][min(done, lists) :]  # begins with the epoch it goes on with
    assert len(sampler) == lists
    sampler.set_epoch(3)
    assert list(sampler) == unbroken[1]


# ---- seeds


def test_seeds_differ_by_image_epoch_and_run():
    draws = [draw for seed in (0, 1) for number in range(4) for draw in chain(*epoch(50, 10, number, seed=seed))]
    assert len({draw.seed for draw in draws}) == len(draws) == 400


def numbers_drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


class Noisy(Dataset):
    """What an augmentation draws, from every generator there is."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple:
        return i, *numbers_drawn()


def test_a_draw_gives_the_same_augmentation_every_time():
    seeded = Seeded(Noisy())
    assert len(seeded) == 20
    first = seeded[Draw(3, 7)]
    assert first[0] == 3
    seeded[Draw(4, 8)]
    assert seeded[Draw(3, 7)] == first
    for x, y in zip(seeded[Draw(3, 8)][1:], first[1:], strict=True):
        assert x != y


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_what_one_process_draws(workers):
    def epoch_of(workers: int) -> list:
        batches = EpochBatches(20, 4, shuffle=True)
        return list(DataLoader(Seeded(Noisy()), batch_sampler=batches, num_workers=workers, collate_fn=list))

    assert epoch_of(workers) == epoch_of(0)


def test_every_step_part_and_process_draws_its_own_numbers():
    def drawn(*key: int) -> tuple:
        seed_step(*key)
        return numbers_drawn()

    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    first = [drawn(*key) for key in keys]
    assert [drawn(*key) for key in keys] == first
    assert len(set(chain(*first))) == 15


# ---- what does not divide


@pytest.mark.parametrize(
    ("batch_size", "processes", "parts"), [(9, 2, 1), (9, 1, 2), (10, 2, 2), (2, 2, 2), (12, 5, 1), (3, 4, 1)]
)
def test_a_batch_that_does_not_divide(batch_size, processes, parts):
    sentence = f"batch_size {batch_size} can't be split evenly over {processes} processes and {parts} parts"
    with pytest.raises(InputError, match=sentence):
        EpochBatches(40, batch_size, shuffle=True, processes=processes, parts=parts)


class Noise(Dataset):
    """Makes a whole batch at once, of random numbers."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, place: int) -> float:
        raise AssertionError("a batch is asked for at once")

    def __getitems__(self, places: list[int]) -> list[tuple[int, float]]:
        return list(zip(places, torch.rand(len(places)).tolist()))


def test_a_data_set_that_makes_whole_batches_is_asked_for_them():
    batches = list(EpochBatches(9, 4, shuffle=True, seed=3))
    seeded = Seeded(Noise())
    first = [seeded.__getitems__(batch) for batch in batches]
    torch.rand(5)
    assert [seeded.__getitems__(batch) for batch in reversed(batches)] == first[::-1]
    assert [[place for place, _ in batch] for batch in first] == [[d.place for d in batch] for batch in batches]
    assert seeded.__getitems__([]) == []
