"""The model a recipe asks for, and the weights it starts from."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tokenlearner.core.alpha import Grid
from tokenlearner.core.learner import TokenLearner
from tokenlearner.data.images import collate
from tokenlearner.errors import InputError
from tokenlearner.insertion.clusters import start_at_clusters
from tokenlearner.insertion.elastic import most_tokens, note_elastic
from tokenlearner.insertion.hosting import build_host
from tokenlearner.insertion.insert import insert, insertion_of
from tokenlearner.insertion.layers import HostGrid
from tokenlearner.insertion.saving import Preprocessing, load, read_config
from tokenlearner.insertion.spec import Insertion
from tokenlearner.models.bottleneck import MODULES
from tokenlearner.models.opening import open_trained
from tokenlearner.models.vivit import ViViT
from tokenlearner.models.weights import LoadedWeights, inflate, load_vit_weights, some
from tokenlearner.models.x2plus1d import PLAIN, X2Plus1D
from tokenlearner.training.losses import HEAD_BIAS
from tokenlearner.training.recipe import Recipe

DEFAULT_MODEL, DEFAULT_CLIP_MODEL = "vit_tiny_patch16_224", "vivit_tiny_patch16x2_224"
_X2PLUS1D = "x2plus1d"


def build_model(recipe: Recipe, num_classes: int | None, on: str = "cpu") -> nn.Module:
    """The host of ``recipe`` with its TokenLearner; ``num_classes`` outputs, or the host's own number if None.

    ``on="meta"`` builds it without numbers, to be counted. An X(2+1)D has its TokenLearners in its last blocks, whose
    form is an argument of its own.

    Raises:
        InputError: timm does not know the name, can't fetch its weights, or the insertion does not fit.
    """
    model = _host(recipe, num_classes, on)
    own = insertion_of(model)  # of a model that is published with a TokenLearner
    is_done = (
        recipe.tokens == 0
        or isinstance(model, X2Plus1D)
        or (own and insertion_arguments(recipe) == insertion_arguments(Recipe()))
    )
    if recipe.elastic and recipe.tokens == 0:
        raise InputError("elastic trains on random numbers of the tokens, and tokens=0 leaves none: give at least 1")
    return with_insertion(model, recipe, is_there=bool(is_done))


def inserted_copy(host: nn.Module, recipe: Recipe, name: str) -> nn.Module:
    """A copy of ``host`` with the TokenLearner of ``recipe``, which depends on the seed alone.

    Raises:
        InputError: The host, which a sentence calls ``name``, has one already or takes none like this.
    """
    refuse_inserted(host, name)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    return with_insertion(copy.deepcopy(host), replace(recipe, init=None))


def with_insertion(model: nn.Module, recipe: Recipe, *, is_there: bool = False) -> nn.Module:
    """``model`` after ``recipe``'s insertion, which it may have already."""
    try:
        if not is_there:
            insert(model, **insertion_arguments(recipe))
        if recipe.elastic:
            most_tokens(model)  # refuses what can't take fewer
            note_elastic(model)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error
    return model


def refuse_inserted(model: nn.Module, name: str) -> None:
    if (inside := insertion_of(model)) is not None:
        raise InputError(f"{name} already has {inside.describe()}; give the model it was made of")


def insertion_arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments of ``insert``: the recipe's, or where it says nothing those of the model in init's folder."""
    names = ("tokens", "at", "kind", "fuser", "extra_layers", "mix", "over", "window")
    asked = {name: getattr(recipe, name) for name in names}
    if _host_is_inits(recipe) and asked == {name: getattr(Recipe(), name) for name in names}:
        saved = read_config(Path(str(recipe.init)))["insertion"]
        if saved:
            return Insertion(**saved).to_insert_arguments()
    return {"num_tokens": asked.pop("tokens"), **asked}


def _host_is_inits(recipe: Recipe) -> bool:
    return recipe.model is None and recipe.init is not None and Path(recipe.init).is_dir()


def start_maps(model: nn.Module, recipe: Recipe, train_set: Dataset[Any]) -> None:
    """Sets the maps as ``recipe.maps`` says, by 256 of the training images or clips."""
    count = len(train_set)  # type: ignore[arg-type]
    if recipe.maps == "clusters" and count:
        batch = collate([train_set[i] for i in range(0, count, max(1, count // 256))][:256])
        if len(batch.labels):
            start_at_clusters(model, batch.images)


def model_name(recipe: Recipe) -> str:
    """What the recipe's model is called in reports."""
    if _host_is_inits(recipe):
        return Path(str(recipe.init)).resolve().name
    return recipe.model or recipe.init or DEFAULT_MODEL


