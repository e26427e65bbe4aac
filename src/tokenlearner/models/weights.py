"""A plain ViT's weights in a model with a TokenLearner, and the other way round.

Names are timm's on both sides, so most of a state dict loads as it is. What differs: the paper's models have no class
token, norm before the mean where timm's pooled models norm after it (``fc_norm``), and sizes of their own. A ViViT's
patches are tubelets besides: :func:`inflate` gives image weights their depth in time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from einops import repeat
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from tokenlearner.core.alpha import Grid
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import inserted_parameters
from tokenlearner.insertion.layers import HostGrid
from tokenlearner.models.vivit import ViViT, resample_positions

_KERNEL = "patch_embed.proj.weight"


class LoadedWeights(NamedTuple):
    """What :func:`load_vit_weights` left out: names ``kept`` as they were in the model, and ``unused`` ones given."""

    kept: tuple[str, ...]
    unused: tuple[str, ...]


def load_vit_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, grid: HostGrid | None = None
) -> LoadedWeights:
    """Loads a timm ViT's ``state_dict`` into ``model``, in place, whichever of the two has a TokenLearner.

    A ViViT takes a ViViT's; for an image ViT's there is :func:`inflate`.

    Left out, and told in the answer: a class token only one side has, a head for another number of classes, and what
    was inserted on one side only (extra layers of the model stay the identity they start as). Position embeddings are
    interpolated to the model's grid; ``norm`` and ``fc_norm`` stand for each other.

    Args:
        grid: (h, w) of the source's position embedding, or a ViViT's (slices, h, w), where its length does not tell.

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
    _refuse_other_dimension(source.get(_KERNEL), target.get(_KERNEL))
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
    state: Mapping[str, Tensor], model: nn.Module, grid: HostGrid | None = None, class_token: bool = False
) -> dict[str, Tensor]:
    """``state`` with its position embedding brought to the grid and the class token entry that ``model`` has.

    ``class_token``: whether the source had one; its embedding may then hold an entry for it (``no_embed_class``: none).

    Raises:
        InputError: Its length does not tell its grid and none was given, or it could be of two grids.
    """
    host = cast(Any, model)
    state = dict(state)
    positions, own = state.get("pos_embed"), host.pos_embed
    if positions is None or own is None or positions.shape[-1] != own.shape[-1]:  # of another width nothing fits
        return state
    new_grid = tuple(host.patch_embed.grid_size)
    prefix, old_grid = _layout(state, new_grid, grid, class_token)
    old, new = ((1, *sides)[-3:] for sides in (old_grid, new_grid))  # an image is one slice
    patches = resample_positions(positions[:, prefix:], old, new)
    entries = 0 if host.no_embed_class else host.num_prefix_tokens
    before = positions[:, :prefix] if prefix == entries else own[:, :entries].detach().to(positions)
    state["pos_embed"] = torch.cat([before, patches], dim=1)
    return state


def _layout(
    state: Mapping[str, Tensor], target: HostGrid, given: HostGrid | None, class_token: bool
) -> tuple[int, HostGrid]:
    """How many entries of the position embedding stand before those of the patches, and the grid of these."""
    positions = state["pos_embed"]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    before_patches = int(class_token) + ("dist_token" in state) + registers
    for prefix in sorted({before_patches, 0}, reverse=True):
        if grid := _grid_of(positions.shape[1] - prefix, target, given):
            return prefix, grid
    found = f"the position embedding has {positions.shape[1]} entries"
    axes = "(h, w)" if len(target) == 2 else "(slices, h, w)"
    if given is not None:
        raise InputError(f"{found}, and grid={tuple(given)} is not their {axes}")
    if len(target) == 3:
        raise InputError(f"{found}, which are not the model's {'×'.join(map(str, target))}: give grid={axes}")
    raise InputError(f"{found}, which make no square: give grid={axes}")


def _grid_of(count: int, target: HostGrid, given: HostGrid | None) -> HostGrid | None:
    if given is not None:
        return given if len(given) == len(target) and min(given) > 0 and math.prod(given) == count else None
    root = math.isqrt(max(count, 0))
    found: set[HostGrid] = {(root, root)} if root * root == count and count and len(target) == 2 else set()
    if math.prod(target) == count:
        found.add(target)
    if len(found) > 1:  # 9×16 = 12²: a guess would scramble the positions
        raise InputError(
            f"{count} positions can be a grid of {root}×{root} or of {target[0]}×{target[1]}; give grid=(h, w)"
        )
    return found.pop() if found else None


def inflate(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    mode: Literal["central", "average"] = "central",
    *,
    grid: Grid | None = None,
) -> LoadedWeights:
    """Loads an image ViT's ``state_dict`` into the ViViT ``model``, in place (arXiv 2103.15691, section 3.4).

    The patch embedding becomes the tubelets' middle frame with zeros around it (``"central"``), or is shared out over
    their frames (``"average"``); either way a clip of equal frames is embedded as its frame was. It is resampled to the
    model's patch size by timm's rule (FlexiViT, arXiv 2212.08013: pixels scaled alike give the same embedding).
    Positions are repeated over time and interpolated to the model's (h, w). All else is as in
    :func:`load_vit_weights`.

    Args:
        grid: (h, w) of the source's position embedding, where its length does not tell.

    Raises:
        InputError: The model is no ViViT, the weights are no image model's, or something does not fit; the model is
            unchanged then.
    """
    if mode not in ("central", "average"):
        raise InputError(f"mode is 'central' or 'average', not {mode!r}")
    if not isinstance(model, ViViT):
        raise InputError(f"inflate takes a ViViT, and {type(model).__name__} is none")
    kernel, positions = state_dict.get(_KERNEL), state_dict.get("pos_embed")
    if kernel is None or kernel.ndim != 4:
        raise InputError("these are not an image ViT's weights: they have no patch embedding of two dimensions")
    frames = model.tubelet_size
    patch = model.patch_embed.patch_size
    if tuple(kernel.shape[2:]) != patch:
        kernel = resample_patch_embed(kernel, list(patch))
    inflated = repeat(kernel / frames, "d c h w -> d c t h w", t=frames)
    if mode == "central":
        inflated = torch.zeros_like(inflated)
        inflated[:, :, frames // 2] = kernel
    state = {**state_dict, _KERNEL: inflated}
    slices, *frame = model.patch_embed.grid_size
    old_grid: HostGrid | None = None
    if positions is not None:
        prefix, old = _layout(state_dict, (frame[0], frame[1]), grid, "cls_token" in state_dict)
        old_grid = (slices, *old[-2:])
        repeated = repeat(positions[:, prefix:], "1 n d -> 1 (t n) d", t=slices)
        state["pos_embed"] = torch.cat([positions[:, :prefix], repeated], dim=1)
    return load_vit_weights(model, state, grid=old_grid)


def _refuse_other_dimension(source: Tensor | None, target: Tensor | None) -> None:
    if source is None or target is None or source.ndim == target.ndim:
        return
    if target.ndim == 5:
        raise InputError(
            "these are an image model's weights, and the model takes clips: use inflate(model, state_dict)"
        )
    raise InputError("these are a video model's weights, and the model takes images")


def _is_inserted(key: str) -> bool:
    return not {"token_learner", "token_fuser"}.isdisjoint(key.split("."))


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names, in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more
