"""Labelled clips, the windows that are cut from them, and what becomes of their pixels.

A window is ``frames`` frames at ``fps`` frames a second. Training takes one at random from each clip; evaluation takes
several, spread evenly, and of each several crops along the longer side (the paper's 4×3 and 2×3 views).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tokenlearner.data.containers import TOLERANCE, RefusedError
from tokenlearner.data.images import Damaged, Label, Labelled, LabelledImages, OnError, Sample
from tokenlearner.data.videos import DamagedVideo, FrameFolder, VideoSource, read_clip
from tokenlearner.errors import InputError

Span = tuple[float, float]
LabelBy = Literal["video", "window"]


class Event(NamedTuple):
    """A class seen from ``start`` to ``end`` (seconds), the latter beyond the video's end or not."""

    label: int
    start: float
    end: float


@dataclass(frozen=True)
class LabelledClips(Labelled):
    """``labels[i]`` is the position in ``classes`` of the class of the i-th clip, or of its classes where the clips are
    multi-label (all of them or none).

    The clip is ``files[i]``, from and to the seconds of ``spans[i]`` where that is not None. ``events``, where there
    are any, say when each of the labels is seen. ``missing`` were listed but are not there.
    """

    files: tuple[VideoSource, ...]
    labels: tuple[Label, ...]
    classes: tuple[str, ...]
    spans: tuple[Span | None, ...] | None = None
    events: tuple[tuple[Event, ...], ...] | None = None
    missing: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("spans", self.spans), ("events", self.events)):
            if values is not None and len(values) != len(self.files):
                raise InputError(f"{len(values)} {name} for {len(self.files)} files: give one for each")

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Iterable[int]) -> LabelledClips:
        """These clips in this order, of the same classes, without the missing (they belong to the list)."""
        chosen = list(indices)
        return LabelledClips(
            tuple(self.files[i] for i in chosen),
            tuple(self.labels[i] for i in chosen),
            self.classes,
            None if self.spans is None else tuple(self.spans[i] for i in chosen),
            None if self.events is None else tuple(self.events[i] for i in chosen),
        )

    def split(self, held_out: float, seed: int) -> tuple[LabelledClips, LabelledClips]:
        """(train, held out) as ``LabelledImages.split`` does it; all clips of a file come into the same part.

        A file counts as one of the class of its first clip.
        """
        names = [file.path if isinstance(file, FrameFolder) else file for file in self.files]
        first: dict[Path, Label] = {}
        for name, label in zip(names, self.labels):
            first.setdefault(name, label)
        held = set(LabelledImages(tuple(first), tuple(first.values()), self.classes).split(held_out, seed)[1].files)
        return (
            self.subset(i for i, name in enumerate(names) if name not in held),
            self.subset(i for i, name in enumerate(names) if name in held),
        )


# ---- windows


def window_times(start: float, frames: int, fps: float) -> list[float]:
    """The seconds of a window's frames."""
    return [start + k / fps for k in range(frames)]


def uniform_starts(duration: float, length: float, count: int) -> list[float]:
    """Where ``count`` windows of ``length`` seconds begin that are spread evenly over ``duration`` and lie centred.

    A single one lies in the middle; all begin at 0 where the video is shorter than the window.
    """
    free = max(duration - length, 0.0)
    return [free * (i + 0.5) / count for i in range(count)]


def random_start(duration: float, length: float, generator: torch.Generator | None = None) -> float:
    """Where a window of ``length`` seconds begins that lies anywhere in ``duration``, by torch's random numbers."""
    return max(duration - length, 0.0) * torch.rand((), generator=generator).item()


# ---- pixels


class ClipView(NamedTuple):
    """What is done alike to all frames of a clip: the shares (0 to 1) say where in the free space the crop lies."""

    short_side: int
    along: float
    """Along the longer side."""
    across: float
    """Along the shorter one."""
    flip: bool


