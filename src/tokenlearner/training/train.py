"""`tokenlearner train`: labelled images to a saved model, a summary and a report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timm.data import create_transform
from torch import nn
from torchvision.transforms import Compose, Grayscale

from tokenlearner.data.images import HELD_OUT, ImageFiles, OnError, collate, damaged_entries
from tokenlearner.data.sources import ImageData, held_out_names, name_of, read_images
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insertion_of
from tokenlearner.insertion.saving import Preprocessing, save, write_whole
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.training.build import build_model, model_name, prepare_head, start_from
from tokenlearner.training.checkpoint import last_checkpoint, read_progress
from tokenlearner.training.fit import Processes, check_run, fit, result_of
from tokenlearner.training.looks import looks_at
from tokenlearner.training.optim import build_optimizer
from tokenlearner.training.recipe import AugmentRecipe, Recipe, check_recipe, recipe_from_dict, resumed_recipe

RECIPE, SUMMARY = "recipe.json", "summary.json"


def train(
    data: str | Path, recipe: Recipe, output: str | Path, *, on_error: OnError = "skip", resume: bool = False
) -> dict[str, Any]:
    """Trains the model of ``recipe`` on the images of ``data`` and returns the summary.

    ``data`` holds one folder a class, or ``train`` and ``val`` folders that do; or it is a CSV of file,label; or holds
    tar shards. Writes to ``output``: the model after every epoch, ``checkpoints``, ``metrics.csv``, ``recipe.json``,
    ``summary.json`` and ``report.html``. Damaged files are named and counted in the summary; ``on_error="raise"`` stops
    at the first instead.

    ``resume`` goes on with a run that was stopped, at its last checkpoint and by its own recipe, with the losses it
    would have had; a run without a checkpoint begins anew. Under ``torchrun`` the processes share the work, the first
    one writes, and the others get an empty summary.

    Raises:
        InputError: Data, model name or a size that does not fit, or an unfinished run in ``output``.
    """
    start, output = time.perf_counter(), Path(output)
    is_first = Processes.of_torchrun().rank == 0
    if resume:
        recipe = _recipe_of_run(output, recipe)
    elif is_first:
        _refuse_unfinished(output)
    check_recipe(recipe)
    images = read_images(Path(data), recipe.held_out, recipe.seed)
    classes = images.train.classes
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    model = build_model(recipe, len(classes))
    loaded, preprocessing = start_from(model, recipe.init, classes) if recipe.init else (None, Preprocessing.of(model))
    prepare_head(model, recipe, loaded)
    assert preprocessing is not None, "a model of timm.create_model has a configuration"
    with input_errors("augment"):
        transform = training_transform(preprocessing, recipe.augment)
    with input_errors("optimizer"):
        build_optimizer(model, recipe.optimizer)  # fit builds its own; here it fails before a folder is written
    # Whatever fit would refuse is refused here, before a file of an earlier run is touched.
    fingerprint = _fingerprint(images, Path(data))
    check_run(recipe, images.train.multilabel)
    if resume:
        read_progress(output, fingerprint)
    if is_first:
        _prepare_output(output, recipe, images, resume)

    train_set = ImageFiles(images.train, transform, on_error=on_error)
    val_set = ImageFiles(images.val, preprocessing.transform(), on_error=on_error)

    def save_model() -> None:
        save(model, output, preprocessing=preprocessing, labels=classes)

    fitted = fit(
        model,
        train_set,
        val_set,
        recipe,
        output,
        num_classes=len(classes),
        after_epoch=save_model,
        multilabel=images.train.multilabel,
        checkpoints=True,
        resume=resume,
        data=fingerprint,
    )
    if not is_first:
        return {}
    name = "tokenlearner" if insertion_of(model) else "plain"
    batch = torch.randn(min(16, recipe.batch_size), *preprocessing.input_size)
    speed = measure_speed({name: model}, batch, rounds=5)[0]
    result = result_of(name, model, fitted, speed, preprocessing.input_size)
    seconds = time.perf_counter() - start
    spec = insertion_of(model)
    write_report(
        output / "report.html",
        f"{model_name(recipe)} on {Path(data).name}",
        f"{len(images.train):,} images to learn from, {len(images.val):,} held out, {len(classes)} classes"
        + (f"; {spec.describe()}." if spec else "; no tokens learned."),
        [result],
        _looks(model, val_set, images, preprocessing) if spec and spec.kind != "average" else (),
        f"tokenlearner train, seed {recipe.seed}, {recipe.epochs} epochs, {seconds:.0f} s on {hardware()}.",
    )
    started = {"init": {"from": recipe.init, "new": list(loaded.kept), "unused": list(loaded.unused)}} if loaded else {}
    return write_summary(
        output / SUMMARY,
        seconds,
        [result],
        data=str(data),
        train_images=len(images.train),
        held_out=len(images.val),
        classes=len(classes),
        seed=recipe.seed,
        **started,
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


def training_transform(preprocessing: Preprocessing, augment: AugmentRecipe) -> Any:
    """timm's training transform: random crop, flip, policy, jitter, normalisation, erasing; grey for one channel."""
    transform = create_transform(
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
    return Compose([Grayscale(1), transform]) if preprocessing.input_size[0] == 1 else transform


def _recipe_of_run(output: Path, given: Recipe) -> Recipe:
    path = output / RECIPE
    if not path.is_file():
        if not output.is_dir():
            raise InputError(f"there is no run to resume in {output}: the folder does not exist")
        return given  # stopped before it began
    try:
        return resumed_recipe(recipe_from_dict(json.loads(path.read_text(encoding="utf-8"))), given)
    except InputError as error:
        raise InputError(f"--resume goes on with the recipe in {path}: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a recipe of this version: {error}") from error


def _refuse_unfinished(output: Path) -> None:
    if last_checkpoint(output).exists() and not (output / SUMMARY).exists():
        raise InputError(
            f"{output} holds a run that has not ended: go on with it with --resume, or give another --output"
        )


def _prepare_output(output: Path, recipe: Recipe, images: ImageData, resume: bool) -> None:
    """Says what this run is, and which files it held out, so that `evaluate` on the same data scores those alone."""
    output.mkdir(parents=True, exist_ok=True)
    (output / SUMMARY).unlink(missing_ok=True)
    if not resume:
        last_checkpoint(output).unlink(missing_ok=True)
        (output / HELD_OUT).unlink(missing_ok=True)
    for left in output.glob(".*.json.*"), output.glob(".model.safetensors.*"):  # by a kill in the middle of writing
        for file in left:
            file.unlink(missing_ok=True)
    files = {output / RECIPE: asdict(recipe)}
    if images.held_out_of is not None:
        files[output / HELD_OUT] = {"folder": images.held_out_of.name, "files": held_out_names(images)}
    write_whole({path: (json.dumps(content, indent=1) + "\n").encode() for path, content in files.items()})


def _fingerprint(images: ImageData, data: Path) -> str:
    """Of the names and labels of all images: a checkpoint counts batches of these, in their order."""
    digest = hashlib.sha256(json.dumps(images.train.classes).encode())
    for part in (images.train, images.val):
        for source, label in zip(part.files, part.labels):
            digest.update(f"{name_of(source, data)}\0{label}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()


def _looks(model: nn.Module, val_set: ImageFiles, images: ImageData, preprocessing: Preprocessing) -> Any:
    """Eight held-out images, spread over the classes."""
    batch = collate([val_set[i] for i in range(0, len(val_set), max(1, len(val_set) // 8))])
    if not len(batch.labels):
        return ()
    return looks_at(model, batch.images[:8], batch.labels[:8], preprocessing, images.train.classes)
