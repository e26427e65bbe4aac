"""Runs that look: where the maps of a model lie on UT-Interaction's clips, and how much of that moves.

Each of the seeds 0 to 9 takes one of set 2's ten sequences, six clips each. The camera stands still and people meet in
the middle, so a map that never changes can lie on them too: each token's mean over all frames stands in for its maps
where a variant says so, and only what goes beyond it follows anything. :mod:`tokenlearner.inspection.looking` defines
lift, the score, and the other measures.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import numpy as np
import timm
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenlearner.core.learner import TokenLearner
from tokenlearner.data.clips import ClipTransform, uniform_starts, window_times
from tokenlearner.data.videos import VideoSource, read_clip
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import attention_maps, learners
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection import looking
from tokenlearner.models.opening import open_trained
from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars, columns
from tokenlearner.study.interactions import interactions
from tokenlearner.study.study import Job, Study

SEQUENCES = range(11, 21)  # of set 2
TRAININGS = 3


@dataclass(frozen=True)
class Looker:
    """A variant: whose maps. A ``{seed}`` in the name of a folder stands for one of three trainings, taken in turn."""

    label: str
    model: str | None = None
    """Flat maps if None."""
    state: Literal["trained", "new", "untrained"] = "trained"
    """With "new" all but the TokenLearners is trained."""
    still: bool = False
    """Each token's mean map in place of its maps."""


@dataclass(frozen=True)
class Frames:
    """Settings: what of a clip is looked at."""

    frames: int = 8
    """Of a window, where the model doesn't say, as the next one."""
    fps: float = 2.5
    side: int = 64
    short_side: int = 72
    gap: float = 0.2
    """Seconds to the frames before and after that tell what moves."""
    windows: int = 1
    crops: int = 1
    least: float = 0.01
    """Share of a frame that has to move for the frame to count in the lift."""


class Seen(NamedTuple):
    """Frames of all windows, values from 0 to 1, and what of them moves."""

    pixels: Float[Tensor, "b t 3 height width"]
    moving: Bool[Tensor, "b t height width"]


@functools.lru_cache(maxsize=2)
def seen(data: Path, seed: int, settings: Frames) -> Seen:
    """The clips of a seed's sequence.

    Raises:
        InputError: There is no such sequence, or UT-Interaction is not there.
    """
    if seed >= len(SEQUENCES):
        raise InputError(f"there are {len(SEQUENCES)} sequences, for the seeds 0 to {len(SEQUENCES) - 1}, not {seed}")
    views = [
        part
        for file in interactions(data, "2", SEQUENCES[seed : seed + 1]).files
        for part in windows_of(file, settings)
    ]
    pixels, moving = zip(*views)
    return Seen(torch.stack(pixels), torch.stack(moving))


def windows_of(
    source: VideoSource, settings: Frames
) -> Iterator[tuple[Float[Tensor, "t 3 height width"], Bool[Tensor, "t height width"]]]:
    """Each window and crop of a clip: its frames, and where they differ from both ``gap`` earlier and later."""
    n = settings.frames

    def times(duration: float) -> list[float]:
        starts = uniform_starts(duration, n / settings.fps, settings.windows)
        shown = [time for start in starts for time in window_times(start, n, settings.fps)]
        return [max(0.0, time + gap) for gap in (-settings.gap, 0.0, settings.gap) for time in shown]

    pixels = read_clip(source, times, short_side=settings.short_side)
    transform = ClipTransform(settings.side, settings.short_side, mean=(0.0,) * 3, std=(1.0,) * 3)
    for k in range(settings.crops):
        along = k / (settings.crops - 1) if settings.crops > 1 else 0.5
        cropped = transform(pixels, transform.view(along))
        before, now, after = rearrange(cropped, "c (g v t) h w -> g v t c h w", g=3, t=n)
        yield from zip(now, looking.motion(before, now, after))


