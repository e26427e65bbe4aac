"""`tokenlearner demo --video`: clips whose label is the order of their frames, for three small models.

A ViViT, the same with eight learned tokens in every slice from half depth on, and an image ViT whose features are
averaged over the frames, which can only guess.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import nn

from tokenlearner.data import moving_digits
from tokenlearner.data.write_video import write_video
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.saving import Preprocessing, save
from tokenlearner.inspection.report import write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.models.frame_average import FrameAverageViT
from tokenlearner.models.vivit import ViViT, sincos_pos_embed
from tokenlearner.training.fit import result_of
from tokenlearner.training.looks import film_looks, one_of_each
from tokenlearner.training.recipe import OptimizerRecipe, Recipe, check_recipe
from tokenlearner.training.side_by_side import fit_each

WIDTH = 64
SIZE: dict[str, Any] = {
    "img_size": moving_digits.SIDE,
    "patch_size": 4,
    "in_chans": 1,
    "num_classes": len(moving_digits.CLASSES),
}
SHAPE: dict[str, Any] = {"embed_dim": WIDTH, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg"}
FPS = 4.0  # slow enough to follow the digit with the eye
INPUT = (1, moving_digits.FRAMES, moving_digits.SIDE, moving_digits.SIDE)
PREPROCESSING = Preprocessing(
    (1, moving_digits.SIDE, moving_digits.SIDE),
    (moving_digits.MEAN,),
    (moving_digits.STD,),
    "bilinear",
    1.0,
    frames=moving_digits.FRAMES,
    fps=FPS,
)
CLIPS = 1024  # an epoch, each drawn anew
RECIPE = Recipe(
    model="ViViT 64 wide, 4 layers, 8 frames of 20×20 pixels in tubelets of 2×4×4",
    tokens=8,
    at=0.5,
    epochs=24,
    batch_size=32,
    ema=0.99,
    held_out=0.25,
    workers=0,
    optimizer=OptimizerRecipe("muon", lr=5e-3, warmup_epochs=1),
)


def vivit() -> ViViT:
    """Its position embedding starts as sines and cosines of place, plus those of time."""
    model = ViViT(num_frames=moving_digits.FRAMES, tubelet_size=2, **SIZE, **SHAPE)
    with torch.no_grad():
        cast(nn.Parameter, model.pos_embed).copy_(sincos_pos_embed(model.patch_embed.grid_size, WIDTH))
    return model


def frame_average() -> FrameAverageViT:
    model = FrameAverageViT(fc_norm=False, **SIZE, **SHAPE)
    with torch.no_grad():
        cast(nn.Parameter, model.pos_embed).copy_(sincos_pos_embed((1, *model.patch_embed.grid_size), WIDTH))
    return model


def video_demo(
    output: Path = Path("runs/demo-video"),
    *,
    epochs: int | None = None,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains the three models on moving digits, measures them, and writes report, summary, maps, clips and models.

    Args:
        output: Folder for what is written.
        epochs: How many to train; the recipe's when None.
        seed: Of all random numbers.
        log: Gets a line before each model is trained.

    Returns the summary.
    """
    start = time.perf_counter()
    recipe = replace(RECIPE, seed=seed, epochs=RECIPE.epochs if epochs is None else epochs)
    check_recipe(recipe)
    data = moving_digits.load(CLIPS, recipe.held_out)
    builders: dict[str, Callable[[], nn.Module]] = {
        "plain": vivit,
        "tokenlearner": lambda: insert(vivit(), recipe.tokens, recipe.at, recipe.kind),
        "frame_average": frame_average,
    }

    models, fits = fit_each(
        builders,
        data.train,
        data.test,
        recipe,
        output,
        num_classes=len(moving_digits.CLASSES),
        input_size=INPUT,
        keep=functools.partial(save, preprocessing=PREPROCESSING, labels=moving_digits.CLASSES),
        log=log,
    )
    clips = torch.stack([data.test[i][0] for i in range(32)])
    speeds = {s.name: s for s in measure_speed(models, clips)}
    results = [result_of(name, model, fits[name], speeds[name], INPUT) for name, model in models.items()]
    shown = one_of_each(data.test.labels)
    _save_clips(data.test, shown, output / "clips")
    filmed = shown[::2]
    films = film_looks(
        models["tokenlearner"],
        torch.stack([data.test[i][0] for i in filmed]),
        data.test.labels[filmed],
        PREPROCESSING,
        moving_digits.CLASSES,
        output / "maps",
    )
    seconds = time.perf_counter() - start
    write_report(
        output / "report.html",
        "Order in time, in eight tokens a slice",
        f"The same recipe and seed on clips of {moving_digits.FRAMES} frames, in which a digit hops around a ring in "
        f"one of {len(moving_digits.CLASSES)} orders; scored on {len(data.test)} clips of digits not seen in training. "
        "Whoever averages over the frames can only guess.",
        results,
        footer=f"tokenlearner demo --video, seed {seed}, {recipe.epochs} epochs, {seconds:.0f} s in all on "
        f"{hardware()}. Speed: forward passes of {speeds['plain'].batch_size} clips, median of "
        f"{speeds['plain'].rounds} alternated rounds.",
        films=films,
    )
    return write_summary(
        output / "summary.json", seconds, results, data="moving digits", held_out=len(data.test), seed=seed
    )


def _save_clips(clips: moving_digits.Clips, shown: list[int], folder: Path) -> None:
    """Clips no model was trained on, as files for `tokenlearner predict` and `maps` to try."""
    for index in shown:
        clip, label, _ = clips[index]
        pixels = (clip[0] * moving_digits.STD + moving_digits.MEAN).clamp(0, 1).mul(255).round().byte()
        frames = [Image.fromarray(frame) for frame in pixels.numpy()]
        write_video(frames, folder / f"{moving_digits.CLASSES[label]}.mp4", FPS)