def _host(recipe: Recipe, num_classes: int | None, on: str) -> nn.Module:
    options: dict[str, Any] = {"drop_path_rate": recipe.drop_path}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if recipe.image_size is not None:
        options["img_size"] = recipe.image_size
    if recipe.clip.frames is not None:
        options["num_frames"] = recipe.clip.frames
    if recipe.clip.tubelet is not None:
        options["tubelet_size"] = recipe.clip.tubelet
    if _host_is_inits(recipe):
        host = read_config(Path(str(recipe.init)))["host"]
        arguments = host.get("arguments")
        if isinstance(arguments, dict):  # build_host refuses anything else
            arguments = {**arguments, **options}
        with torch.device(on):
            model = build_host({**host, "arguments": arguments})
    else:
        if recipe.init:
            _check_known(recipe.init)
        if model_name(recipe).startswith(_X2PLUS1D):
            options |= _module_options(recipe)
        elif recipe.clip.module is not None:
            raise InputError(f"clip.module is about X(2+1)D, such as x2plus1d_m, and {model_name(recipe)} is none")
        model = timm_model(model_name(recipe), recipe.pretrained, options, on)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    if recipe.image_size is not None and recipe.image_size % patch:
        raise InputError(
            f"image_size {recipe.image_size} is no multiple of {model_name(recipe)}'s patches of {patch} pixels"
        )
    return model


def _module_options(recipe: Recipe) -> dict[str, Any]:
    """The arguments of an X(2+1)D that stand for an insertion."""
    others = {name: getattr(recipe, name) for name in ("at", "fuser", "extra_layers", "mix", "over", "window")}
    if set_ones := [name for name, value in others.items() if value != getattr(Recipe(), name)]:
        raise InputError(
            f"{recipe.model} has its TokenLearners in its last blocks: tokens and kind can be chosen, "
            f"{', '.join(set_ones)} can't"
        )
    module = recipe.clip.module or ("TokenLearner" if recipe.tokens else PLAIN)
    learns = "tokenlearner" in MODULES.get(module, ())
    if module in MODULES and learns != (recipe.tokens > 0):
        asked = "learns tokens: tokens can't be 0" if learns else "learns no tokens: tokens has to be 0"
        raise InputError(f"clip.module {module!r} {asked}")
    return {"module": module, **({"num_tokens": recipe.tokens, "kind": recipe.kind} if learns else {})}


def _check_known(init: str) -> None:
    if not (Path(init).is_dir() or timm.is_model(init)):
        raise InputError(f"init is {init!r}: give the folder of a saved model or a name timm knows{_hint(init)}")


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models('vit*')"


def timm_model(name: str, pretrained: bool, options: dict[str, Any], on: str) -> nn.Module:
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{_hint(name)}")
    about_clips = options.keys() & {"num_frames", "tubelet_size"}
    if about_clips and not timm.models.model_entrypoint(name.split(".")[0]).__module__.startswith("tokenlearner."):
        raise InputError(
            f"{name} takes images, and clip.frames and clip.tubelet are about a model of clips, such as "
            f"{DEFAULT_CLIP_MODEL}"
        )
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
            "check the connection, or train from scratch, without pretrained and init"
        ) from error


class Start(NamedTuple):
    """Weights to start from, and what is known of the model they were in."""

    state: dict[str, Tensor]
    grid: HostGrid | None
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    form: dict[str, str]


