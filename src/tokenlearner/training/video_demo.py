"""`tokenlearner demo --video`: clips whose label is the order of their frames, for three small models.

A ViViT, the same with eight learned tokens in every slice from half depth on, and an image ViT whose features are
averaged over the frames, which can only guess.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn

from tokenlearner.data import moving_digits
from tokenlearner.data.write_video import write_video
from tokenlearner.insertion.insert import attention_maps, insert
from tokenlearner.insertion.saving import Preprocessing, save
from tokenlearner.inspection.maps import draw_sheet, overlay, picture_of
from tokenlearner.inspection.report import Look, write_report
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.inspection.summary import hardware, write_summary
from tokenlearner.models.frame_average import FrameAverageViT
from tokenlearner.models.vivit import ViViT
from tokenlearner.training.fit import result_of
from tokenlearner.training.looks import caption
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
INPUT = (1, moving_digits.FRAMES, moving_digits.SIDE, moving_digits.SIDE)
PREPROCESSING = Preprocessing(
    (1, moving_digits.SIDE, moving_digits.SIDE), (moving_digits.MEAN,), (moving_digits.STD,), "bilinear", 1.0
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
    slices, h, w = model.patch_embed.grid_size
    waves = torch.exp(torch.arange(0, WIDTH, 2) / WIDTH * -math.log(100.0))
    angles = torch.arange(slices)[:, None] * waves
    when, where = torch.cat([angles.sin(), angles.cos()], dim=1), build_sincos2d_pos_embed([h, w], WIDTH)
    with torch.no_grad():
        cast(nn.Parameter, model.pos_embed).copy_(rearrange(when[:, None] + where, "t n d -> 1 (t n) d"))
    return model


def frame_average() -> FrameAverageViT:
    model = FrameAverageViT(fc_norm=False, **SIZE, **SHAPE)
    with torch.no_grad():
        grid = list(model.patch_embed.grid_size)
        cast(nn.Parameter, model.pos_embed).copy_(build_sincos2d_pos_embed(grid, WIDTH)[None])
    return model


def video_demo(
    output: Path = Path("runs/demo-video"),
    *,
    epochs: int | None = None,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Trains the three models on moving digits, measures them, and writes report, summary, maps and models.

    Returns the summary; ``log`` gets a line before each model is trained.
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

    def keep(model: nn.Module, folder: Path) -> None:
        if not isinstance(model, FrameAverageViT):  # a baseline, and none that save knows
            save(model, folder, preprocessing=PREPROCESSING, labels=moving_digits.CLASSES)

    models, fits = fit_each(
        builders,
        data.train,
        data.test,
        recipe,
        output,
        num_classes=len(moving_digits.CLASSES),
        input_size=INPUT,
        keep=keep,
        log=log,
    )
    clips = torch.stack([data.test[i][0] for i in range(32)])
    speeds = {s.name: s for s in measure_speed(models, clips)}
    results = [result_of(name, model, fits[name], speeds[name], INPUT) for name, model in models.items()]
    looks = _looks(models["tokenlearner"], data.test, output / "maps")
    seconds = time.perf_counter() - start
    write_report(
        output / "report.html",
        "Order in time, in eight tokens a slice",
        f"The same recipe and seed on clips of {moving_digits.FRAMES} frames, in which a digit hops around a ring in "
        f"one of {len(moving_digits.CLASSES)} orders; scored on {len(data.test)} clips of digits not seen in training. "
        "Whoever averages over the frames can only guess.",
        results,
        looks,
        f"tokenlearner demo --video, seed {seed}, {recipe.epochs} epochs, {seconds:.0f} s in all on {hardware()}. "
        f"Speed: forward passes of {speeds['plain'].batch_size} clips, median of {speeds['plain'].rounds} alternated "
        "rounds.",
    )
    return write_summary(
        output / "summary.json", seconds, results, data="moving digits", held_out=len(data.test), seed=seed
    )


@torch.inference_mode()
def _looks(model: nn.Module, clips: moving_digits.Clips, folder: Path, shown: int = 2) -> list[Look]:
    """Sheet and mp4 of a few clips, in ``folder``; a look for every slice of the first."""
    looks: list[Look] = []
    for index in range(0, len(clips), max(1, len(clips) // shown))[:shown]:
        clip, label, _ = clips[index]
        maps = next(iter(attention_maps(model, clip[None]).values()))[0]  # (slices, s, h, w)
        said, true = moving_digits.CLASSES[int(model(clip[None]).argmax())], moving_digits.CLASSES[label]
        frames = [picture_of(frame, PREPROCESSING) for frame in rearrange(clip, "c t h w -> t c h w")]
        step = len(frames) // len(maps)
        of_frame = maps.repeat_interleave(step, dim=0)
        name = true.replace(" ", "-")
        titles = [f"frame {t + 1}" for t in range(len(frames))]
        draw_sheet(frames, of_frame, folder / f"{name}.png", titles)
        write_video(overlaid(frames, of_frame), folder / f"{name}.mp4", fps=4)
        looks += [
            Look(frames[t], f"{caption(said, true)}, frame {t + 1}", [overlay(frames[t], a) for a in of_frame[t]])
            for t in range(0, len(frames), step)
        ]
    return looks


def overlaid(frames: Sequence[Image.Image], maps: Float[Tensor, "t s h w"]) -> list[Image.Image]:
    """Each frame beside its maps, in one row."""
    rows = []
    for frame, of_frame in zip(frames, maps):
        parts = [frame, *(overlay(frame, a) for a in of_frame)]
        row = Image.new("RGB", (frame.width * len(parts), frame.height))
        for i, part in enumerate(parts):
            row.paste(part, (i * frame.width, 0))
        rows.append(row)
    return rows
