"""Several models by one recipe and seed, for runs that compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.utils.data import Dataset

from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import ModelResult
from tokenlearner.training.fit import Fitted, fit, result_of
from tokenlearner.training.recipe import Recipe


def fit_each(
    builders: Mapping[str, Callable[[], nn.Module]],
    train_set: Dataset[Any],
    val_set: Dataset[Any],
    recipe: Recipe,
    output: Path,
    *,
    num_classes: int,
    input_size: tuple[int, ...],
    keep: Callable[[nn.Module, Path], object],
    log: Callable[[str], object],
) -> tuple[dict[str, nn.Module], dict[str, Fitted]]:
    """Builds, trains and keeps each model in ``output/name``, all from one seed; the models and what became of them.

    ``log`` gets a line with the cost before each is trained; ``keep`` gets the model and its folder after it.
    """
    models: dict[str, nn.Module] = {}
    fits: dict[str, Fitted] = {}
    for name, build in builders.items():
        L.seed_everything(recipe.seed, workers=True, verbose=False)
        models[name] = build()
        log(f"{name}: {cost(models[name], input_size)}")
        fits[name] = fit(models[name], train_set, val_set, recipe, output / name, num_classes=num_classes)
        keep(models[name], output / name)
    return models, fits


def results_of(models: Mapping[str, nn.Module], fitted: Mapping[str, Fitted], batch: Tensor) -> list[ModelResult]:
    """A row for each of the ``models``, as they were ``fitted``, timed in turns on ``batch``."""
    size = tuple(batch.shape[1:])
    return [
        result_of(speed.name, models[speed.name], fitted[speed.name], speed, size)
        for speed in measure_speed(models, batch, rounds=9)
    ]
