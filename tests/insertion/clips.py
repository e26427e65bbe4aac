"""Tiny video hosts for the tests of insertion, and their forward pass written out slice by slice."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from insertion.hosts import DEPTH, FUSERS, learn, spread_back, tiny
from tokenlearner.core import Unpool
from tokenlearner.insertion import learners
from tokenlearner.models import ViViT

# Every way back to the full grid, and what it mixes.
WAYS = [*((fuser, "slice") for fuser in FUSERS), ("fuser", "clip")]
SLICES, GRID = 3, (2, 4)


def tiny_vivit(**options: object) -> ViViT:
    """3 slices of 2×4 tubelets, every parameter random."""
    return tiny(ViViT, **{"img_size": (16, 32), "num_frames": 6, "tubelet_size": 2, **options})


def clips(frames: int = 6, height: int = 16, width: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, frames, height, width)


def naive_layers(
    host: nn.Module,
    model: nn.Module,
    x: Tensor,
    grid: tuple[int, int, int] = (SLICES, *GRID),
    seen: dict[int, list[Tensor]] | None = None,
) -> list[Tensor]:
    """What each layer of ``model`` and then its norm must return, with a loop over slices.

    ``seen`` takes the tokens that reach each learner, slice by slice.
    """
    bare = copy.deepcopy(host)
    for _ in range(len(model.blocks) - DEPTH):
        bare.blocks.append(copy.deepcopy(bare.blocks[-1]))
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "token_" not in key})
    bare.train(model.training)
    slices, *frame = grid
    count, n = bare.num_prefix_tokens, frame[0] * frame[1]

    outs = [bare.norm_pre(bare._pos_embed(bare.patch_embed(x)))]
    for i, (layer, carrier) in enumerate(zip([*bare.blocks, bare.norm], [*model.blocks, model.norm])):
        prefix, X = outs[-1][:, :count], outs[-1][:, count:]
        learner, fuser = learners(model).get(i), getattr(carrier, "token_fuser", None)
        if learner is None:
            outs.append(layer(outs[-1]))
            continue
        Xs = [X[:, t * n : (t + 1) * n] for t in range(slices)]
        if seen is not None:
            seen[i] = Xs
        learned = [learn(learner, X, tuple(frame), with_maps=isinstance(fuser, Unpool)) for X in Xs]
        out = layer(torch.cat([prefix, *(Z for Z, _ in learned)], dim=1))
        if fuser is not None:
            s = learner.num_tokens
            Ys = [out[:, count + t * s : count + (t + 1) * s] for t in range(slices)]
            if getattr(fuser, "num_frames", None) is not None:
                back = fused_over_the_clip(fuser, Ys, Xs)
            else:
                back = [spread_back(fuser, Y, X, A) for Y, X, (_, A) in zip(Ys, Xs, learned)]
            out = torch.cat([out[:, :count], *(X + B for X, B in zip(Xs, back))], dim=1)
        outs.append(out)
    return outs[1:]


def fused_over_the_clip(fuser: nn.Module, Ys: list[Tensor], Xs: list[Tensor]) -> list[Tensor]:
    """Y ← (Yᵀ M)ᵀ over all S·T tokens, then β(X_t) Y_t for each slice."""
    Y = fuser.norm1(torch.cat(Ys, dim=1))
    Y = torch.einsum("uv,bvd->bud", fuser.mix.weight, Y) + fuser.mix.bias[:, None]
    Y = fuser.norm2(Y).chunk(len(Xs), dim=1)
    return [torch.einsum("bsn,bsd->bnd", fuser.beta(X).sigmoid(), Y_t) for X, Y_t in zip(Xs, Y)]