def look(job: Job) -> dict[str, Any]:
    """The measures of a job's maps, means over the TokenLearners of the model, clips, frames and tokens."""
    looker, settings = job.variant, job.settings
    if looker.model is None:
        shown = seen(job.data, job.seed, settings)
        maps = [torch.ones(*shown.pixels.shape[:2], 8, 4, 4)]
    else:
        model, prepared = model_of(looker, job.seed)
        if prepared.frames is not None and prepared.fps is not None:
            settings = replace(settings, frames=prepared.frames, fps=prepared.fps)
        shown = seen(job.data, job.seed, settings)
        maps = maps_of(model, prepared, shown.pixels)
    slices = maps[0].shape[1]  # of several frames each, in a ViViT
    moving = reduce(shown.moving.float(), "b (t k) h w -> b t h w", "mean", t=slices)
    parts = [measured(averaged(A) if looker.still else A, moving, settings.least) for A in maps]
    found = {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    return {
        **{name: round(value, 4) for name, value in found.items()},
        "learners": len(parts),
        "windows": len(moving),
        "frames_that_move": int((moving.mean(dim=(2, 3)) >= settings.least).sum()),
        "area_that_moves": round(float(moving.mean()), 4),
    }


def model_of(looker: Looker, seed: int) -> tuple[nn.Module, Preprocessing]:
    """The model in eval mode and how its frames are prepared.

    Raises:
        InputError: There is no such model.
    """
    name = str(looker.model).format(seed=seed % TRAININGS)
    model = open_trained(name)
    prepared = Preprocessing.of(model)
    assert prepared is not None
    L.seed_everything(seed, workers=True, verbose=False)
    if looker.state == "untrained":
        model = timm.create_model(name.split(".")[0]).eval()
    elif looker.state == "new":
        for learner in learners(model).values():
            new = TokenLearner(learner.dim, learner.num_tokens, learner.kind, learner.grid, pool=learner.pool)
            learner.load_state_dict(new.state_dict())
    return model, prepared


@torch.inference_mode()
def maps_of(
    model: nn.Module, prepared: Preprocessing, pixels: Float[Tensor, "b t 3 height width"]
) -> list[Float[Tensor, "b slices s h w"]]:
    """The maps of every TokenLearner; an image model sees frame by frame."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    frames, size = pixels.flatten(0, 1), prepared.input_size[1:]
    if tuple(frames.shape[2:]) != size:
        frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True)
    x = (frames - mean) / std
    if prepared.frames is None:
        found = {i: A.unflatten(0, pixels.shape[:2]) for i, A in attention_maps(model, x).items()}
    else:
        found = attention_maps(model, rearrange(x, "(b t) c h w -> b c t h w", b=len(pixels)))
    return [found[i] for i in sorted(found)]


def averaged(maps: Float[Tensor, "b t s h w"]) -> Float[Tensor, "b t s h w"]:
    """Each token's mean map, in place of its maps."""
    p = looking.distribution(maps).unflatten(-1, maps.shape[3:])
    return p.mean(dim=(0, 1)).expand_as(maps)


def measured(
    maps: Float[Tensor, "b t s h w"], moving: Float[Tensor, "b t height width"], least: float
) -> dict[str, float]:
    """The means over clips, frames and tokens; lift and mass, of a map on what moves, over frames of which at least so
    much moves.

    Raises:
        InputError: There is no such frame.
    """
    mask = looking.on_grid(moving, (maps.shape[3], maps.shape[4]))
    moves = moving.mean(dim=(2, 3)) >= least
    lifts = looking.lift(maps, mask)[moves]
    if not len(lifts):
        raise InputError(f"of no frame of these clips {least:.0%} moves")
    return {
        "lift": float(lifts.mean()),
        "mass": float((lifts * mask.mean(dim=(-2, -1))[moves].unsqueeze(-1)).mean()),
        "lift_of_best_token": float(lifts.mean(dim=0).max()),
        "evenness": float(looking.evenness(maps).mean()),
        "half_mass": float(looking.half_mass(maps).mean()),
        "overlap": float(looking.overlap(maps).mean()),
        "stability": float(looking.stability(maps).mean()),
    }


PAPER = "shown in figures, no number"


class Beside(NamedTuple):
    """What a trained model's maps are compared with: words of a variant's label and of a claim, and how it is made."""

    label: str
    claimed: str
    made: dict[str, Any]


STILL = Beside("mean maps", "their own mean over all frames", {"still": True})
NEW = Beside("new TokenLearner", "a new TokenLearner's", {"state": "new"})
UNTRAINED = Beside("untrained", "an untrained model's", {"state": "untrained"})


def study_of(title: str, question: str, models: dict[str, tuple[str, str]], others: dict[str, Beside]) -> Study:
    """A study of ``models``, label and folder or name by name: each beside flat maps and ``others``."""
    variants = {"flat": Looker("flat maps")}
    claims = []
    for name, (label, model) in models.items():
        variants[f"{name} trained"] = Looker(f"{label}, trained", model)
        variants |= {
            f"{name} {key}": Looker(f"{label}, {other.label}", model, **other.made) for key, other in others.items()
        }
        seconds = {"flat": "flat ones", **{f"{name} {key}": other.claimed for key, other in others.items()}}
        claims += [
            Claim(
                8,
                f"Maps of a trained {label} lie on what moves more than {those}",
                f"{name} trained",
                second,
                PAPER,
                decides=second == "flat" or second.endswith("still"),
            )
            for second, those in seconds.items()
        ]
        before = f"{name} {'untrained' if 'untrained' in others else 'new'}"
        claims += [
            Claim(8, f"A trained {label}'s {what}", before, f"{name} trained", PAPER, score=column, decides=False)
            for column, what in (
                ("evenness", "maps are less even than before training"),
                ("overlap", "tokens share less of the frame than before training"),
                ("stability", "maps change more from frame to frame than before training"),
            )
        ]
    return Study(
        title=title,
        question=question,
        run=look,
        variants=lambda _: variants,
        sizes={"cpu": Frames(), "gpu": Frames(windows=4, crops=3)},
        draw=(
            lambda axis, summary: bars(axis, summary, "lift, % (100 is a flat map)"),
            lambda axis, summary: columns(axis, summary, ("evenness", "half_mass", "overlap", "stability")),
        ),
        score="lift",
        same=("windows",),
        claims=tuple(claims),
        seeds="one of the ten sequences of set 2, whose clips differ much more than trainings do",
    )
