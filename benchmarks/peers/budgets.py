"""Each peer at the cost of another model: its setting with a given share of the host's MACs, or of its time."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tokenlearner.core.alpha import cell_layout
from tokenlearner.errors import InputError
from tokenlearner.insertion.hosting import bare_on_meta
from tokenlearner.insertion.insert import insert
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import measure_speed

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from peers.hosts import check_host, copy_of
from peers.patch_merger import merge_patches
from peers.plain import lower_resolution, shorten, smaller_vit
from peers.pruning import prune
from peers.tome import tome

FEWEST_TOKENS = 8  # of methods that leave a fixed number: as many as the TokenLearner they are compared with


class Peer(NamedTuple):
    """``settings(host)`` from the cheapest to the dearest; ``build(host, setting)`` is the model of one."""

    settings: Callable[[VisionTransformer], Sequence[Any]]
    build: Callable[[VisionTransformer, Any], nn.Module]


class Choice(NamedTuple):
    """A setting, for ``PEERS[name].build``, and the share of the host's cost that it has."""

    setting: Any
    share: float


def at_macs(name: str, model: nn.Module, share: float, size: tuple[int, ...]) -> Choice:
    """The setting of ``PEERS[name]`` whose MACs are nearest to ``share`` of ``model``'s, for inputs of ``size``.

    Raises:
        InputError: There is no such peer, the share is not above 0 and at most 1, or the peers don't take ``model``.
    """
    peer, host = _checked(name, model, share)
    whole = cost(host, size).macs

    def share_of(setting: Any) -> float:
        with torch.device("meta"):
            return cost(peer.build(host, setting), size).macs / whole

    return nearest(peer.settings(host), share, share_of)


def at_latency(
    name: str, model: nn.Module, share: float, images: Tensor, *, rounds: int = 5, seconds_per_round: float = 0.2
) -> Choice:
    """As :func:`at_macs`, of the time ``model`` takes for ``images`` (b, c, h, w), measured on their device.

    Host and peer are timed side by side at every step, so the share is as sure as :func:`measure_speed` makes it.

    Raises:
        InputError: As :func:`at_macs`.
    """
    peer, host = _checked(name, model, share)

    def share_of(setting: Any) -> float:
        models = {"host": model, name: peer.build(model, setting).to(images)}
        speeds = measure_speed(models, images, rounds=rounds, seconds_per_round=seconds_per_round)
        return 1 / speeds[1].ratio

    return nearest(peer.settings(host), share, share_of)


def nearest(settings: Sequence[Any], share: float, share_of: Callable[[Any], float]) -> Choice:
    """By bisection: the first setting that takes ``share`` or more, or the one before it."""
    measured = functools.cache(lambda i: share_of(settings[i]))
    first = bisect.bisect_left(range(len(settings)), share, key=measured)
    near = [i for i in (first - 1, first) if 0 <= i < len(settings)]
    best = min(near, key=lambda i: abs(measured(i) - share))
    return Choice(settings[best], measured(best))


def _checked(name: str, model: nn.Module, share: float) -> tuple[Peer, Any]:
    """The peer, and the host without numbers."""
    if name not in PEERS:
        raise InputError(f"there is no peer {name!r}; there are {', '.join(PEERS)}")
    if not 0 < share <= 1:
        raise InputError(f"share is a part of the host's own cost, above 0 and at most 1, not {share}")
    check_host(model)
    return PEERS[name], bare_on_meta(model)


