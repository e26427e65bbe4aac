"""`tokenlearner compress`: a trained model made cheaper by a TokenLearner, taught by what it was before.

The model is scored, gets a TokenLearner, is trained towards itself as it was, and is scored again on the same images;
both are timed side by side. Everything on the way is a folder that ``save`` wrote, so each step can be looked at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenlearner.data.class_names import published_labels, read_as
from tokenlearner.data.clip_sources import Listing
from tokenlearner.data.images import OnError, damaged_entries
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import evaluate, needed_preprocessing
from tokenlearner.evaluation.multilabel import evaluate_multilabel
from tokenlearner.insertion.insert import insertion_of
from tokenlearner.insertion.saving import CONFIG, load, save
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.models.opening import is_of_timm, open_trained
from tokenlearner.training.budget import check_budget, within_budget
from tokenlearner.training.build import inserted_copy, refuse_inserted
from tokenlearner.training.fit import Fitted, Processes
from tokenlearner.training.foreign import model_of_checkpoint
from tokenlearner.training.material import Material, prepared, read_material
from tokenlearner.training.recipe import Recipe, check_recipe
from tokenlearner.training.side_by_side import results_of
from tokenlearner.training.train import RECIPE, SUMMARY, Ready, check_output, fit_ready, recipe_of_run
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
    check_budget(recipe, macs, latency)
    refuse_host_settings(recipe)
    is_first, going_on = Processes.of_torchrun().rank == 0, resume and (output / RECIPE).is_file()
    if is_first:
        check_output(output, data, model, resume=resume)
    if resume:
        recipe = recipe_of_run(output, recipe)
    if going_on:
        macs = latency = None  # what was chosen for them stays
    check_recipe(recipe := replace(recipe, model=None, init=None))
    before, source = stand_alone(model, output / HOST, host, resume=going_on)
    refuse_inserted(before, model)
    size = needed_preprocessing(before).model_input
    student = inserted_copy(before, recipe, model)  # refused now, not after a budget was measured or the model scored
    if macs is not None or latency is not None:
        recipe = within_budget(before, recipe, size, macs=macs, latency=latency)
        student = inserted_copy(before, recipe, model)
    refuse_dearer(student, before, size)
    if unlabelled or not getattr(before, "num_classes", 0):
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
    labels, material = known_classes(before, model, lambda classes: read_material(Path(data), recipe, listing, classes))
    before.preprocessing = rate = prepared(needed_preprocessing(before), before, recipe, material)
    scored, by_chance = score(before, material, on_error, recipe.workers)
    log(f"{model}: {scored:.2%} on {len(material.data.val):,} held-out {material.noun}")
    refuse_chance(scored, by_chance, material, model)
    spec: Any = insertion_of(student)
    log(f"{spec.describe()}; {recipe.epochs} epochs with the model as teacher")
    wanted = replace(recipe, init=str(source), distill=replace(recipe.distill, teacher=str(source)))
    task = Ready(student, rate, material, labels, teacher=before)
    fitted, val_set = fit_ready(task, wanted, output, on_error=on_error, resume=going_on)
    if not is_first:  # which writes
        return {}
    after = load(output)
    metric = "mean average precision" if material.multilabel else "accuracy"
    rows = {
        "host": Fitted(scored, 0.0, [], (), metric),
        "tokenlearner": replace(fitted, accuracy=score(after, material, on_error, recipe.workers)[0]),
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


def stand_alone(model: str, folder: Path, host: str | None, *, resume: bool = False) -> tuple[Any, Path]:
    """``model``, and the folder it is in: its own if it can be loaded from there, else ``folder``, where it is saved.

    Of several processes the first one saves it.
    """
    path = Path(model)
    if host is not None and not path.is_file():
        raise InputError(f"--host says whose weights a checkpoint file holds, and {model} is no file: leave it out")
    if path.is_dir() and not is_of_timm(path):
        return load(path), path
    if resume and (folder / CONFIG).is_file():
        return load(folder), folder
    if path.is_file() and host is None:
        raise InputError(f"{model} is a checkpoint: say whose with --host, such as --host vit_base_patch16_224")
    found: Any = open_trained(model) if host is None else model_of_checkpoint(path, host)
    labels = getattr(found, "label_names", None) or published_labels(getattr(found, "num_classes", 0))
    found.label_names = tuple(labels) if labels else None
    if Processes.of_torchrun().rank == 0:
        save(found, folder, labels=labels)
    return found, folder


def refuse_host_settings(recipe: Recipe) -> None:
    """``InputError`` for what a recipe says of the model, which is there already."""
    of_host = {"model": recipe.model, "init": recipe.init, "pretrained": recipe.pretrained or None}
    of_host |= {f"clip.{name}": getattr(recipe.clip, name) for name in ("frames", "tubelet", "module")}
    of_host["distill.teacher"] = recipe.distill.teacher
    if given := [name for name, value in of_host.items() if value is not None]:
        raise InputError(f"the model is MODEL, as it is: leave {', '.join(given)} out of the recipe")


def refuse_dearer(student: nn.Module, before: nn.Module, size: tuple[int, ...]) -> None:
    """``InputError`` where the TokenLearner makes the model more expensive: on few patches."""
    share = cost(student, size).macs / (whole := cost(before, size)).macs
    if share >= 1:
        spec: Any = insertion_of(student)
        raise InputError(
            f"{spec.describe()} take {share:.2f} times the multiply-adds of the model, whose layers see "
            f"{min(whole.tokens)} tokens: give fewer --tokens"
        )


def score(model: nn.Module, material: Material, on_error: OnError, workers: int) -> tuple[float, float]:
    """Top-1, or mean average precision of multi-label data, on the held-out part, and what chance would have given.

    Chance deals the model's own predictions out to the images at random; for the precision, three deviations above the
    mean of ten times.
    """
    val: Any = material.data.val
    if material.multilabel:
        found = evaluate_multilabel(model, val, on_error=on_error, workers=workers, views=(1, 1), shuffles=10)
        dealt = torch.tensor(found.by_chance)
        return found.mean_average_precision, float(dealt.mean() + 3 * dealt.std())
    accuracy = evaluate(model, val, on_error=on_error, workers=workers, views=(1, 1))
    assert accuracy.by_chance is not None
    return accuracy.top1, accuracy.by_chance


def refuse_chance(scored: float, by_chance: float, material: Material, name: str) -> None:
    """``InputError`` where guessing, as often of each class as the model does, scores as high in one of a hundred cases
    or more.
    """
    count = len(material.data.val)
    hits = round(scored * count)
    as_likely = scored <= by_chance if material.multilabel else at_least(hits, count, by_chance) >= 0.01
    if as_likely and scored < 1:
        raise InputError(
            f"{name} scores {scored:.2%} on {count:,} held-out {material.noun}, where guessing gives {by_chance:.2%}: "
            "its labels are not these classes in this order, its inputs are prepared differently, or its weights not "
            "loaded"
        )


def at_least(hits: int, count: int, chance: float) -> float:
    """How likely ``hits`` or more of ``count`` are, each of probability ``chance`` (binomial distribution)."""
    if chance <= 0:
        return float(hits <= 0)
    k = torch.arange(hits, count + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float((ways + k * math.log(chance) + (n - k) * math.log1p(-chance)).logsumexp(0).exp())
