"""The model a recipe asks for, and the weights it starts from."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from tokenlearner.core.alpha import Grid
from tokenlearner.errors import InputError
from tokenlearner.insertion.hosting import build_host
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.saving import Preprocessing, load, read_config
from tokenlearner.models.weights import LoadedWeights, load_vit_weights
from tokenlearner.training.losses import HEAD_BIAS
from tokenlearner.training.recipe import Recipe

DEFAULT_MODEL = "vit_tiny_patch16_224"


def build_model(recipe: Recipe, num_classes: int | None, on: str = "cpu") -> nn.Module:
    """The host of ``recipe`` with its TokenLearner; ``num_classes`` outputs, or the host's own number if None.

    ``on="meta"`` builds it without numbers, to be counted.

    Raises:
        InputError: timm does not know the name, can't fetch its weights, or the insertion does not fit.
    """
    model = _host(recipe, num_classes, on)
    if recipe.tokens == 0:
        return model
    try:
        return insert(
            model, recipe.tokens, recipe.at, recipe.kind, fuser=recipe.fuser, extra_layers=recipe.extra_layers
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def model_name(recipe: Recipe) -> str:
    """What the recipe's model is called in reports."""
    if recipe.model is None and recipe.init and Path(recipe.init).is_dir():
        return Path(recipe.init).name
    return recipe.model or recipe.init or DEFAULT_MODEL


def _host(recipe: Recipe, num_classes: int | None, on: str) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": recipe.drop_path}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if recipe.image_size is not None:
        options["img_size"] = recipe.image_size
    if recipe.model is None and recipe.init and Path(recipe.init).is_dir():
        host = read_config(Path(recipe.init))["host"]
        with torch.device(on):
            model = build_host({**host, "arguments": {**host["arguments"], **options}})
    else:
        model = _timm_model(model_name(recipe), recipe.pretrained, options, on)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    if recipe.image_size is not None and recipe.image_size % patch:
        raise InputError(
            f"image_size {recipe.image_size} is no multiple of {model_name(recipe)}'s patches of {patch} pixels"
        )
    return model


def _timm_model(name: str, pretrained: bool, options: dict[str, Any], on: str) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models('vit*')"
        raise InputError(f"timm has no model {name!r}{hint}")
    try:
        with torch.device(on):
            return timm.create_model(name, pretrained=pretrained, **options)
    except InputError:
        raise
    except Exception as error:
        if not pretrained:
            raise InputError(f"timm can't build {name} with {options}: {error}") from error
        raise InputError(
            f"timm's weights for {name} could not be fetched or used ({type(error).__name__}); "
            "check the connection, or train from scratch without pretrained"
        ) from error


class Start(NamedTuple):
    """Weights to start from, and what is known of the model they were in."""

    state: dict[str, Tensor]
    grid: Grid | None
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None


def read_start(init: str) -> Start:
    """The weights of a saved folder, or those timm has for a name.

    Raises:
        InputError: Neither, or damaged, or not to be fetched.
    """
    if Path(init).is_dir():
        model: Any = load(init)
        labels = model.label_names
    elif timm.is_model(init):
        model, labels = _timm_model(init, True, {}, "cpu"), None
        labels = getattr(model, "label_names", None)
    else:
        raise InputError(f"init is {init!r}: give the folder of a saved model or a name timm knows")
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return Start(model.state_dict(), grid and tuple(grid), labels, Preprocessing.of(model))


def start_from(model: nn.Module, init: str, labels: Sequence[str]) -> tuple[LoadedWeights, Preprocessing | None]:
    """Loads the weights ``init`` names into ``model``, whose outputs are ``labels``; how its images are prepared.

    The head is taken over if it is of the same classes in the same order. What could not be taken over, and what of the
    model therefore starts anew, is in the answer.

    Raises:
        InputError: The weights are of another kind of model.
    """
    start = read_start(init)
    state = start.state
    if start.labels is None or tuple(start.labels) != tuple(labels):
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    loaded = load_vit_weights(model, state, grid=start.grid)
    own = Preprocessing.of(model)
    size = own.input_size if own else None
    if size is None:
        embed: Any = model.patch_embed
        size = (embed.proj.in_channels, *embed.img_size)
    return loaded, replace(start.preprocessing, input_size=size) if start.preprocessing else own


def prepare_head(model: nn.Module, recipe: Recipe, loaded: LoadedWeights | None) -> None:
    """A new head starts with low biases under the sigmoid loss: most classes are absent from most images."""
    head: Any = getattr(model, "head", None)
    is_new = not recipe.pretrained and (loaded is None or "head.bias" in loaded.kept)
    if recipe.loss == "sigmoid" and is_new and getattr(head, "bias", None) is not None:
        nn.init.constant_(head.bias, HEAD_BIAS)
