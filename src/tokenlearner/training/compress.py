"""`tokenlearner compress`: a trained model made cheaper by a TokenLearner, taught by what it was before.

The model is scored, gets a TokenLearner, is trained towards itself as it was, and is scored again on the same images;
both are timed side by side. Everything on the way is a folder that ``save`` wrote, so each step can be looked at.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenlearner.data.clip_sources import Listing
from tokenlearner.data.images import OnError, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import evaluate, needed_preprocessing
from tokenlearner.evaluation.multilabel import evaluate_multilabel
from tokenlearner.insertion.hosting import bare_on_meta
from tokenlearner.insertion.hosts import host_of
from tokenlearner.insertion.insert import insert, insertion_of
from tokenlearner.insertion.saving import load, save
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.models.opening import open_trained
from tokenlearner.training.build import inserted_copy, insertion_arguments, refuse_inserted
from tokenlearner.training.class_names import published_labels, read_as
from tokenlearner.training.fit import Fitted, Processes
from tokenlearner.training.foreign import model_of_checkpoint
from tokenlearner.training.material import Material, prepared, read_material
from tokenlearner.training.recipe import Recipe, check_recipe
from tokenlearner.training.side_by_side import results_of
from tokenlearner.training.train import RECIPE, SUMMARY, Ready, fit_ready, recipe_of_run, refuse_unfinished
from tokenlearner.training.unlabelled import compress_unlabelled

HOST = "host"  # the folder in the output where the model stands as it was


def compress(
    model: str,
    data: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    host: str | None = None,
    macs: float | None = None,
    latency: float | None = None,
    unlabelled: bool = False,
    on_error: OnError = "skip",
    resume: bool = False,
    listing: Listing | None = None,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Puts a TokenLearner into a trained model, trains it with the model as teacher, and returns the summary.

    Writes to ``output`` what ``train`` writes, the model as it was in ``output/host``, and one summary and report of
    both side by side.

    Args:
        model: A folder ``save`` wrote, a name timm or this package has weights of, or a checkpoint of ``host``.
        data: What ``train`` takes, with classes that the model knows, all or some of them, by about the names it has.
            If it names none, as many as it has outputs, in the order ``train`` reads them in.
        output: A new folder.
        recipe: What is inserted and how it is trained, best a ``CompressRecipe``; ``model``, ``init`` and the teacher
            are set here.
        host: timm's name of the model whose weights a checkpoint file holds.
        macs, latency: Share of the model's MACs, or of its time for one input on this machine, that the result may
            take: see :func:`within_budget`.
        unlabelled: Train towards the model's features alone, on pictures without labels, as is done in any case with a
            model that has no head: see :func:`compress_unlabelled`.
        resume: Go on with a run that was stopped.
        log: Gets a line for every step.

    Raises:
        InputError: No such model, or one that scores near chance on ``data``, one that has a TokenLearner already, or
            a budget that no layer keeps to.
    """
    start, output = time.perf_counter(), Path(output)
    if macs is not None and latency is not None:
        raise InputError("--macs and --latency both choose the layer: give one of them")
    going_on = resume and (output / RECIPE).is_file()
    if going_on:
        recipe, macs, latency = recipe_of_run(output, recipe), None, None  # what was chosen for a budget stays
    elif Processes.of_torchrun().rank == 0:
        refuse_unfinished(output)
    check_recipe(recipe := replace(recipe, model=None, init=None))
    source = stand_alone(model, output / HOST, host)
    before: Any = load(source)
    refuse_inserted(before, model)
    if unlabelled or not getattr(before, "num_classes", 0):
        size = needed_preprocessing(before).model_input
        recipe = within_budget(before, recipe, size, macs=macs, latency=latency)
        return compress_unlabelled(
            before,
            data,
            output,
            replace(recipe, init=str(source)),
            name=Path(model).name,
            on_error=on_error,
            resume=resume,
            log=log,
        )
    student = inserted_copy(before, recipe, model)  # refused now, not after the model was scored
    labels, material = known_classes(before, model, lambda classes: read_material(Path(data), recipe, listing, classes))
    before.preprocessing = rate = prepared(needed_preprocessing(before), before, recipe, material)
    scored = score(before, material, on_error, recipe.workers)
    log(f"{model}: {scored:.2%} on {len(material.data.val):,} held-out {material.noun}")
    refuse_chance(scored, material, model)
    if macs is not None or latency is not None:
        recipe = within_budget(before, recipe, rate.model_input, macs=macs, latency=latency)
        student = inserted_copy(before, recipe, model)
    spec: Any = insertion_of(student)
    log(f"{spec.describe()}; {recipe.epochs} epochs with the model as teacher")
    wanted = replace(recipe, init=str(source), distill=replace(recipe.distill, teacher=str(source)))
    task = Ready(student, rate, material, labels, teacher=before)
    fitted, val_set = fit_ready(task, wanted, output, on_error=on_error, resume=going_on)
    if Processes.of_torchrun().rank:  # the first one writes
        return {}
    after = load(output)
    metric = "mean average precision" if material.multilabel else "accuracy"
    rows = {
        "host": Fitted(scored, 0.0, [], (), metric),
        "tokenlearner": replace(fitted, accuracy=score(after, material, on_error, recipe.workers)),
    }
    batch = torch.randn(min(16, recipe.batch_size), *rate.model_input)
    results = results_of({"host": before, "tokenlearner": after}, rows, batch)
    has_maps = spec.kind != "average"
    looks = material.looks(after, val_set, rate, output / "maps") if has_maps else {}
    seconds = time.perf_counter() - start
    write_report(
        output / "report.html",
        f"{Path(model).name}, compressed",
        f"{spec.describe()}, trained for {recipe.epochs} epochs towards the model as it was; both scored on the same "
        f"{len(material.data.val):,} held-out {material.noun}.",
        results,
        footer=f"tokenlearner compress, seed {recipe.seed}, {seconds:.0f} s on {hardware()}.",
        **looks,
    )
    return write_summary(
        output / SUMMARY,
        seconds,
        results,
        data=str(data),
        held_out=len(material.data.val),
        model=model,
        insertion=spec.to_dict(),
        epochs=recipe.epochs,
        seed=recipe.seed,
        damaged=damaged_entries(fitted.damaged),
    )


