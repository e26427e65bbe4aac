"""`tokenlearner train`: a folder of class folders to a saved model, a summary and a report."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from timm.data import create_transform
from torch import nn

from tokenlearner.data.images import (
    HELD_OUT,
    ImageFiles,
    LabelledImages,
    OnError,
    collate,
    damaged_entries,
    find_splits,
    scan_class_folders,
)
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert, insertion_of
from tokenlearner.insertion.saving import Preprocessing, save
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.training.fit import fit, result_of
from tokenlearner.training.looks import looks_at
from tokenlearner.training.optim import build_optimizer
from tokenlearner.training.recipe import AugmentRecipe, Recipe, check_recipe


@dataclass(frozen=True)
class ImageData:
    """Training and evaluation images of one class list; ``held_out_of`` is the folder the latter were split from."""

    train: LabelledImages
    val: LabelledImages
    held_out_of: Path | None


def train(data: str | Path, recipe: Recipe, output: str | Path, *, on_error: OnError = "skip") -> dict[str, Any]:
    """Trains ``recipe.model`` on the class folders under ``data`` and returns the summary.

    ``data`` holds one folder a class, or ``train`` and ``val`` folders that do. Writes to ``output``: the model after
    every epoch, ``metrics.csv``, ``recipe.json``, ``summary.json`` and ``report.html``. Damaged files are named and
    counted in the summary; ``on_error="raise"`` stops at the first instead.

    Raises:
        InputError: Data, model name or a size that does not fit.
    """
    start, output = time.perf_counter(), Path(output)
    check_recipe(recipe)
    images = read_data(Path(data), recipe)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    model = build_model(recipe, len(images.train.classes))
    preprocessing = Preprocessing.of(model)
    assert preprocessing is not None, "a model of timm.create_model has a configuration"
    with input_errors("augment"):
        transform = training_transform(preprocessing, recipe.augment)
    with input_errors("optimizer"):
        build_optimizer(model, recipe.optimizer)  # fit builds its own; here it fails before a folder is written
    output.mkdir(parents=True, exist_ok=True)
    (output / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    _note_held_out(images, output)

    train_set = ImageFiles(images.train, transform, on_error=on_error)
    val_set = ImageFiles(images.val, preprocessing.transform(), on_error=on_error)

    def save_model() -> None:
        save(model, output, preprocessing=preprocessing, labels=images.train.classes)

    fitted = fit(
        model, train_set, val_set, recipe, output, num_classes=len(images.train.classes), after_epoch=save_model
    )
    name = "tokenlearner" if insertion_of(model) else "plain"
    batch = torch.randn(min(16, recipe.batch_size), *preprocessing.input_size)
    speed = measure_speed({name: model}, batch, rounds=5)[0]
    result = result_of(name, model, fitted, speed, preprocessing.input_size)
    seconds = time.perf_counter() - start
    spec = insertion_of(model)
    write_report(
        output / "report.html",
        f"{recipe.model} on {Path(data).name}",
        f"{len(images.train):,} images to learn from, {len(images.val):,} held out, {len(images.train.classes)} classes"
        + (f"; {spec.describe()}." if spec else "; no tokens learned."),
        [result],
        _looks(model, val_set, images, preprocessing) if spec and spec.kind != "average" else (),
        f"tokenlearner train, seed {recipe.seed}, {recipe.epochs} epochs, {seconds:.0f} s on {hardware()}.",
    )
    return write_summary(
        output / "summary.json",
        seconds,
        [result],
        data=str(data),
        train_images=len(images.train),
        held_out=len(images.val),
        classes=len(images.train.classes),
        seed=recipe.seed,
        damaged=damaged_entries(fitted.damaged),
        strays=[str(path) for path in images.train.strays],
    )


@contextmanager
def input_errors(part: str) -> Iterator[None]:
    """For what timm and torch check themselves: their reason, and which part of the recipe it is about."""
    try:
        yield
    except Exception as error:
        raise InputError(f"the recipe's {part} does not fit: {error}") from error


def build_model(recipe: Recipe, num_classes: int | None, on: str = "cpu") -> nn.Module:
    """The host of ``recipe`` with its TokenLearner; ``num_classes`` outputs, or the host's own number if None.

    ``on="meta"`` builds it without numbers, to be counted.

    Raises:
        InputError: timm does not know the name, can't fetch its weights, or the insertion does not fit.
    """
    if not timm.is_model(recipe.model):
        near = difflib.get_close_matches(recipe.model, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models('vit*')"
        raise InputError(f"timm has no model {recipe.model!r}{hint}")
    options: dict[str, Any] = {"drop_path_rate": recipe.drop_path}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if recipe.image_size is not None:
        options["img_size"] = recipe.image_size
    try:
        with torch.device(on):
            model = timm.create_model(recipe.model, pretrained=recipe.pretrained, **options)
    except Exception as error:
        if not recipe.pretrained:
            raise InputError(f"timm can't build {recipe.model} with {options}: {error}") from error
        raise InputError(
            f"timm's weights for {recipe.model} could not be fetched or used ({type(error).__name__}); "
            "check the connection, or train from scratch without pretrained"
        ) from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    if recipe.image_size is not None and recipe.image_size % patch:
        raise InputError(f"image_size {recipe.image_size} is no multiple of {recipe.model}'s patches of {patch} pixels")
    if recipe.tokens == 0:
        return model
    try:
        return insert(
            model, recipe.tokens, recipe.at, recipe.kind, fuser=recipe.fuser, extra_layers=recipe.extra_layers
        )
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def read_data(data: Path, recipe: Recipe) -> ImageData:
    train_folder, val_folder = find_splits(data)
    scanned = scan_class_folders(train_folder)
    if val_folder is not None:
        return ImageData(scanned, scan_class_folders(val_folder, scanned.classes), None)
    train_part, held_out = scanned.split(recipe.held_out, recipe.seed)
    return ImageData(
        LabelledImages(train_part.files, train_part.labels, train_part.classes, scanned.strays), held_out, data
    )


def training_transform(preprocessing: Preprocessing, augment: AugmentRecipe) -> Any:
    """timm's training transform: random crop, flip, policy, jitter, normalisation, erasing."""
    return create_transform(
        input_size=preprocessing.input_size,
        is_training=True,
        scale=augment.scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        re_prob=augment.erasing,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


def _note_held_out(images: ImageData, output: Path) -> None:
    """Writes which files were held out, so that `evaluate` on the same folder scores those alone."""
    path = output / HELD_OUT
    if images.held_out_of is None:
        path.unlink(missing_ok=True)
        return
    names = [file.relative_to(images.held_out_of).as_posix() for file in images.val.files]
    path.write_text(json.dumps({"folder": images.held_out_of.name, "files": names}, indent=1) + "\n")


def _looks(model: nn.Module, val_set: ImageFiles, images: ImageData, preprocessing: Preprocessing) -> Any:
    """Eight held-out images, spread over the classes."""
    batch = collate([val_set[i] for i in range(0, len(val_set), max(1, len(val_set) // 8))])
    if not len(batch.labels):
        return ()
    return looks_at(model, batch.images[:8], batch.labels[:8], preprocessing, images.train.classes)
