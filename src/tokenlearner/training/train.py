"""`tokenlearner train`: labelled images to a saved model, a summary and a report."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn
from torch.utils.data import Dataset

from tokenlearner.data.clip_sources import Listing
from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.images import HELD_OUT, OnError, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insertion_of, learners
from tokenlearner.insertion.saving import CONFIG, WEIGHTS, Preprocessing, save, write_whole
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.models.weights import LoadedWeights
from tokenlearner.training.build import (
    DEFAULT_CLIP_MODEL,
    build_model,
    model_name,
    open_teacher,
    prepare_head,
    start_from,
    start_maps,
)
from tokenlearner.training.checkpoint import last_checkpoint, read_progress
from tokenlearner.training.distill import Distilled, Taught
from tokenlearner.training.fit import Fitted, Processes, check_run, fit, result_of
from tokenlearner.training.material import Material, prepared, read_material
from tokenlearner.training.optim import build_optimizer
from tokenlearner.training.recipe import Recipe, check_recipe, recipe_from_dict, resumed_recipe

RECIPE, SUMMARY = "recipe.json", "summary.json"


class Ready(NamedTuple):
    """What a run trains, and on what, before anything is written.

    ``labels`` are the names of the model's outputs, which need not be what ``material`` calls its classes; None for
    those it has. ``taught`` is what is learned from ``teacher``.
    """

    model: nn.Module
    preprocessing: Preprocessing
    material: Material
    labels: Sequence[str] | None
    teacher: nn.Module | None = None
    taught: type[Taught] = Distilled
    loaded: LoadedWeights | None = None
    name: str = ""


def train(
    data: str | Path,
    recipe: Recipe,
    output: str | Path,
    *,
    on_error: OnError = "skip",
    resume: bool = False,
    listing: Listing | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trains the model of ``recipe`` on the images or videos of ``data`` and returns the summary.

    ``data`` holds one folder a class, or ``train`` and ``val`` folders that do; or it is a CSV of file,label; or holds
    tar shards. Videos may also be listed as Charades, Kinetics or AViD do, with what these do not say in ``listing``.
    Writes to ``output``: the model after every epoch, ``checkpoints``, ``metrics.csv``, ``recipe.json``,
    ``summary.json`` and ``report.html``. Damaged files are named and counted in the summary; ``on_error="raise"`` stops
    at the first instead.

    ``classes`` fixes the outputs and their order; the data may lack some of them.

    ``resume`` goes on with a run that was stopped, at its last checkpoint and by its own recipe, with the losses it
    would have had; a run without a checkpoint begins anew. Under ``torchrun`` the processes share the work, the first
    one writes, and the others get an empty summary.

    Raises:
        InputError: Data, model name or a size that does not fit, or an unfinished run in ``output``.
    """
    start, output = time.perf_counter(), Path(output)
    is_first = Processes.of_torchrun().rank == 0
    if is_first:
        check_output(output, data, resume=resume)
    if resume:
        recipe = recipe_of_run(output, recipe)
    check_recipe(recipe)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    task = made_ready(recipe, read_material(Path(data), recipe, listing, classes))
    fitted, val_set = fit_ready(task, recipe, output, on_error=on_error, resume=resume)
    if not is_first:
        return {}
    model, preprocessing, material, loaded = task.model, task.preprocessing, task.material, task.loaded
    images, classes = material.data, material.data.train.classes
    name = "tokenlearner" if learners(model) else "plain"
    shape = preprocessing.model_input
    speed = measure_speed({name: model}, torch.randn(min(16, recipe.batch_size), *shape), rounds=5)[0]
    result = result_of(name, model, fitted, speed, shape)
    seconds = time.perf_counter() - start
    spec, own = insertion_of(model), learners(model)
    learned = spec.describe() if spec else f"tokens learned in {len(own)} of its blocks" if own else "no tokens learned"
    has_maps = any(learner.kind != "average" for learner in own.values())
    write_report(
        output / "report.html",
        f"{task.name} on {Path(data).name}",
        f"{len(images.train):,} {material.noun} to learn from, {len(images.val):,} held out, {len(classes)} classes; "
        f"{learned}.",
        [result],
        footer=f"tokenlearner train, seed {recipe.seed}, {recipe.epochs} epochs, {seconds:.0f} s on {hardware()}.",
        **(material.looks(model, val_set, preprocessing, output / "maps") if has_maps else {}),
    )
    started = {"init": {"from": recipe.init, "new": list(loaded.kept), "unused": list(loaded.unused)}} if loaded else {}
    return write_summary(
        output / SUMMARY,
        seconds,
        [result],
        data=str(data),
        **{f"train_{material.noun}": len(images.train)},
        held_out=len(images.val),
        classes=len(classes),
        seed=recipe.seed,
        **started,
        damaged=damaged_entries(fitted.damaged),
        **material.left_out,
    )


