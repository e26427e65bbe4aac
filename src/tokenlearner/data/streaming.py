"""Videos of any length and folders of any number of pictures, a frame at a time: no more than one is ever held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from tokenlearner.data.containers import TOLERANCE, RefusedError, VideoFile
from tokenlearner.data.decode import DamagedImage, decode_image
from tokenlearner.data.images import IMAGE_SUFFIXES, Damaged
from tokenlearner.data.videos import (
    VIDEO_SUFFIXES,
    Converter,
    FrameFolder,
    find_videos,
    named,
    scaled,
    shown_at,
    sound_frame,
)

if TYPE_CHECKING:
    from av import VideoFrame


@dataclass(frozen=True, slots=True, order=True)
class Pictures:
    """A folder of pictures that are no frames of a video, so have no times, or a single picture."""

    path: Path

    def frames(self) -> list[Path]:
        """The pictures, 2 before 10; ``OSError`` if the folder can't be listed."""
        return FrameFolder(self.path, 1.0).frames() if self.path.is_dir() else [self.path]

    def __str__(self) -> str:
        return str(self.path)


StreamSource = Path | FrameFolder | Pictures


class Frame(NamedTuple):
    """One frame: the ``number``-th of those that are read, counted from 0."""

    number: int
    seconds: float | None
    """From the video's first frame; None where pictures have no times."""
    pixels: np.ndarray
    """(h, w, 3), uint8 RGB, upright."""
    name: str
    """Of the picture's file in its folder; empty for frames of a video file."""
    share: float
    """How much of the source has been read with it, from 0 to 1."""


def find_sources(path: str | Path, frame_fps: float | None = None) -> list[StreamSource]:
    """The video or picture itself, or every video and every folder with pictures in it under a folder, at any depth.

    With ``frame_fps`` the pictures of a folder are a video's frames, so many a second. ``InputError`` if there is
    nothing to find.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES - VIDEO_SUFFIXES:
        return [Pictures(path)]
    found = find_videos(path, frame_fps if frame_fps is not None else 1.0)
    if frame_fps is not None:
        return list(found)
    return [Pictures(source.path) if isinstance(source, FrameFolder) else source for source in found]


def read_frames(
    source: StreamSource, fps: float | None = None, *, short_side: int | None = None
) -> Iterator[Frame | Damaged]:
    """The frames of ``source`` in their order: all of them, or those shown at 0, 1/``fps``, 2/``fps``, … seconds.

    ``Pictures`` have no times, so all of them are read. At a time a video shows what ``read_clip`` reads there; above
    its own rate frames come again. ``short_side`` resizes frames as ``read_clip`` does, pictures then all to the size
    of the first; without it, pictures keep their sizes. A picture that can't be decoded comes as ``Damaged``.

    Raises:
        DamagedVideo: A video or folder that can't be read, or from some frame on can't be.
    """
    with named(source.path if isinstance(source, Pictures) else source):
        if isinstance(source, Path):
            yield from _of_file(source, fps, short_side)
        else:
            yield from _of_folder(source, fps, short_side)


def _times(duration: float, fps: float) -> list[float]:
    """The multiples of 1/``fps`` that lie before the end; 0 always does."""
    return [k / fps for k in range(max(1, math.ceil((duration - TOLERANCE) * fps)))]


def _of_file(path: Path, fps: float | None, short_side: int | None) -> Iterator[Frame]:
    with VideoFile(path) as video:
        convert = Converter(short_side)
        times = [] if fps is None else _times(video.duration, fps)
        shown = zip(times, shown_at(video, times)) if times else _every(video)
        for number, (seconds, frame) in enumerate(shown):
            yield Frame(number, seconds, convert(frame), "", min(1.0, seconds / video.duration))


def _every(video: VideoFile) -> Iterator[tuple[float, VideoFrame]]:
    shown = None
    for shown in video.frames(0.0):
        yield shown[0], sound_frame(shown)
    if shown is None:
        raise RefusedError("holds no frame that can be decoded")
    video.check_end(video.ends(shown[1], shown[0]))


def _of_folder(folder: FrameFolder | Pictures, fps: float | None, short_side: int | None) -> Iterator[Frame | Damaged]:
    files = folder.frames()
    if not files:
        raise RefusedError("holds no picture")
    rate = folder.fps if isinstance(folder, FrameFolder) else None
    seconds: list[float | None] = [None if rate is None else i / rate for i in range(len(files))]
    places = list(range(len(files)))
    if fps is not None and rate is not None:
        times = _times(len(files) / rate, fps)
        seconds = [*times]
        places = [min(int((time + TOLERANCE) * rate), len(files) - 1) for time in times]
    size: tuple[int, int] | None = None
    for number, (place, second) in enumerate(zip(places, seconds)):
        try:
            picture = decode_image(files[place])
        except DamagedImage as damaged:
            yield Damaged(damaged.path, damaged.reason)
            continue
        if short_side is not None:
            size = size or scaled(*picture.size, short_side)
            picture = picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)
        name = "" if files[place] == folder.path else files[place].name
        yield Frame(number, second, np.asarray(picture), name, (number + 1) / len(places))
