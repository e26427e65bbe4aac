"""What each token looks at over the time of a video: a sheet of frames and maps, and a film of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from tokenlearner.data.clips import ClipFiles, LabelledClips, uniform_starts, window_times
from tokenlearner.data.images import Damaged, OnError, damaged_entries
from tokenlearner.data.videos import DamagedVideo, FrameFolder, VideoSource, read_clip
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import check_inputs, needed_preprocessing
from tokenlearner.evaluation.clips import clip_files
from tokenlearner.evaluation.predict import maps_at, nothing_read, reason_of
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import draw_sheet, overlay, picture_of

LONGEST_ROW = 6  # tiles of a film that still fit side by side


@dataclass(frozen=True)
class Film:
    """The pictures of one video. ``seconds`` are the first and the last of the window that they show."""

    file: str
    sheet: Path
    video: Path
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Films:
    """What :func:`write_films` wrote, in the order of the files."""

    films: tuple[Film, ...]
    damaged: tuple[Damaged, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "films": [
                {
                    "file": film.file,
                    "sheet": str(film.sheet),
                    "video": str(film.video),
                    "seconds": [round(second, 3) for second in film.seconds],
                }
                for film in self.films
            ],
            "damaged": damaged_entries(self.damaged),
        }


@dataclass(frozen=True)
class Drawn:
    """The files of one clip and what they show: ``maps`` are (slices, s, h, w)."""

    sheet: Path
    video: Path
    maps: Tensor


def write_films(
    model: nn.Module,
    files: Sequence[VideoSource],
    folder: Path,
    *,
    layer: int | None = None,
    columns: int = 8,
    on_error: OnError = "skip",
) -> Films:
    """Draws the maps of one learner over the window in the middle of each video.

    Writes a sheet ``<stem>.png`` and a film ``<stem>.mp4`` for each to ``folder``, as :func:`draw_film` does; the
    second of a stem is ``<stem>-2``, and none of ``files`` is written over.

    Args:
        model: Takes clips and carries its preprocessing.
        files: Videos, or folders of their frames.
        folder: Made if it is not there.
        layer: Of the learner; the first when None.
        columns: How many slices of the window a sheet shows at most.
        on_error: Whether a damaged file is skipped or raises.

    Raises:
        InputError: A model of images or one without maps, no learner at ``layer``, no file that could be read, or a
            damaged one with ``on_error="raise"``.
    """
    check_inputs(model, clips=True)
    if columns < 1:
        raise InputError(f"columns must be at least 1, not {columns}")
    window = clip_files(model, LabelledClips((), (), ("",)), views=(1, 1))
    preprocessing = needed_preprocessing(model)
    inputs = {file.resolve() for file in files if isinstance(file, Path)}
    films: list[Film] = []
    damaged: list[Damaged] = []
    names: list[str] = []
    for file in files:
        try:
            clip, seconds, end = _centred(file, window)
        except DamagedVideo as error:
            if on_error == "raise":
                raise
            damaged.append(Damaged(str(file), reason_of(Damaged(error.path, error.reason), file)))
            continue
        names.append(free_name(_stem(file), folder, names, inputs))
        drawn = draw_film(model, clip, preprocessing, folder, names[-1], layer=layer, columns=columns, seconds=seconds)
        films.append(Film(str(file), drawn.sheet, drawn.video, (seconds[0], end)))
    if not films:
        raise nothing_read(damaged)
    return Films(tuple(films), tuple(damaged))


def _centred(source: VideoSource, window: ClipFiles) -> tuple[Float[Tensor, "c t h w"], list[float], float]:
    """The window in the middle of a video as ``window`` would cut and prepare it, when its frames are shown, and where
    it ends; all within the video, whose last frame a longer window repeats.
    """
    seconds: list[float] = []

    def times(duration: float) -> list[float]:
        length = window.frames / window.fps
        (start,) = uniform_starts(duration, length, 1)
        wanted = window_times(start, window.frames, window.fps)
        seconds[:] = [min(second, duration) for second in (*wanted, start + length)]
        return wanted

    clip = window.transform(read_clip(source, times, short_side=window.transform.short_side))
    return clip, seconds[:-1], seconds[-1]


@torch.inference_mode()
def draw_film(
    model: nn.Module,
    clip: Float[Tensor, "c t h w"],
    preprocessing: Preprocessing,
    folder: Path,
    name: str,
    *,
    layer: int | None = None,
    columns: int = 8,
    seconds: Sequence[float] | None = None,
) -> Drawn:
    """Draws what each token looks at in ``clip``: the sheet ``name.png`` and the film ``name.mp4`` in ``folder``.

    The sheet has a column for each of at most ``columns`` slices, evenly chosen: its middle frame and, under it, a row
    for each token. The film shows every frame beside its slice's maps, at the clip's own speed.

    Args:
        model: Takes clips.
        clip: One, prepared as the model takes it.
        preprocessing: What was done to it; says its frames a second.
        folder: Made if it is not there.
        name: Of the files, without suffix.
        layer: Of the learner; the first when None.
        columns: How many slices the sheet shows at most.
        seconds: When each of the t frames is shown, for the sheet's titles; counted from 0 when None.

    Raises:
        InputError: The model has no maps or no learner at ``layer``, or ``preprocessing`` has no ``fps``.
    """
    if preprocessing.fps is None:
        raise InputError("preprocessing has no fps, so the film has no speed: give Preprocessing(..., fps=...)")
    maps = maps_at(model, clip[None], layer).flatten(0, -4)  # (slices, s, h, w); a single one may come without its axis
    pictures = [picture_of(frame, preprocessing) for frame in rearrange(clip, "c t h w -> t c h w")]
    if seconds is None:
        seconds = window_times(0.0, len(pictures), preprocessing.fps)
    slices, frames = len(maps), len(pictures)
    few = min(columns, slices)
    chosen = [(2 * i + 1) * slices // (2 * few) for i in range(few)]
    middle = [(2 * i + 1) * frames // (2 * slices) for i in chosen]  # the frame in the middle of each
    sheet = draw_sheet(
        [pictures[t] for t in middle], maps[chosen], folder / f"{name}.png", [f"{seconds[t]:.2f} s" for t in middle]
    )
    of_frame = maps[torch.arange(frames) * slices // frames]
    video = write_video(overlaid(pictures, of_frame), folder / f"{name}.mp4", preprocessing.fps)
    return Drawn(sheet, video, maps)


def overlaid(pictures: Sequence[Image.Image], maps: Float[Tensor, "t s h w"]) -> list[Image.Image]:
    """Each picture and its maps as tiles: in one row if there are few, else row by row in a grid that is near a square.

    The sides are even, as H.264 needs them.
    """
    tiles = maps.shape[1] + 1
    across = tiles if tiles <= LONGEST_ROW else math.ceil(math.sqrt(tiles))
    width, height = pictures[0].size
    size = _even(across * width), _even(math.ceil(tiles / across) * height)
    grids = []
    for picture, of_frame in zip(pictures, maps, strict=True):
        grid = Image.new("RGB", size)
        for i, tile in enumerate((picture, *(overlay(picture, a) for a in of_frame))):
            grid.paste(tile, (i % across * width, i // across * height))
        grids.append(grid)
    return grids


def _even(side: int) -> int:
    return side + side % 2


def free_name(stem: str, folder: Path, taken: Iterable[str], kept: Collection[Path] = ()) -> str:
    """``stem``, numbered from 2 on where it is among ``taken`` or its files in ``folder`` would be among ``kept``."""
    names = {name.casefold() for name in taken}  # as disks compare them that know no case
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        paths = {(folder / f"{name}{suffix}").resolve() for suffix in (".png", ".mp4")}
        if name.casefold() not in names and paths.isdisjoint(kept):
            break
    return name


def _stem(source: VideoSource) -> str:
    return source.path.resolve().name if isinstance(source, FrameFolder) else source.stem
