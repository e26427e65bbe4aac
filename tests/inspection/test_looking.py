"""Measures of maps, on maps whose measures are known."""

import itertools
import math

import pytest
import torch

from tokenlearner.errors import InputError
from tokenlearner.inspection.looking import (
    distribution,
    evenness,
    half_mass,
    lift,
    motion,
    on_grid,
    overlap,
    stability,
)

FLAT = torch.full((4, 6), 0.3)


def at(*places: tuple[int, int], value: float = 0.7) -> torch.Tensor:
    """A map of 4×6 with its mass on these places alone."""
    found = torch.zeros(4, 6)
    for place in places:
        found[place] = value
    return found


def random_maps(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) ** 3


# ---- one map


def test_a_flat_map_is_even_and_one_position_is_not():
    two = at((0, 0), (3, 5))
    found = evenness(torch.stack([FLAT, at((2, 3)), two]))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, math.log(2) / math.log(24)]))


def test_half_of_the_mass_is_counted_from_the_heaviest_position_on():
    uneven = torch.zeros(4, 6)
    uneven[0, :4] = torch.tensor([0.2, 0.1, 0.4, 0.3])  # 0.4 + 0.3 pass a half
    found = half_mass(torch.stack([FLAT, at((2, 3)), uneven, at((0, 0), (1, 1))]))
    torch.testing.assert_close(found, torch.tensor([12 / 24, 1 / 24, 2 / 24, 1 / 24]))


@pytest.mark.parametrize("n", [2, 9, 14, 64, 196, 1024])
def test_a_flat_map_has_half_its_mass_on_half_its_positions(n):
    assert float(half_mass(torch.full((1, n), 1 / 3))) == pytest.approx(math.ceil(n / 2) / n)


def test_measures_do_not_depend_on_the_maps_scale():
    maps, mask = random_maps(2, 3, 4, 6), random_maps(2, 4, 6)
    for measure in (evenness, half_mass, overlap, stability, lambda A: lift(A, mask)):
        scaled = maps * torch.tensor([0.01, 1.0, 7.0])[:, None, None]
        torch.testing.assert_close(measure(scaled), measure(maps))


def test_a_map_of_nothing_has_no_measure():
    maps = torch.stack([torch.zeros(4, 6), FLAT])
    for values in (evenness(maps), half_mass(maps), lift(maps, FLAT)):
        assert values.isnan().tolist() == [True, False]
    assert overlap(maps).isnan()


def test_what_is_no_map_is_refused():
    with pytest.raises(InputError, match="below 0"):
        distribution(torch.tensor([[0.5, -0.1]]))
    with pytest.raises(InputError, match="single position"):
        evenness(torch.ones(3, 1, 1))
    with pytest.raises(InputError, match="one only"):
        overlap(torch.ones(1, 4, 6))
    with pytest.raises(InputError, match="one only"):
        stability(torch.ones(1, 3, 4, 6))


# ---- several maps


def test_overlap_is_one_for_the_same_maps_and_zero_for_disjoint_ones():
    same = FLAT.expand(5, 4, 6) * torch.arange(1, 6)[:, None, None]
    apart = torch.stack([at((0, 0)), at((1, 0)), at((0, 1))])
    half = torch.stack([at((0, 0), (0, 1)), at((0, 1), (0, 2)), at((3, 3))])  # one of three pairs shares a half
    assert float(overlap(same)) == pytest.approx(1)
    assert float(overlap(apart)) == 0
    assert float(overlap(half)) == pytest.approx(0.5 / 3)


def test_overlap_is_the_mean_over_pairs():
    maps = random_maps(2, 4, 3, 5)
    p = maps / maps.sum(dim=(2, 3), keepdim=True)
    for found, tokens in zip(overlap(maps), p):
        pairs = [float(torch.minimum(a, b).sum()) for a, b in itertools.combinations(tokens, 2)]
        assert float(found) == pytest.approx(sum(pairs) / 6)


