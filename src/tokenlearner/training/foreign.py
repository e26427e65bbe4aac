"""Weights as other programs save them, in the model they belong to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.models.weights import some

# Where a checkpoint keeps the weights, the averaged ones first; Lightning's and timm's among them.
_PLACES = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "weights",
)
_WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod|ema_model|backbone|net|network)\.)+")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of what ``torch.save`` wrote, by the model's own names.

    Wrappers (``module.``, ``model.``, ``_orig_mod.``) are taken off, and of a training checkpoint the averaged weights
    are taken where there are any.

    Raises:
        InputError: The file is not there, is damaged, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    try:
        found: Any = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # whatever a damaged file, or a pickle of other classes, makes of the readers
        raise InputError(f"{path} can't be read as weights: {' '.join(str(error).split())[:200]}") from error
    for _ in range(3):  # a checkpoint may hold an EMA's own state dict, which holds the weights
        place = next(
            (name for name in _PLACES if isinstance(found, Mapping) and isinstance(found.get(name), Mapping)), None
        )
        if place is None:
            break
        found = found[place]
    tensors = (
        {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
        if isinstance(found, Mapping)
        else {}
    )
    if not tensors:
        raise InputError(f"{path} holds no weights: expected a state dict, or a checkpoint with one")
    return {_WRAPPERS.sub("", key): value for key, value in tensors.items()}


def model_of_checkpoint(path: str | Path, host: str) -> nn.Module:
    """The timm model named ``host`` with the weights of ``path``, as many outputs as its head has, for square images of
    as many patches as the checkpoint has positions.

    Raises:
        InputError: No such model, or weights of another one; names what differs.
    """
    state = read_checkpoint(path)
    if not timm.is_model(host):
        raise InputError(f"timm has no model {host!r}: give the name of the one whose weights {path} holds")
    heads = [
        state[key].shape[0]
        for key in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
        if key in state
    ]
    options: dict[str, Any] = {"num_classes": heads[0] if heads else 0}
    model = timm.create_model(host, **options)
    if (side := _image_size(model, state)) is not None:
        model = timm.create_model(host, img_size=side, **options)
    own = model.state_dict()
    ignored = {key for key in state if key.endswith(("num_batches_tracked", "total_ops", "total_params", "n_averaged"))}
    missing = sorted(own.keys() - state.keys() - ignored)
    extra = sorted(state.keys() - own.keys() - ignored)
    shapes = sorted(
        f"{key} is {tuple(state[key].shape)} there and {tuple(own[key].shape)} in {host}"
        for key in own.keys() & state.keys()
        if own[key].shape != state[key].shape
    )
    if missing or extra or shapes:
        parts = [f"it lacks {some(missing)}"] if missing else []
        parts += [f"it also has {some(extra)}"] if extra else []
        raise InputError(f"{path} is not of {host}: {'; '.join([*parts, *shapes[:2]])}")
    model.load_state_dict({key: value for key, value in state.items() if key in own})
    return model.eval()


def _image_size(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """Pixels a side of the images that ``state`` has positions for; None where those are the model's own."""
    own, found = getattr(model, "pos_embed", None), state.get("pos_embed")
    embed: Any = getattr(model, "patch_embed", None)
    if own is None or embed is None or found is None or found.ndim != 3 or found.shape[1] == own.shape[1]:
        return None
    side = math.isqrt(found.shape[1] - own.shape[1] + embed.num_patches)
    return side * embed.patch_size[0]