def read_start(init: str) -> Start:
    """The weights of a saved folder, or those timm has for a name.

    Raises:
        InputError: Neither, or damaged, or not to be fetched.
    """
    _check_known(init)
    model: Any = load(init) if Path(init).is_dir() else timm_model(init, True, {}, "cpu")
    labels = getattr(model, "label_names", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return Start(model.state_dict(), grid and tuple(grid), labels, Preprocessing.of(model), _form(model))


def _form(model: nn.Module) -> dict[str, str]:
    """What the shapes of a model's weights don't tell, and what they are of no use without."""
    form = {name: f"{m.kind} ({m.pool})" for name, m in model.named_modules() if isinstance(m, TokenLearner)}
    heads = [m.num_heads for m in model.modules() if hasattr(m, "num_heads")]
    return {**form, "attention": f"of {heads[0]} heads"} if heads else form


def start_from(model: nn.Module, init: str, labels: Sequence[str]) -> tuple[LoadedWeights, Preprocessing]:
    """Loads the weights ``init`` names into ``model``, whose outputs are ``labels``; how its images are prepared.

    An image ViT's are inflated for a ViViT. The head is taken over if it is of the same classes in the same order. What
    could not be taken over, and what of the model therefore starts anew, is in the answer.

    Raises:
        InputError: The weights are of another kind of model, or nothing says how images are prepared.
    """
    start = read_start(init)
    state, head = dict(start.state), []
    if start.labels is None or tuple(start.labels) != tuple(labels):
        head = [key for key in state if key.startswith(("head.", "head_dist."))]
        state = {key: value for key, value in state.items() if key not in head}
    kernel = state.get("patch_embed.proj.weight")
    if isinstance(model, ViViT) and kernel is not None and kernel.ndim == 4:
        loaded = inflate(model, state, grid=cast("Grid | None", start.grid))
    elif isinstance(model, X2Plus1D):
        loaded = _load_equal(model, state)
    else:
        loaded = load_vit_weights(model, state, grid=start.grid)
    loaded = loaded._replace(unused=(*loaded.unused, *head))
    for part, here in _form(model).items():
        if (there := start.form.get(part, here)) != here:
            raise InputError(f"the ViT weights don't fit the model: {part} is {there} there and {here} in the model")
    own = Preprocessing.of(model)
    prepared = start.preprocessing or own
    if prepared is None:
        raise InputError(
            f"{init} does not say how its images are prepared; save it again with "
            "save(model, folder, preprocessing=Preprocessing(...))"
        )
    if own:
        return loaded, replace(prepared, input_size=own.input_size, frames=own.frames)
    embed: Any = getattr(model, "patch_embed", None)
    if embed is not None:
        prepared = replace(prepared, input_size=(embed.proj.in_channels, *embed.img_size))
    frames: Any = getattr(model, "num_frames", None)
    return loaded, replace(prepared, frames=frames)


def _load_equal(model: X2Plus1D, state: dict[str, Tensor]) -> LoadedWeights:
    """Weights of a model of the same form, whose head may be another."""
    target = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in target.items() if not key.startswith("head.")}
    found = {key: tuple(value.shape) for key, value in state.items() if not key.startswith("head.")}
    if shapes != found:
        differing = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
        raise InputError(f"the weights don't fit the X2Plus1D: {some(differing)} differ")
    head = [key for key in target if key.startswith("head.")]
    new = [key for key in head if key not in state or state[key].shape != target[key].shape]
    unused = [key for key in state if key.startswith("head.") and (key in new or key not in target)]
    model.load_state_dict({key: value for key, value in state.items() if key not in unused}, strict=False)
    return LoadedWeights(tuple(new), tuple(unused))


def prepare_head(model: nn.Module, recipe: Recipe, loaded: LoadedWeights | None) -> None:
    """A new head starts with low biases under the sigmoid loss: most classes are absent from most images."""
    is_new = loaded is None or "head.bias" in loaded.kept
    if recipe.pretrained:  # timm keeps the head for as many classes as it was of
        is_new = getattr(model, "num_classes", None) != getattr(model, "pretrained_cfg", {}).get("num_classes")
    if recipe.loss == "sigmoid" and is_new:
        for head in (getattr(model, "head", None), getattr(model, "head_dist", None)):
            if getattr(head, "bias", None) is not None:
                nn.init.constant_(head.bias, HEAD_BIAS)  # type: ignore[union-attr]


def open_teacher(recipe: Recipe, labels: Sequence[str], prepared: Preprocessing) -> nn.Module | None:
    """The model ``recipe.distill`` names, or None; ``prepared`` is how images are for the model that is trained.

    Raises:
        InputError: There is no such model, it tells other classes apart than ``labels``, or wants other images.
    """
    if recipe.distill.teacher is None:
        return None
    teacher = open_trained(recipe.distill.teacher)
    names, outputs = getattr(teacher, "label_names", None), getattr(teacher, "num_classes", None)
    if (names is None and outputs != len(labels)) or (names is not None and tuple(names) != tuple(labels)):
        raise InputError(
            f"distill.teacher {recipe.distill.teacher} tells {outputs} classes apart that are not the {len(labels)} of "
            "DATA, in their order: give one trained on the same classes"
        )
    own = Preprocessing.of(teacher)
    if own and (own.input_size, own.mean, own.std) != (prepared.input_size, prepared.mean, prepared.std):
        raise InputError(
            f"distill.teacher {recipe.distill.teacher} wants images of {own.input_size} with mean {own.mean} and "
            f"deviation {own.std}, the model ones of {prepared.input_size} with {prepared.mean} and {prepared.std}: "
            "start from the teacher with init, or give one prepared alike"
        )
    return teacher