@dataclass(frozen=True)
class ClipTransform:
    """Frames resized to a short side, cropped to ``size`` × ``size``, flipped and normalised; a whole clip alike.

    Training draws the short side from ``short_side`` to ``largest_short_side``, where that is given, and flips with
    probability ``flip``: 0 where left and right are classes. ``mean`` and ``std`` are for pixels from 0 to 1; a single
    mean makes frames grey, with one channel.
    """

    size: int = 224
    short_side: int = 256
    largest_short_side: int | None = None
    flip: float = 0.5
    mean: Sequence[float] = field(default=(0.485, 0.456, 0.406))
    std: Sequence[float] = field(default=(0.229, 0.224, 0.225))

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.short_side <= (self.largest_short_side or self.short_side):
            sides = f"size is {self.size}, short_side {self.short_side}, largest_short_side {self.largest_short_side}"
            raise InputError(f"{sides}: give pixels that do not fall from one to the next")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip is {self.flip}: give a probability")

    def draw(self, generator: torch.Generator | None = None) -> ClipView:
        """A view at random, for training."""
        largest = self.largest_short_side or self.short_side
        side = int(torch.randint(self.short_side, largest + 1, (), generator=generator))
        along, across, flip = torch.rand(3, generator=generator).tolist()
        return ClipView(side, along, across, flip < self.flip)

    def view(self, along: float = 0.5) -> ClipView:
        """A view for evaluation: never flipped."""
        return ClipView(self.short_side, along, 0.5, False)

    def __call__(self, clip: Tensor, view: ClipView | None = None) -> Tensor:
        """(t, h, w, 3) uint8 → (c, t, size, size) float32; ``view`` is the centre's when not given."""
        side, along, across, flip = view or self.view()
        if min(clip.shape[1:3]) != side:
            clip = _resized(clip, side)
        high, wide = clip.shape[1] - self.size, clip.shape[2] - self.size
        down, right = (along, across) if high > wide else (across, along)
        top, left = round(high * down), round(wide * right)
        clip = clip[:, top : top + self.size, left : left + self.size]
        if flip:
            clip = clip.flip(2)
        mean, std = (torch.tensor(values).reshape(-1, 1, 1, 1) for values in (self.mean, self.std))
        pixels = clip.permute(3, 0, 1, 2).float().div_(255)
        if len(self.mean) == 1:
            pixels = (pixels * torch.tensor(LUMA).reshape(-1, 1, 1, 1)).sum(dim=0, keepdim=True)
        return pixels.sub_(mean).div_(std).contiguous()


LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow has it


