"""Clips by time: the frames a video shows at given seconds, straight from its file or from a folder of pictures.

A clip is asked for in seconds, never in frame numbers, so that it means the same at 6, 12 or 30 frames per second and
where the rate varies: at time τ a video shows the last frame stamped τ or earlier. Time 0 is its first frame.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenlearner.data.containers import TOLERANCE, RefusedError, VideoFile
from tokenlearner.data.decode import DamagedImage, decode_image
from tokenlearner.data.images import IMAGE_SUFFIXES
from tokenlearner.errors import InputError

if TYPE_CHECKING:
    from av import VideoFrame

VIDEO_SUFFIXES = frozenset((".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".gif", ".ts"))


class DamagedVideo(DamagedImage):
    """A video that can't be decoded. ``path`` is the file, ``reason`` says why in words."""


@dataclass(frozen=True, slots=True, order=True)
class FrameFolder:
    """A video as a folder of pictures, in the natural order of their names, ``fps`` of them a second."""

    path: Path
    fps: float

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise InputError(f"{self.path}: fps is {self.fps}: give the pictures a second, above 0")

    def frames(self) -> list[Path]:
        """The pictures, 2 before 10; ``OSError`` if the folder can't be listed."""
        names = [file.name for file in self.path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
        return [self.path / name for name in sorted(names, key=_natural) if not name.startswith(".")]

    def __str__(self) -> str:
        return str(self.path)


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)], name


VideoSource = Path | FrameFolder