def _merges(host: VisionTransformer) -> list[list[int]]:
    """The paper's constant r, also in fractions: so many merges in all, spread evenly over the layers."""
    depth, most = len(host.blocks), host.patch_embed.num_patches // 2
    return [
        [total * (i + 1) // depth - total * i // depth for i in range(depth)] for total in range(depth * most, -1, -1)
    ]


def _keeps(host: VisionTransformer) -> list[dict[int, int]]:
    """EViT's schedule: the same share is kept after a quarter, half and three quarters of the layers. Where that would
    leave too few tokens, these layers come earlier.
    """
    depth, patches = len(host.blocks), host.patch_embed.num_patches

    def schedule(earlier: int, kept: int) -> dict[int, int]:
        layers = sorted({max(0, depth * quarter // 4 - earlier) for quarter in (1, 2, 3)})
        return {layer: -(-(kept**i) // patches ** (i - 1)) for i, layer in enumerate(layers, 1)}

    def tokens(keep: dict[int, int]) -> int:
        stages = [*keep, depth]
        return stages[0] * patches + sum(
            (end - start) * count for start, end, count in zip(keep, stages[1:], keep.values())
        )

    fewest, earliest = min(FEWEST_TOKENS, patches), depth // 4
    candidates = (schedule(e, kept) for e in range(earliest + 1) for kept in range(patches, 0, -1))
    late = (keep for keep in candidates if min(keep) == 0 or min(keep.values()) >= fewest)
    return _ever_cheaper(late, tokens)


def _tokens(host: VisionTransformer) -> list[tuple[int, int]]:
    """(layer, tokens): the latest layer before which few enough tokens can be left, then as many as there can be."""
    depth, patches = len(host.blocks), host.patch_embed.num_patches
    fewest = min(FEWEST_TOKENS, patches)
    candidates = (
        (at, count) for at in range(depth - 1, -1, -1) for count in range(patches, fewest - 1 if at else 0, -1)
    )
    return _ever_cheaper(candidates, lambda it: it[0] * patches + (depth - it[0]) * it[1])


def _ever_cheaper(candidates: Iterable[Any], tokens: Callable[[Any], int]) -> list[Any]:
    """Those with fewer tokens, over all layers, than any before; the cheapest first."""
    kept: list[Any] = []
    for candidate in candidates:
        if not kept or tokens(candidate) < tokens(kept[-1]):
            kept.append(candidate)
    return kept[::-1]


def _cells(host: VisionTransformer) -> list[tuple[int, int]]:
    """Those of :func:`_tokens` that are cells at most twice as long as wide, as 2×4 are."""
    h, w = host.patch_embed.grid_size

    def fit(cells: int) -> bool:
        rows, columns = cell_layout(h, w, cells)
        return rows <= h and columns <= w and max(h * columns, w * rows) <= 2 * min(h * columns, w * rows)

    return [(at, cells) for at, cells in _tokens(host) if fit(cells)]


def _pooled(host: VisionTransformer, setting: tuple[int, int]) -> nn.Module:
    at, cells = setting
    return insert(copy_of(host), cells, at, kind="grid")


def _smaller(host: VisionTransformer) -> list[tuple[int, int]]:
    """(depth, heads) of which neither keeps more than twice the share of the host's that the other does."""
    most_depth, attn = len(host.blocks), host.blocks[0].attn
    pairs = [
        (depth, heads)
        for depth in range(1, most_depth + 1)
        for heads in range(1, attn.num_heads + 1)
        if depth * attn.num_heads <= 2 * heads * most_depth and heads * most_depth <= 2 * depth * attn.num_heads
    ]
    patches, width = host.patch_embed.num_patches, attn.head_dim
    return sorted(pairs, key=lambda it: it[0] * it[1] * (6 * it[1] * width + patches))  # 12 n d² + 2 n² d a layer


def _grids(host: VisionTransformer) -> list[tuple[int, int]]:
    h, w = host.patch_embed.grid_size
    return [(rows, max(1, round(w * rows / h))) for rows in range(1, h + 1)]


PEERS: dict[str, Peer] = {
    "tome": Peer(_merges, tome),
    "top-k": Peer(_keeps, prune),
    "evit": Peer(_keeps, functools.partial(prune, fuse=True)),
    "average pooling": Peer(_cells, _pooled),
    "patch merger": Peer(_tokens, lambda host, it: merge_patches(host, it[1], it[0])),
    "narrower": Peer(
        lambda host: [(len(host.blocks), heads) for heads in range(1, host.blocks[0].attn.num_heads + 1)],
        lambda host, it: smaller_vit(host, *it),
    ),
    "shallower": Peer(
        lambda host: [(depth, host.blocks[0].attn.num_heads) for depth in range(1, len(host.blocks) + 1)],
        lambda host, it: smaller_vit(host, *it),
    ),
    "smaller": Peer(_smaller, lambda host, it: smaller_vit(host, *it)),
    "lower resolution": Peer(_grids, lower_resolution),
    "shortened": Peer(lambda host: list(range(1, len(host.blocks) + 1)), shorten),
}