class EveryFrame:
    """A transform of pictures, such as timm's for training, done alike to every frame of a clip.

    Random transforms draw from the generators of Python, NumPy and torch, so these are set to the same seed before
    every frame, and back afterwards; the seed itself comes from torch's. (t, h, w, 3) uint8 → (c, t, height, width).
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, clip: Tensor) -> Tensor:
        seed = int(torch.randint(2**31, ()))
        python, numpy = random.getstate(), np.random.get_state()
        frames = []
        with torch.random.fork_rng(devices=()):
            for frame in clip.numpy():
                random.seed(seed)
                np.random.seed(seed)
                torch.default_generator.manual_seed(seed)
                frames.append(self.transform(Image.fromarray(frame)))
        random.setstate(python)
        np.random.set_state(numpy)
        return torch.stack(frames, dim=1)


def _resized(clip: Tensor, side: int) -> Tensor:
    height, width = clip.shape[1:3]
    factor = side / min(height, width)
    size = [round(height * factor), round(width * factor)]
    pixels = clip.permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    return resized.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1)


# ---- the dataset


class ClipFiles(Dataset[Sample | Damaged]):
    """``clips`` read one at a time: (frames, label, index), or ``Damaged`` in place of a clip that can't be read.

    Without ``views`` the frames are a random window under a random view of ``transform``: (c, t, size, size). With
    ``augment`` too, which takes that window as it was decoded, (t, h, w, 3) in uint8 of the transform's short side,
    they are what it returns. With ``views=(temporal, spatial)`` they are so many windows, evenly spread, each cropped
    at so many places evenly spread along the longer side: (temporal · spatial, c, t, size, size), the crops of a window
    side by side.

    A clip shorter than the window repeats its last frame; one that begins after its video's end is ``Damaged``. The
    label of a multi-label clip is a float vector with a 1 for each of its classes: all of the video's, or with
    ``label_by="window"`` those whose events overlap the windows read. What is drawn comes from torch's random numbers,
    which a DataLoader seeds in each worker. With ``on_error="raise"`` a damaged file raises ``DamagedVideo``.
    """

    def __init__(
        self,
        clips: LabelledClips,
        transform: ClipTransform,
        *,
        frames: int,
        fps: float,
        views: tuple[int, int] | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        label_by: LabelBy = "video",
        on_error: OnError = "skip",
    ) -> None:
        if frames < 1 or not 0 < fps < math.inf:
            raise InputError(f"a window of {frames} frames at {fps} a second holds none: give at least 1 and above 0")
        if views is not None and min(views) < 1:
            raise InputError(f"views is {views}: give at least one window and one crop")
        if label_by == "window" and (clips.events is None or not clips.multilabel):
            raise InputError("label_by is 'window', which takes multi-label clips with events: these say no times")
        self.clips = clips
        self.transform = transform
        self.frames = frames
        self.fps = fps
        self.views = views
        self.augment = augment
        self.label_by = label_by
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> Sample | Damaged:
        starts: list[float] = []

        def times(duration: float) -> list[float]:
            first, last = self._bounds(i, duration)
            starts.extend(self._starts(first, last))
            shown_until = max(first, last - 2 * TOLERANCE)  # the frame that begins where the span ends is not in it
            return [min(time, shown_until) for s in starts for time in window_times(s, self.frames, self.fps)]

        views = self._views()
        try:
            pixels = read_clip(self.clips.files[i], times, short_side=views[0].short_side)
        except DamagedVideo as damaged:
            if self.on_error == "raise":
                raise
            return Damaged(damaged.path, damaged.reason)
        if self.augment is not None and self.views is None:
            return self.augment(pixels), self._label(i, starts), i
        windows = pixels.split(self.frames)
        clip = torch.stack([self.transform(window, view) for window in windows for view in views])
        return clip if self.views else clip[0], self._label(i, starts), i

    def _bounds(self, i: int, duration: float) -> Span:
        span = self.clips.spans[i] if self.clips.spans else None
        if span is None:
            return 0.0, duration
        if not 0 <= span[0] < span[1]:
            raise RefusedError(f"its clip is listed from {span[0]:g} s to {span[1]:g} s")
        if span[0] >= duration:
            raise RefusedError(f"ends at {duration:.2f} s, before its clip from {span[0]:g} s to {span[1]:g} s")
        return span[0], min(span[1], duration)

    def _starts(self, first: float, last: float) -> list[float]:
        length = self.frames / self.fps
        if self.views is None:
            return [first + random_start(last - first, length)]
        return [first + start for start in uniform_starts(last - first, length, self.views[0])]

    def _views(self) -> list[ClipView]:
        if self.views is None:
            return [self.transform.draw()]
        spatial = self.views[1]
        return [self.transform.view(k / (spatial - 1) if spatial > 1 else 0.5) for k in range(spatial)]

    def _label(self, i: int, starts: Sequence[float]) -> int | Tensor:
        label = self.clips.labels[i]
        if isinstance(label, int):
            return label
        if self.label_by == "window" and self.clips.events is not None:
            label = tuple(
                event.label
                for event in self.clips.events[i]
                if any(event.start < start + self.frames / self.fps and event.end > start for start in starts)
            )
        target = torch.zeros(len(self.clips.classes))
        target[list(label)] = 1.0
        return target