def find_videos(path: str | Path, frame_fps: float | None = None) -> list[VideoSource]:
    """The file itself, whatever its suffix, or every video under the folder at any depth, sorted.

    As ``find_images`` looks: suffixes in either case, linked folders once, nothing that starts with a dot. With
    ``frame_fps``, a folder with pictures in it is a video too: a ``FrameFolder`` of that many pictures a second.
    ``InputError`` if there is nothing to find.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist: give a video file or a folder of videos ({_suffixes()})")
    if not path.is_dir():
        return [path]

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} can't be listed: {error.strerror}") from error

    found: list[Path] = []
    folders: list[Path] = []
    visited = {os.path.realpath(path)}
    for directory, subfolders, names in os.walk(path, followlinks=True, onerror=refuse):
        real = {name: os.path.realpath(Path(directory, name)) for name in sorted(subfolders) if name[0] != "."}
        subfolders[:] = [name for name in real if real[name] not in visited]  # a link back up, or a second way there
        visited.update(real.values())
        seen = {name: Path(name).suffix.lower() for name in names if name[0] != "."}
        found += [Path(directory, name) for name, suffix in seen.items() if suffix in VIDEO_SUFFIXES]
        if frame_fps is not None and any(suffix in IMAGE_SUFFIXES - VIDEO_SUFFIXES for suffix in seen.values()):
            folders.append(Path(directory))
    if not found and not folders:
        raise InputError(f"{path} holds no video: looked at any depth for {_suffixes()}")
    return [*sorted(found), *(FrameFolder(folder, frame_fps or 0) for folder in sorted(folders))]


def _suffixes() -> str:
    return " ".join(sorted(VIDEO_SUFFIXES))


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """``duration`` in seconds, average ``fps``, and pixels of a frame as it is shown, turned upright."""

    duration: float
    frames: int
    fps: float
    width: int
    height: int


def read_clip(
    source: VideoSource | str,
    times: Sequence[float] | Callable[[float], Sequence[float]],
    *,
    short_side: int | None = None,
) -> Tensor:
    """The frames shown at ``times`` (t of them, seconds from the first frame, in any order): (t, h, w, 3), uint8 RGB.

    ``times`` may be a function that is given the video's duration in seconds. After the end the last frame is shown
    on, so a video shorter than the clip repeats it. ``short_side`` resizes frames while they are decoded, both sides
    by the same factor. Frames are turned upright as the file's display matrix says, by quarter turns.

    ``DamagedVideo`` for what can't be decoded or ends before the first of ``times``; ``InputError`` for times that are
    none, or negative.
    """
    source = source if isinstance(source, FrameFolder) else Path(source)
    if short_side is not None and short_side < 1:
        raise InputError(f"short_side is {short_side}: give pixels, at least 1")
    with named(source):
        if isinstance(source, FrameFolder):
            return _read_folder(source, times, short_side)
        with VideoFile(source) as video:
            wanted = _checked(times(video.duration) if callable(times) else times)
            convert = Converter(short_side)
            return _stacked(wanted, (convert(shown) for shown in shown_at(video, sorted(wanted))))


def probe(source: VideoSource | str) -> VideoInfo:
    """What the header says, counted where it says nothing, and the first frame decoded.

    ``DamagedVideo`` as from ``read_clip``.
    """
    source = source if isinstance(source, FrameFolder) else Path(source)
    with named(source):
        if isinstance(source, FrameFolder):
            files = _listed(source)
            width, height = decode_image(files[0]).size
            return VideoInfo(len(files) / source.fps, len(files), source.fps, width, height)
        with VideoFile(source) as video:
            first = next(video.frames(0.0), None)
            if first is None:
                raise RefusedError("holds no frame that can be decoded")
            height, width = Converter(None)(first[1]).shape[:2]
            frames = video.count()
            return VideoInfo(video.duration, frames, video.fps or frames / video.duration, width, height)


@contextmanager
def named(source: VideoSource) -> Iterator[None]:
    """Every failure to decode, as a ``DamagedVideo`` of this file."""
    try:
        yield
    except DamagedImage as error:  # a picture of a folder
        raise DamagedVideo(error.path, error.reason) from error
    except (InputError, ImportError):  # the caller's fault, or PyAV is not there
        raise
    except Exception as error:  # FFmpeg's own classes, OSError, MemoryError, …
        text = getattr(error, "strerror", None) or str(error)
        raise DamagedVideo(str(source), " ".join(text.split()) or type(error).__name__) from error


def _checked(times: Sequence[float]) -> list[float]:
    wanted = [float(time) for time in times]
    if not wanted or not all(0 <= time < math.inf for time in wanted):
        raise InputError(f"times are {wanted}: give at least one, in seconds from the first frame on")
    return wanted


def _stacked(wanted: list[float], frames: Iterator[np.ndarray]) -> Tensor:
    """The frames, which come in the order of the times, in the order in which the times were asked for."""
    clip = None
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    for position, frame in zip(order, frames, strict=True):
        if clip is None:
            clip = np.empty((len(wanted), *frame.shape), np.uint8)
        clip[position] = frame
    return torch.from_numpy(clip)


def scaled(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """(width, height) with this short side and, to the pixel, the same shape."""
    if short_side is None:
        return width, height
    factor = Fraction(short_side, min(width, height))
    return max(1, round(width * factor)), max(1, round(height * factor))


# ---- folders of pictures


def _listed(folder: FrameFolder) -> list[Path]:
    files = folder.frames()
    if not files:
        raise RefusedError("holds no picture")
    return files


def _read_folder(folder: FrameFolder, times: Any, short_side: int | None) -> Tensor:
    files = _listed(folder)
    wanted = _checked(times(len(files) / folder.fps) if callable(times) else times)
    _check_reached(min(wanted), len(files) / folder.fps)

    def frames() -> Iterator[np.ndarray]:
        size, last, frame = None, -1, np.empty(0)
        for time in sorted(wanted):
            index = min(int((time + TOLERANCE) * folder.fps), len(files) - 1)
            if index != last:
                picture = decode_image(files[index])
                size = size or scaled(*picture.size, short_side)
                resized = picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)
                last, frame = index, np.asarray(resized)
            yield frame

    return _stacked(wanted, frames())


def _check_reached(first: float, end: float) -> None:
    if first >= end + TOLERANCE:
        raise RefusedError(f"ends at {end:.2f} s, before the clip's first frame at {first:.2f} s")


# ---- video files


def shown_at(video: VideoFile, wanted: list[float]) -> Iterator[VideoFrame]:
    """The frame shown at each of the times, which ascend."""
    position, key = 0, -math.inf
    shown: tuple[float, VideoFrame] | None = None
    frames = video.frames(wanted[0])
    while (following := next(frames, None)) is not None:
        while shown is not None and wanted[position] + TOLERANCE < following[0]:
            yield sound_frame(shown)
            position += 1
            if position == len(wanted):
                return
            key = video.key_before(wanted[position])
        shown = following
        if shown[0] < key:  # skip to it; once only, for decoding may have to begin before it
            shown, key = None, -math.inf
            frames = video.frames(wanted[position])
    if shown is None:
        raise RefusedError("holds no frame that can be decoded")
    end = video.ends(shown[1], shown[0])
    video.check_end(end)
    if position == 0:
        _check_reached(wanted[0], end)
    for _ in wanted[position:]:
        yield sound_frame(shown)


def sound_frame(shown: tuple[float, VideoFrame]) -> VideoFrame:
    if shown[1].is_corrupt:
        raise RefusedError(f"the frame at {shown[0]:.2f} s is damaged")
    return shown[1]


class Converter:
    """Frames as upright RGB arrays (h, w, 3), all of the size the first one gets."""

    def __init__(self, short_side: int | None) -> None:
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()
        self.short_side = short_side
        self.size: tuple[int, int] | None = None
        self.last: tuple[VideoFrame, np.ndarray] | None = None

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        if self.last is not None and self.last[0] is frame:  # shown for longer than a step
            return self.last[1]
        self.size = self.size or scaled(frame.width, frame.height, self.short_side)
        width, height = self.size
        rgb = self.reformatter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
        array = rgb.to_ndarray()
        turns = round(frame.rotation / 90) % 4  # counter-clockwise, as numpy's
        self.last = frame, np.rot90(array, turns) if turns else array
        return self.last[1]
