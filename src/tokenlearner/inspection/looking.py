"""What attention maps look at, in numbers: how concentrated they are, whether tokens differ, whether they stay, and how
much of a map lies on what moves.

Every measure reads a map as a distribution p over the n = h·w positions of its frame: divided by its sum, so that
softmax and sigmoid maps compare. Maps are not negative; of an all-zero map, which is no distribution, all is nan.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from tokenlearner.core.alpha import Grid
from tokenlearner.errors import InputError

THRESHOLD = 0.06  # of the range from black to white: above what H.264 leaves of a still background
AROUND, SHARE = 5, 0.25


def distribution(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b n"]:
    """p: the maps in float32, each divided by its sum.

    Raises:
        InputError: A value below 0, as kind "dense" has them.
    """
    if maps.numel() and float(maps.min()) < 0:
        raise InputError("maps are read as shares, and these have values below 0")
    flat = maps.float().flatten(-2)
    return flat / flat.sum(dim=-1, keepdim=True)


def evenness(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Entropy over that of a uniform map, -Σ p log p / log n: 1 for a uniform map, 0 for one position."""
    p = distribution(maps)
    if p.shape[-1] == 1:
        raise InputError("maps of a single position are uniform and concentrated at once")
    return -torch.special.xlogy(p, p).sum(dim=-1) / math.log(p.shape[-1])


def half_mass(maps: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b"]:
    """Share of the positions that it takes, the heaviest first, to hold at least half of p: ½ for a uniform map."""
    p = distribution(maps)
    held = p.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    taken = (held < 0.5 - 1e-6).sum(dim=-1) + 1  # sums of float32 miss a half by less
    return torch.where(p.isnan().any(dim=-1), torch.nan, taken / p.shape[-1])


def overlap(maps: Float[Tensor, "*b s h w"]) -> Float[Tensor, "*b"]:
    """What two tokens' maps of one frame share, Σ min(p_i, p_j), on average over the pairs: 1 if all are the same, 0
    if none meet.

    Raises:
        InputError: There is one token only.
    """
    p = distribution(maps)
    tokens = p.shape[-2]
    if tokens < 2:
        raise InputError("overlap is between tokens, and there is one only")
    i, j = torch.triu_indices(tokens, tokens, offset=1)
    return torch.minimum(p[..., i, :], p[..., j, :]).sum(dim=-1).mean(dim=-1)


def stability(maps: Float[Tensor, "*b t s h w"]) -> Float[Tensor, "*b s"]:
    """What a token's maps of one frame and of the next share, Σ min(p_t, p_{t+1}), on average over the t - 1 pairs.

    Raises:
        InputError: There is one frame only.
    """
    p = distribution(maps)
    if p.shape[-3] < 2:
        raise InputError("stability is between frames, and there is one only")
    return torch.minimum(p[..., :-1, :, :], p[..., 1:, :, :]).sum(dim=-1).mean(dim=-2)


def motion(
    before: Float[Tensor, "*b c height width"],
    now: Float[Tensor, "*b c height width"],
    after: Float[Tensor, "*b c height width"],
    threshold: float = THRESHOLD,
) -> Bool[Tensor, "*b height width"]:
    """Where something moves in the frame ``now``, by the frames a little earlier and later; values from 0 to 1.

    A pixel changes if it differs by more than ``threshold``, in one of the channels, from both other frames: a moving
    thing differs from the background before it and behind it, while the places it comes from and goes to differ from
    one of them only. A pixel moves if at least a quarter of the 5×5 around it (less at the border) change, which drops
    specks and fills holes.
    """
    x, y, z = (frames.float() for frames in (before, now, after))
    changes = ((y - x).abs().amax(dim=-3) > threshold) & ((y - z).abs().amax(dim=-3) > threshold)
    flat = changes.float().reshape(-1, 1, *changes.shape[-2:])
    around = F.avg_pool2d(flat, AROUND, stride=1, padding=AROUND // 2, count_include_pad=False)
    return (around >= SHARE - 1e-6).reshape(changes.shape)


def on_grid(
    moving: Bool[Tensor, "*b height width"] | Float[Tensor, "*b height width"], grid: Grid
) -> Float[Tensor, "*b h w"]:
    """The share of each cell of ``grid`` that moves."""
    flat = moving.float().reshape(-1, 1, *moving.shape[-2:])
    return F.adaptive_avg_pool2d(flat, grid).reshape(*moving.shape[:-2], *grid)


def lift(maps: Float[Tensor, "*b s h w"], mask: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b s"]:
    """A map's mass on the mask over the mask's share of the area, Σ p m / (Σ m / n): 1 for a uniform map, whatever the
    mask; nan where the mask is empty."""
    p, m = distribution(maps), mask.float().flatten(-2)
    return (p * m.unsqueeze(-2)).sum(dim=-1) / m.mean(dim=-1, keepdim=True)
