"""A plain ViT's weights in a model with a TokenLearner, and the other way round.

Names are timm's on both sides, so most of a state dict loads as it is. What differs: the paper's models have no class
token, norm before the mean where timm's pooled models norm after it (``fc_norm``), and sizes of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tokenlearner.core.alpha import Grid
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import inserted_parameters


class LoadedWeights(NamedTuple):
    """What :func:`load_vit_weights` left out: names ``kept`` as they were in the model, and ``unused`` ones given."""

    kept: tuple[str, ...]
    unused: tuple[str, ...]


def load_vit_weights(model: nn.Module, state_dict: Mapping[str, Tensor], *, grid: Grid | None = None) -> LoadedWeights:
    """Loads a timm ViT's ``state_dict`` into ``model``, in place, whichever of the two has a TokenLearner.

    Left out, and told in the answer: a class token only one side has, a head for another number of classes, and what
    was inserted on one side only (extra layers of the model stay the identity they start as). Position embeddings are
    interpolated to the model's grid; ``norm`` and ``fc_norm`` stand for each other.

    Args:
        grid: (h, w) of the source's position embedding, where its length does not tell.

    Raises:
        InputError: Anything else does not fit; the model is unchanged then.
    """
    target = model.state_dict()
    source = dict(state_dict)
    for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{old}.weight" in source and f"{old}.weight" not in target and f"{new}.weight" in target:
            source.update({f"{new}.{part}": source.pop(f"{old}.{part}") for part in ("weight", "bias")})
    unused = [key for key in source if key not in target and (key == "cls_token" or _is_inserted(key))]
    head = [key for key in source if key.startswith(("head.", "head_dist."))]
    if any(key not in target or source[key].shape != target[key].shape for key in head):
        unused += head
    for key in unused:
        del source[key]

    own = {
        *inserted_parameters(model),
        "cls_token",
        *(f"{h}.{p}" for h in ("head", "head_dist") for p in ("weight", "bias")),
    }
    kept = [key for key in target if key not in source]
    lacking = [key for key in kept if key not in own and not _is_inserted(key)]
    foreign = [key for key in source if key not in target]
    if not foreign:
        source = fit_positions(source, model, grid, "cls_token" in state_dict)
    shapes = [
        f"{key} is {tuple(value.shape)} there and {tuple(target[key].shape)} in the model"
        for key, value in source.items()
        if key in target and value.shape != target[key].shape
    ]
    problems = [f"they lack {some(lacking)}"] if lacking else []
    problems += [f"the model has no {some(foreign)}"] if foreign else []
    if problems or shapes:
        raise InputError("the ViT weights don't fit the model: " + "; ".join([*problems, *shapes[:2]]))
    model.load_state_dict(source, strict=False)
    return LoadedWeights(tuple(kept), tuple(unused))


def fit_positions(
    state: Mapping[str, Tensor], model: nn.Module, grid: Grid | None = None, class_token: bool = False
) -> dict[str, Tensor]:
    """``state`` with its position embedding brought to the grid and the class token entry that ``model`` has.

    ``class_token``: whether the source had one; its embedding may then hold an entry for it (``no_embed_class``: none).

    Raises:
        InputError: Its length is no square and no grid was given, or it could be of two grids.
    """
    host = cast(Any, model)
    state = dict(state)
    positions, own = state.get("pos_embed"), host.pos_embed
    if positions is None or own is None or positions.shape[-1] != own.shape[-1]:  # of another width nothing fits
        return state
    new_grid = tuple(host.patch_embed.grid_size)
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    before_patches = int(class_token) + ("dist_token" in state) + registers
    for prefix in sorted({before_patches, 0}, reverse=True):
        if old_grid := _grid_of(positions.shape[1] - prefix, new_grid, grid):
            break
    else:
        found = f"the position embedding has {positions.shape[1]} entries"
        if grid is not None:
            raise InputError(f"{found}, and grid={tuple(grid)} is not their (h, w)")
        raise InputError(f"{found}, which make no square: give grid=(h, w)")
    patches = resample_abs_pos_embed(
        positions[:, prefix:], new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=0
    )
    entries = 0 if host.no_embed_class else host.num_prefix_tokens
    before = positions[:, :prefix] if prefix == entries else own[:, :entries].detach().to(positions)
    state["pos_embed"] = torch.cat([before, patches], dim=1)
    return state


def _grid_of(count: int, target: Grid, given: Grid | None) -> Grid | None:
    if given is not None:
        return given if len(given) == 2 and min(given) > 0 and math.prod(given) == count else None
    root = math.isqrt(max(count, 0))
    found = {(root, root)} if root * root == count and count else set()
    if target[0] * target[1] == count:
        found.add(target)
    if len(found) > 1:  # 9×16 = 12²: a guess would scramble the positions
        raise InputError(
            f"{count} positions can be a grid of {root}×{root} or of {target[0]}×{target[1]}; give grid=(h, w)"
        )
    return found.pop() if found else None


def _is_inserted(key: str) -> bool:
    return not {"token_learner", "token_fuser"}.isdisjoint(key.split("."))


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
