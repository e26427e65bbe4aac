"""UT-Interaction for studies: which of its clips, decoded once and kept as bytes, and the windows cut from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from tokenlearner.data.annotations import read_clip_list
from tokenlearner.data.clips import ClipTransform, LabelledClips, uniform_starts
from tokenlearner.data.videos import read_clip
from tokenlearner.errors import InputError

FOLDER, SEQUENCES = "ut_interaction", tuple(range(1, 21))
LARGEST = 1.4  # of the short side while training, over the side of the crop; the smallest is SMALLEST, as when scored
SMALLEST = 1.125


def interactions(data: Path, of_set: str, sequences: Collection[int] = SEQUENCES) -> LabelledClips:
    """The clips of the six interactions in set "1" or "2" of ``data/ut_interaction``, of these sequences.

    Raises:
        InputError: There is no list of them, or it names none.
    """
    path = data / FOLDER / "clips.csv"
    if not path.is_file():
        raise InputError(
            f"the data folder {data} must hold UT-Interaction as {FOLDER}/clips.csv, with columns file, label, name, "
            "set and sequence, and the files beside it"
        )
    return read_clip_list(
        path, keep=lambda row: row["name"] != "other" and row["set"] == of_set and int(row["sequence"]) in sequences
    )


@functools.lru_cache(maxsize=4)
def decoded(
    data: Path, of_set: str, fps: float, short_side: int
) -> tuple[list[UInt8[Tensor, "t h w 3"]], LabelledClips]:
    """Every clip of a set from its beginning to its end, ``fps`` frames a second."""
    clips = interactions(data, of_set)

    def times(duration: float) -> list[float]:
        return [k / fps for k in range(max(1, math.floor(duration * fps)))]

    return [read_clip(file, times, short_side=short_side) for file in clips.files], clips


class Windows(Dataset[Any]):
    """``frames`` frames of each clip, (c, t, h, w): from any on, under a random view of ``transform``; or with
    ``views=(windows, crops)`` so many spread evenly over the clip, each cropped at so many places along the longer
    side, (windows · crops, c, t, h, w). A clip that is too short shows its last frame on.
    """

    def __init__(
        self,
        clips: Sequence[UInt8[Tensor, "t h w 3"]],
        labels: Sequence[Any],
        transform: ClipTransform,
        frames: int,
        views: tuple[int, int] | None = None,
    ) -> None:
        self.clips, self.labels, self.transform = clips, labels, transform
        self.frames, self.views = frames, views

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        clip = self.clips[i]
        if self.views is None:
            free = max(len(clip) - self.frames, 0)
            window = self._window(clip, int(torch.randint(free + 1, ())))
            return self.transform(window, self.transform.draw()), self.labels[i], i
        windows, crops = self.views
        starts = [round(start) for start in uniform_starts(len(clip), self.frames, windows)]
        along = [k / (crops - 1) if crops > 1 else 0.5 for k in range(crops)]
        shown = [self.transform(self._window(clip, s), self.transform.view(a)) for s in starts for a in along]
        return torch.stack(shown), self.labels[i], i

    def _window(self, clip: UInt8[Tensor, "t h w 3"], start: int) -> UInt8[Tensor, "t h w 3"]:
        return clip[(start + torch.arange(self.frames)).clamp(max=len(clip) - 1)]


def directions(
    data: Path, *, frames: int, side: int, fps: float, views: tuple[int, int]
) -> list[tuple[str, Windows, Windows, int]]:
    """Set 1 to learn from and set 2 to be scored on, and the other way round: (name, first, second, classes)."""
    largest = round(LARGEST * side)
    found = []
    for of_set, other in (("1", "2"), ("2", "1")):
        (clips, listed), (others, held_out) = (decoded(data, one, fps, largest) for one in (of_set, other))
        mean, std = moments(clips)
        norm: dict[str, Any] = {"mean": mean, "std": std}
        smallest = round(SMALLEST * side)
        train = Windows(clips, listed.labels, ClipTransform(side, smallest, largest, **norm), frames)
        test = Windows(others, held_out.labels, ClipTransform(side, smallest, **norm), frames, views)
        found.append((f"set{of_set}", train, test, len(listed.classes)))
    return found


def moments(clips: Sequence[UInt8[Tensor, "t h w 3"]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every channel over the clips' pixels, of values from 0 to 1."""
    pixels: Float[Tensor, "p 3"] = torch.cat([clip.flatten(0, 2) for clip in clips]).float() / 255
    return tuple(pixels.mean(dim=0).tolist()), tuple(pixels.std(dim=0).tolist())