def known_classes(
    model: nn.Module, name: str, read: Callable[[Sequence[str] | None], Material]
) -> tuple[Sequence[str], Material]:
    """The names of the model's outputs, and the data with its classes in their order.

    Raises:
        InputError: The model names no labels and has not as many outputs as there are classes, or the data have others.
    """
    labels: Any = getattr(model, "label_names", None)
    if labels is not None:
        return labels, read_as(labels, read, lambda it: it.data.train.classes)
    material = read(None)
    classes, outputs = material.data.train.classes, model.num_classes
    if len(classes) != outputs:
        raise InputError(
            f"{name} names no labels, and its {outputs} outputs can't be the {len(classes)} classes of DATA: save it "
            "with save(model, folder, labels=[…]), or train towards its features alone, with --unlabelled"
        )
    return classes, material


def stand_alone(model: str, folder: Path, host: str | None) -> Path:
    """The folder of ``model``: its own if ``save`` wrote it, else ``folder``, where it is saved."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.is_file():
        if host is None:
            raise InputError(f"{model} is a checkpoint: say whose with --host, such as --host vit_base_patch16_224")
        found = model_of_checkpoint(path, host)
    else:
        found = open_trained(model)
    names = getattr(found, "label_names", None)
    return save(found, folder, labels=names or published_labels(getattr(found, "num_classes", 0)))


def score(model: nn.Module, material: Material, on_error: OnError, workers: int) -> float:
    """Top-1, or mean average precision of multi-label data, on the held-out part."""
    val: Any = material.data.val
    if material.multilabel:
        return evaluate_multilabel(model, val, on_error=on_error, workers=workers, views=(1, 1)).mean_average_precision
    return evaluate(model, val, on_error=on_error, workers=workers, views=(1, 1)).top1


def refuse_chance(scored: float, material: Material, name: str) -> None:
    """``InputError`` where guessing gets a single-label score as high in one of a hundred cases or more."""
    if material.multilabel:
        return
    chance, count = 1 / len(material.data.train.classes), len(material.data.val)
    hits = round(scored * count)
    if hits < count and at_least(hits, count, chance) >= 0.01:
        raise InputError(
            f"{name} scores {scored:.2%} on {count:,} held-out {material.noun}, where guessing gives {chance:.2%}: its "
            "labels are not these classes in this order, its inputs are prepared differently, or its weights not loaded"
        )


def at_least(hits: int, count: int, chance: float) -> float:
    """How likely ``hits`` or more of ``count`` are, each of probability ``chance`` (binomial distribution)."""
    k = torch.arange(hits, count + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((ways + k * math.log(chance) + (n - k) * math.log1p(-chance)).logsumexp(0).exp())


def within_budget(
    model: nn.Module,
    recipe: Recipe,
    size: tuple[int, ...],
    *,
    macs: float | None = None,
    latency: float | None = None,
) -> Recipe:
    """``recipe`` with the place and the number of tokens for a share of the host's MACs, or of its time for one input;
    as it is where neither is given.

    The last layer before which ``recipe.tokens`` tokens keep to it, then as many tokens, doubled again and again, as
    still do there: later layers see more of the picture, and what is left of the budget goes to more tokens.

    Raises:
        InputError: No layer is early enough; says what the earliest comes to.
    """
    wanted = macs if latency is None else latency
    if wanted is None:
        return recipe
    if not 0 < wanted < 1:
        raise InputError(f"a budget is a share of the model's own cost, above 0 and below 1, not {wanted}")
    depth = len(host_of(model).layers())
    whole = cost(model, size)

    def share(at: int, tokens: int) -> float:
        arguments = {**insertion_arguments(recipe), "num_tokens": tokens, "at": at}
        if latency is None:
            with torch.device("meta"):
                return cost(insert(bare_on_meta(model), **arguments), size).macs / whole.macs
        twin = insert(copy.deepcopy(model), **arguments)
        speeds = measure_speed({"host": model, "it": twin}, torch.randn(1, *size), rounds=5)
        return 1 / speeds[1].ratio

    low, high, tokens = 0, depth, recipe.tokens  # shares grow with at
    if (least := share(0, tokens)) > wanted:
        what = "MACs" if latency is None else "time"
        raise InputError(f"{tokens} tokens from the first layer on still take {least:.2f} of the {what}, not {wanted}")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(middle, tokens) <= wanted else (low, middle - 1)
    while 2 * tokens < min(whole.tokens) and share(low, 2 * tokens) <= wanted:
        tokens *= 2
    return replace(recipe, at=low, tokens=tokens)
