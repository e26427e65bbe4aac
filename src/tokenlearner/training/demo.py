"""The main job: the same small ViT twice on handwritten digits, plain and with eight learned tokens at half depth."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner.data import digits
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.saving import save
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.training.fit import result_of
from tokenlearner.training.looks import looks_at, one_of_each
from tokenlearner.training.recipe import OptimizerRecipe, Recipe, check_recipe
from tokenlearner.training.side_by_side import fit_each

RECIPE = Recipe(
    model="ViT 64 wide, 4 layers, 12×12 pixels in patches of 2",
    tokens=8,
    at=0.5,
    epochs=40,
    batch_size=32,
    label_smoothing=0.1,
    ema=0.995,
    held_out=0.25,
    workers=0,
    optimizer=OptimizerRecipe("muon", lr=4e-3, warmup_epochs=3),
)


def host() -> VisionTransformer:
    """A small ViT as in the official image models: no class token, average pooling.

    Its position embedding starts as sines and cosines: with 1,347 images to learn from, learning where the patches
    lie from scratch takes most of the training.
    """
    model = VisionTransformer(
        img_size=12,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
        class_token=False,
        global_pool="avg",
    )
    with torch.no_grad():
        cast(nn.Parameter, model.pos_embed).copy_(build_sincos2d_pos_embed([6, 6], 64)[None])
    return model


def demo(
    output: Path = Path("runs/demo"),
    *,
    epochs: int | None = None,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains both models on scikit-learn's digits, measures them and writes report, summary and models to ``output``.

    Returns the summary; ``log`` gets a line before each model is trained.
    """
    start = time.perf_counter()
    recipe = replace(RECIPE, seed=seed, epochs=RECIPE.epochs if epochs is None else epochs)
    check_recipe(recipe)
    data, size = digits.load(recipe.held_out), digits.PREPROCESSING.input_size
    models, fits = fit_each(
        {"plain": host, "tokenlearner": lambda: insert(host(), recipe.tokens, recipe.at, recipe.kind)},
        data.train,
        data.test,
        recipe,
        output,
        num_classes=len(digits.CLASSES),
        input_size=size,
        keep=functools.partial(save, preprocessing=digits.PREPROCESSING, labels=digits.CLASSES),
        log=log,
    )
    speeds = {s.name: s for s in measure_speed(models, data.test.images[:64])}
    results = [result_of(name, model, fits[name], speeds[name], size) for name, model in models.items()]
    shown = one_of_each(data.test.labels)
    _save_pictures(data, shown, output / "pictures")
    looks = looks_at(
        models["tokenlearner"], data.test.images[shown], data.test.labels[shown], digits.PREPROCESSING, digits.CLASSES
    )
    seconds = time.perf_counter() - start
    write_report(
        output / "report.html",
        "What eight tokens bought",
        f"The same small ViT, recipe and seed, on {len(data.train):,} handwritten digits, scored on {len(data.test)} "
        f"others. From layer 3 of 4 on, the second model runs on 8 learned tokens instead of 36.",
        results,
        looks,
        f"tokenlearner demo, seed {seed}, {recipe.epochs} epochs, {seconds:.0f} s in all on {hardware()}. Speed: "
        f"forward passes of {speeds['plain'].batch_size} images, median of {speeds['plain'].rounds} alternated rounds.",
    )
    return write_summary(
        output / "summary.json", seconds, results, data="sklearn digits", held_out=len(data.test), seed=seed
    )


def _save_pictures(data: digits.Digits, shown: list[int], folder: Path) -> None:
    """The pictures the report shows, as files for `tokenlearner predict` and `maps` to try."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in shown:
        data.test_pictures[index].save(folder / f"digit-{int(data.test.labels[index])}.png")
