"""`tokenlearner compress`: a trained model made cheaper by a TokenLearner, taught by what it was before.

The model is scored, gets a TokenLearner, is trained towards itself as it was, and is scored again on the same images;
both are timed side by side. Everything on the way is a folder that ``save`` wrote, so each step can be looked at.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm.data
import torch
from torch import nn

from tokenlearner.data.clip_sources import Listing
from tokenlearner.data.images import OnError
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import evaluate, needed_preprocessing
from tokenlearner.evaluation.multilabel import evaluate_multilabel
from tokenlearner.insertion.hosting import bare_on_meta
from tokenlearner.insertion.insert import insert, insertion_of
from tokenlearner.insertion.saving import load, save
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.models.opening import open_trained
from tokenlearner.training.build import insertion_arguments
from tokenlearner.training.fit import Fitted, result_of
from tokenlearner.training.foreign import model_of_checkpoint
from tokenlearner.training.material import Material, prepared, read_material
from tokenlearner.training.recipe import Recipe, check_recipe
from tokenlearner.training.train import SUMMARY, train

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
        data: What ``train`` takes, with the classes of the model: folders named as its labels are.
        output: A new folder.
        recipe: What is inserted and how it is trained; ``model``, ``init`` and the teacher are set here.
        host: timm's name of the model whose weights a checkpoint file holds.
        macs, latency: Share of the model's MACs, or of its time for one input on this machine, that the result may
            take; ``recipe.at`` is then chosen: the last layer that keeps to it.
        resume: Go on with a run that was stopped.
        log: Gets a line for every step.

    Raises:
        InputError: No such model, or one that scores near chance on ``data``, one that has a TokenLearner already, or
            a budget that no layer keeps to.
    """
    start, output = time.perf_counter(), Path(output)
    if macs is not None and latency is not None:
        raise InputError("--macs and --latency both choose the layer: give one of them")
    check_recipe(recipe)
    source = stand_alone(model, output / HOST, host)
    before = load(source)
    if (inside := insertion_of(before)) is not None:
        raise InputError(f"{model} already has {inside.describe()}; give the model it was made of")
    material = read_material(Path(data), recipe, listing, labels_of(before, model))
    rate = prepared(needed_preprocessing(before), before, recipe, material)
    before.preprocessing = rate  # type: ignore[assignment]
    scored = score(before, material, on_error)
    log(f"{model}: {scored:.2%} on {len(material.data.val):,} held-out {material.noun}")
    refuse_chance(scored, material, model)
    if macs is not None or latency is not None:
        recipe = replace(recipe, at=place_for(before, recipe, rate.model_input, macs=macs, latency=latency))
    wanted = replace(recipe, model=None, init=str(source), distill=replace(recipe.distill, teacher=str(source)))
    log(f"{recipe.tokens} tokens from layer {recipe.at} on, {recipe.epochs} epochs with the model as teacher")
    done = train(
        data, wanted, output, on_error=on_error, resume=resume, listing=listing, classes=material.data.train.classes
    )
    if not done:  # another process of several writes
        return {}
    after = load(output)
    after_score = score(after, material, on_error)
    models = {"host": before, "tokenlearner": after}
    batch = torch.randn(min(16, recipe.batch_size), *rate.model_input)
    speeds = {speed.name: speed for speed in measure_speed(models, batch, rounds=9)}
    trained = {"host": (scored, 0.0), "tokenlearner": (after_score, done["models"][0]["train_seconds"])}
    metric = "mean average precision" if material.multilabel else "accuracy"
    results = [
        result_of(name, models[name], Fitted(accuracy, took, [], (), metric), speeds[name], rate.model_input)
        for name, (accuracy, took) in trained.items()
    ]
    seconds = time.perf_counter() - start
    spec: Any = insertion_of(after)
    write_report(
        output / "report.html",
        f"{Path(model).name}, compressed",
        f"{spec.describe()}, trained for {recipe.epochs} epochs towards the model as it was; both scored on the same "
        f"{len(material.data.val):,} held-out {material.noun}.",
        results,
        footer=f"tokenlearner compress, seed {recipe.seed}, {seconds:.0f} s on {hardware()}.",
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
        damaged=done["damaged"],
    )


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


def published_labels(outputs: int) -> list[str] | None:
    """The class folders' names of the ImageNet whose number of classes this is, in the order of timm's outputs."""
    subset = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog"}.get(
        outputs
    )
    return timm.data.ImageNetInfo(subset).label_names() if subset else None


def labels_of(model: nn.Module, name: str) -> Sequence[str]:
    """The classes of the model's outputs.

    Raises:
        InputError: It does not name them.
    """
    names: Any = getattr(model, "label_names", None)
    if names is None:
        raise InputError(
            f"{name} names no labels, so class folders can't be matched with its outputs: "
            "save it with save(model, folder, labels=[…])"
        )
    return names


def score(model: nn.Module, material: Material, on_error: OnError) -> float:
    """Top-1, or mean average precision of multi-label data, on the held-out part."""
    val: Any = material.data.val
    if material.multilabel:
        return evaluate_multilabel(model, val, on_error=on_error, views=(1, 1)).mean_average_precision
    return evaluate(model, val, on_error=on_error, views=(1, 1)).top1


def refuse_chance(scored: float, material: Material, name: str) -> None:
    """``InputError`` where a single-label score is not three standard errors above guessing."""
    if material.multilabel:
        return
    chance, count = 1 / len(material.data.train.classes), len(material.data.val)
    if scored < chance + 3 * (chance * (1 - chance) / count) ** 0.5:
        raise InputError(
            f"{name} scores {scored:.2%} on {count:,} held-out {material.noun}, where guessing gives {chance:.2%}: its "
            "labels are not these classes in this order, its inputs are prepared differently, or its weights not loaded"
        )


def place_for(
    model: nn.Module,
    recipe: Recipe,
    size: tuple[int, ...],
    *,
    macs: float | None = None,
    latency: float | None = None,
) -> int:
    """The last layer before which tokens can be learned so that the share of ``macs``, or of ``latency``, is kept to.

    Raises:
        InputError: No layer is early enough; says what the earliest comes to.
    """
    wanted = macs if latency is None else latency
    assert wanted is not None, "a budget is given"
    if not 0 < wanted < 1:
        raise InputError(f"a budget is a share of the model's own cost, above 0 and below 1, not {wanted}")
    depth = len(model.blocks)  # type: ignore[arg-type]
    whole = cost(model, size).macs
    arguments = insertion_arguments(recipe)

    def share(at: int) -> float:
        if latency is None:
            with torch.device("meta"):
                return cost(insert(bare_on_meta(model), **{**arguments, "at": at}), size).macs / whole
        twin = insert(copy.deepcopy(model), **{**arguments, "at": at})
        speeds = measure_speed({"host": model, "it": twin}, torch.randn(1, *size), rounds=5)
        return 1 / speeds[1].ratio

    low, high = 0, depth  # shares grow with at
    if (least := share(0)) > wanted:
        what = "MACs" if latency is None else "time"
        raise InputError(
            f"{recipe.tokens} tokens from the first layer on still take {least:.2f} of the {what}, not {wanted}"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(middle) <= wanted else (low, middle - 1)
    return low
