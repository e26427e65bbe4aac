"""Weights as other programs save them, in the model they belong to."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.models.weights import some
from tokenlearner.training.build import timm_model

# Where a checkpoint keeps the weights, the averaged ones first; Lightning's and timm's among them.
_PLACES = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "shadow",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "weights",
)
_WRAPPERS = re.compile(r"^(?:(?:module|model|_orig_mod|ema_model|backbone|net|network)\.)+")
_HEADS = ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight")
_NOT_WEIGHTS = ("num_batches_tracked", "total_ops", "total_params", "n_averaged")


class Weights(NamedTuple):
    """Tensors of a checkpoint by the model's own names, and what stood beside the wrapped model, a loss for one."""

    own: dict[str, Tensor]
    beside: dict[str, Tensor]


def read_checkpoint(path: str | Path) -> Weights:
    """The tensors of a ``.safetensors`` file or of what ``torch.save`` wrote.

    Wrappers (``module.``, ``model.``, ``_orig_mod.``) are taken off, and of a training checkpoint the averaged weights
    are taken where there are any.

    Raises:
        InputError: The file is not there, is damaged, holds no weights, or those of several models.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    found = _state_dict(_read(path))
    if not found:
        raise InputError(f"{path} holds no weights: expected a state dict, or a checkpoint with one")
    groups: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in found.items():
        bare = _WRAPPERS.sub("", key)
        groups[key.removesuffix(bare)][bare] = value
    beside = groups.pop("", {})
    if not groups:
        return Weights(beside, {})
    averaged = [wrapper for wrapper in groups if "ema_model." in wrapper]
    own: dict[str, Tensor] = {}
    for wrapper in averaged or groups:
        for key, value in groups[wrapper].items():
            if key in own and not torch.equal(own[key], value):
                raise InputError(
                    f"{path} holds several models, in {' and '.join(sorted(averaged or groups))}: save one's state dict"
                )
            own[key] = value
    return Weights(own, beside)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints hold their arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (other := re.search(r"Unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error))) is None:
            raise InputError(f"{path} can't be read as weights: it is no file of torch.save, or damaged") from error
        raise InputError(
            f"{path} holds more than weights ({other[1]}), which could run code when it is read: save the model's "
            "state_dict() alone"
        ) from error
    except Exception as error:  # whatever a damaged file makes of the readers
        reason = " ".join(str(error).split())[:200] or "it is empty"
        raise InputError(f"{path} can't be read as weights: {reason}") from error


def _state_dict(found: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, or of one a checkpoint holds, at any of the usual places; of none where none is."""
    if not isinstance(found, Mapping):
        return {}
    for place in _PLACES:
        if inner := _state_dict(found.get(place)):
            return inner
    return {str(key): value for key, value in found.items() if isinstance(value, Tensor)}


def model_of_checkpoint(path: str | Path, host: str) -> nn.Module:
    """The timm model named ``host`` with the weights of ``path``, as many outputs as its head has, for square images of
    as many patches as the checkpoint has positions.

    What a training program keeps beside the model it wraps, such as a loss with weights or a teacher, is left out.

    Raises:
        InputError: No such model, or weights of another one; names what differs.
    """
    found = read_checkpoint(path)
    if not timm.is_model(host):
        of_transformers = "; of a model of transformers give the folder that save_pretrained wrote, without --host"
        raise InputError(
            f"timm has no model {host!r}: give the name of the one whose weights {path} holds"
            f"{of_transformers if '/' in host else ''}"
        )
    state = {**found.beside, **found.own}  # a head may stand beside a wrapped backbone
    heads = [state[key].shape[0] for key in _HEADS if key in state]
    options: dict[str, Any] = {"num_classes": heads[0] if heads else 0}
    model = timm_model(host, False, options, "cpu")
    if (side := _image_size(model, state)) is not None:
        model = timm_model(host, False, {**options, "img_size": side}, "cpu")
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or key in found.own}
    ignored = {key for key in state if key.endswith(_NOT_WEIGHTS)}
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