def fit_ready(
    task: Ready, recipe: Recipe, output: Path, *, on_error: OnError = "skip", resume: bool = False
) -> tuple[Fitted, Dataset[Any]]:
    """Trains the model of ``task`` in place, and returns what became of it and the evaluation set.

    Writes all of what :func:`train` writes but its summary and report. Under ``torchrun`` every process calls this.

    Raises:
        InputError: As :func:`train`.
    """
    model, material, classes = task.model, task.material, task.material.data.train.classes
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    train_set, val_set = checked_sets(task, recipe, on_error)
    fingerprint = fingerprint_of(material)
    if resume:
        read_progress(output, fingerprint)
    else:
        start_maps(model, recipe, train_set)
    if Processes.of_torchrun().rank == 0:
        prepare_output(output, recipe, material, resume)
    fitted = fit(
        model,
        train_set,
        val_set,
        recipe,
        output,
        num_classes=len(classes),
        after_epoch=lambda: save(model, output, preprocessing=task.preprocessing, labels=task.labels),
        multilabel=material.multilabel,
        checkpoints=True,
        resume=resume,
        data=fingerprint,
        teacher=task.teacher,
        taught=task.taught,
    )
    return fitted, val_set


def checked_sets(task: Ready, recipe: Recipe, on_error: OnError) -> tuple[Dataset[Any], Dataset[Any]]:
    """What is trained and scored on, after all that :func:`fit` would refuse: before a file is touched."""
    with input_errors("augment"):
        sets = task.material.datasets(recipe, task.preprocessing, on_error)
    with input_errors("optimizer"):
        build_optimizer(task.model, recipe.optimizer)  # fit builds its own
    check_run(recipe, task.material.multilabel)
    return sets


def made_ready(recipe: Recipe, material: Material) -> Ready:
    """The model ``recipe`` asks for, its weights and its teacher, for ``material``.

    Raises:
        InputError: They don't go together.
    """
    classes = material.data.train.classes
    if material.clips and recipe.model is None and recipe.init is None:
        recipe = replace(recipe, model=DEFAULT_CLIP_MODEL)
    model = build_model(recipe, len(classes))
    loaded, preprocessing = start_from(model, recipe.init, classes) if recipe.init else (None, Preprocessing.of(model))
    prepare_head(model, recipe, loaded)
    assert preprocessing is not None, "a model of timm.create_model has a configuration"
    preprocessing = prepared(preprocessing, model, recipe, material)
    teacher = open_teacher(recipe, classes, preprocessing)
    return Ready(model, preprocessing, material, classes, teacher, loaded=loaded, name=model_name(recipe))


@contextmanager
def input_errors(part: str) -> Iterator[None]:
    """For what timm and torch check themselves: their reason, and which part of the recipe it is about."""
    try:
        yield
    except Exception as error:
        raise InputError(f"the recipe's {part} does not fit: {error}") from error


def recipe_of_run(output: Path, given: Recipe) -> Recipe:
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


def check_output(output: Path, data: str | Path, model: str | None = None, *, resume: bool = False) -> None:
    """Before anything is computed.

    Raises:
        InputError: ``output`` can't be a folder, is what the run reads, or holds an unfinished run or a model that no
            run wrote.
    """
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise InputError(f"--output {output} can't be a folder, since {above} is a file: give a new folder")
    if not os.access(above, os.W_OK):
        raise InputError(f"--output {output} can't be written: {above} does not allow it")
    place, read = output.resolve(), Path(data).resolve()
    if model is not None and place == Path(model).resolve():
        raise InputError(f"--output {output} is MODEL itself, which would be lost: give a new folder")
    if place == read or (read in place.parents and read.is_dir()):
        raise InputError(f"--output {output} is in DATA, where the next run would read it: give a folder elsewhere")
    if resume:
        return
    refuse_unfinished(output)
    if not (output / RECIPE).exists() and (kept := next((n for n in (CONFIG, WEIGHTS) if (output / n).exists()), None)):
        raise InputError(f"--output {output} has a {kept} that no training wrote: give a new folder")


def refuse_unfinished(output: Path) -> None:
    if last_checkpoint(output).exists() and not (output / SUMMARY).exists():
        raise InputError(
            f"{output} holds a run that has not ended: go on with it with --resume, or give another --output"
        )


def prepare_output(output: Path, recipe: Recipe, material: Material, resume: bool) -> None:
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
    if material.data.held_out_of is not None:
        files[output / HELD_OUT] = {"folder": material.data.held_out_of.name, "files": material.held_out_names()}
    write_whole({path: (json.dumps(content, indent=1) + "\n").encode() for path, content in files.items()})


def fingerprint_of(material: Material) -> str:
    """Of the names and labels of all images or clips: a checkpoint counts batches of these, in their order."""
    digest = hashlib.sha256(json.dumps(material.data.train.classes).encode())
    for part in (material.data.train, material.data.val):
        spans = part.spans if isinstance(part, LabelledClips) and part.spans else [None] * len(part.files)
        for source, label, span in zip(part.files, part.labels, spans):
            place = material.names(source) + (f" {span}" if span else "")
            digest.update(f"{place}\0{label}\n".encode(errors="surrogateescape"))
        digest.update(b"\n")
    return digest.hexdigest()