def test_stability_compares_a_token_with_itself_a_frame_later():
    """A flat token stays; one that moves on at every frame shares nothing; one that moves by half its width, half."""
    steps = [
        torch.stack([FLAT * (t + 1), at((0, t)), at((1, t), (1, t + 1)), at((2, t // 2))])  # the last moves once in 3
        for t in range(4)
    ]
    clip = torch.stack(steps)
    torch.testing.assert_close(stability(clip), torch.tensor([1.0, 0.0, 0.5, 2 / 3]))
    torch.testing.assert_close(stability(torch.stack([clip, clip.flip(0)])), stability(clip).expand(2, 4))


# ---- maps and what moves


def test_lift_is_mass_over_area():
    mask = torch.zeros(4, 6)
    mask[:2, :3] = 1  # a quarter of the positions
    half = FLAT.clone()
    half[2:] = 0  # half of it on the mask
    maps = torch.stack([FLAT, at((1, 1)), at((3, 3)), half])
    torch.testing.assert_close(lift(maps, mask), torch.tensor([1.0, 4.0, 0.0, 2.0]))


def test_lift_of_a_flat_map_is_one_on_any_mask_and_none_on_an_empty_one():
    masks = random_maps(5, 4, 6)
    torch.testing.assert_close(lift(FLAT.expand(5, 3, 4, 6), masks), torch.ones(5, 3))
    assert lift(FLAT[None], torch.zeros(4, 6)).isnan().all()


def test_the_grid_has_each_cells_share():
    moving = torch.zeros(2, 8, 12, dtype=torch.bool)
    moving[0, 0:2, 0:2] = True  # all of the first cell
    moving[1, 7, 10] = True  # a quarter of the last
    found = on_grid(moving, (4, 6))
    expected = torch.zeros(2, 4, 6)
    expected[0, 0, 0], expected[1, 3, 5] = 1, 0.25
    torch.testing.assert_close(found, expected)


def square(left: int, side: int = 8, height: int = 24, width: int = 40) -> torch.Tensor:
    """A bright square on a dark ground: (3, height, width)."""
    frame = torch.full((3, height, width), 0.2)
    frame[:, 8 : 8 + side, left : left + side] = 0.9
    return frame


def test_what_moves_is_where_it_is_now():
    """Not where it was, nor where it will be: from those the frame differs once."""
    moving = motion(square(2), square(14), square(26))
    assert moving[9:15, 15:21].all()
    assert not moving[:, :12].any()
    assert not moving[:, 25:].any()
    assert not moving[:6].any()
    assert not moving[18:].any()


def test_nothing_moves_in_a_still_picture_or_by_less_than_the_threshold():
    still = square(14)
    assert not motion(still, still, still).any()
    assert not motion(still + 0.05, still, still + 0.05, threshold=0.06).any()
    assert motion(still + 0.07, still, still + 0.07, threshold=0.06).all()


def test_one_channel_is_enough():
    red = square(14).clone()
    red[1:] = 0.2
    ground = torch.full_like(red, 0.2)
    assert motion(ground, red, ground)[9:15, 15:21].all()


def test_specks_are_dropped_and_holes_are_filled():
    ground = torch.full((3, 24, 40), 0.2)
    frame = square(14).clone()
    frame[:, 11, 17] = 0.2  # a hole
    frame[:, 3, 35] = 0.9  # a speck
    moving = motion(ground, frame, ground)
    assert moving[11, 17]
    assert not moving[:6, 32:].any()


def test_motion_counts_a_quarter_of_the_pixels_around():
    changes = torch.rand(3, 9, 11, generator=torch.Generator().manual_seed(0)) < 0.25
    ground = torch.zeros(3, 1, 9, 11)
    moving = motion(ground, changes[:, None].float(), ground)
    for frame, y, x in itertools.product(range(3), range(9), range(11)):
        around = changes[frame, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].float()
        assert bool(moving[frame, y, x]) == (float(around.mean()) >= 0.25 - 1e-6)
