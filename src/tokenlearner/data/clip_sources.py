"""What DATA may be where it is videos: class folders, a CSV of ours, or the lists of Charades, Kinetics and AViD."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenlearner.data.annotations import (
    read_avid,
    read_charades,
    read_clip_list,
    read_kinetics,
    read_labels,
    scan_video_folders,
)
from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.images import IMAGE_SUFFIXES, VAL_NAMES, find_splits
from tokenlearner.data.listing import Listing
from tokenlearner.data.videos import VIDEO_SUFFIXES, VideoSource
from tokenlearner.errors import InputError


@dataclass(frozen=True)
class ClipData:
    """Training and evaluation clips of one class list; ``held_out_of`` is the data the latter were split from."""

    train: LabelledClips
    val: LabelledClips
    held_out_of: Path | None


class ClipPart(NamedTuple):
    """A part of DATA, not read yet. ``name`` is how a sentence calls it: val/, val.csv."""

    name: str
    read: Callable[[Sequence[str] | None], LabelledClips]
    """Takes the classes, or None where they are to be found."""
    format: str = ""
    """Whose list it is; empty for folders."""


def holds_videos(data: Path, listing: Listing | None = None) -> bool:
    """Whether DATA is videos: more of its files, or of those its CSV names, are videos than pictures.

    A GIF is a picture where there are others. A JSON file and the CSVs of Charades and Kinetics name videos.
    """
    if listing is not None and listing.frame_fps is not None:
        return True
    if not data.is_dir():
        if data.suffix.lower() == ".csv" and data.is_file():
            return _lists_videos(data)
        return data.suffix.lower() in VIDEO_SUFFIXES | {".json"}
    if (lists := _list_pair(data)) is not None:
        return _lists_videos(lists[0])
    suffixes = Counter(Path(name).suffix.lower() for _, _, names in os.walk(data) for name in names)
    videos = sum(suffixes[suffix] for suffix in VIDEO_SUFFIXES - IMAGE_SUFFIXES)
    return videos > sum(suffixes[suffix] for suffix in IMAGE_SUFFIXES - VIDEO_SUFFIXES)


def _lists_videos(path: Path) -> bool:
    if _format_of(path) != "clips":
        return True
    text = path.read_text(encoding="utf-8-sig", errors="replace").lower()
    return sum(text.count(s) for s in VIDEO_SUFFIXES) > sum(text.count(s) for s in IMAGE_SUFFIXES)


def find_clip_parts(data: Path, listing: Listing | None = None) -> tuple[ClipPart, ClipPart | None]:
    """(training part, evaluation part), or (all of DATA, None) where it has no evaluation part.

    DATA is, the first that fits:

    - a list, ``listing.val`` the one to evaluate on: a .csv with the columns file and label or name, one of Charades
      (id, actions) or of Kinetics (label, youtube_id, time_start, time_end), or AViD's .json;
    - a folder with two such lists, train.csv and val.csv;
    - a folder with the folders train and val, each of class folders;
    - a folder of class folders.

    In place of val: valid, validation or test. ``InputError`` for a file of another kind.
    """
    listing = listing or Listing()
    if not data.is_dir():
        val = listing.val
        return _list_part(data, listing), None if val is None else _list_part(val, listing)
    if listing.val is not None:
        raise InputError(f"--val goes with a list to train on, and {data} is a folder")
    if (lists := _list_pair(data)) is not None:
        return _list_part(lists[0], listing), _list_part(lists[1], listing)
    train, val_folder = find_splits(data)
    return _folder_part(train, listing), None if val_folder is None else _folder_part(val_folder, listing)


def _list_pair(data: Path) -> tuple[Path, Path] | None:
    train = data / "train.csv"
    val = next((data / f"{name}.csv" for name in VAL_NAMES if (data / f"{name}.csv").is_file()), None)
    return (train, val) if val is not None and train.is_file() else None


def _folder_part(folder: Path, listing: Listing) -> ClipPart:
    def read(classes: Sequence[str] | None) -> LabelledClips:
        return scan_video_folders(folder, _classes_of(listing, classes), frame_fps=listing.frame_fps)

    return ClipPart(f"{folder.name}/", read)


def _classes_of(listing: Listing, classes: Sequence[str] | None) -> Sequence[str] | None:
    if classes is not None or listing.classes is None:
        return classes
    return read_labels(listing.classes)


def _list_part(path: Path, listing: Listing) -> ClipPart:
    kind = _format_of(path)
    if kind == "clips":
        return ClipPart(path.name, lambda classes: read_clip_list(path, _classes_of(listing, classes)), kind)
    if listing.videos is None:
        raise InputError(f"{path} is a list of {kind}, which does not say where its videos lie: give --videos FOLDER")
    read: Callable[[Sequence[str] | None], LabelledClips]
    if kind == "Charades":
        if listing.classes is None:
            raise InputError(
                f"{path} is a list of Charades: give its class file too, --classes Charades_v1_classes.txt"
            )
        read = partial(_read_charades, path, listing.videos, listing.classes)
    elif kind == "Kinetics":
        read = partial(_read_kinetics, path, listing)
    else:
        read = partial(_read_avid, path, listing)
    return ClipPart(path.name, read, kind)


def _format_of(path: Path) -> str:
    """ "clips" (ours), "Charades", "Kinetics" or "AViD", by suffix and columns."""
    if path.suffix.lower() == ".json":
        return "AViD"
    if path.suffix.lower() != ".csv":
        raise InputError(f"{path} is no list of videos: expected a .csv or AViD's .json, or a folder")
    try:
        with path.open(encoding="utf-8-sig", newline="", errors="replace") as file:
            header = {name.strip() for name in next(csv.reader(file), [])}
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    if {"id", "actions"} <= header:
        return "Charades"
    return "Kinetics" if {"youtube_id", "time_start"} <= header else "clips"


def _read_charades(path: Path, videos: Path, names: Path, classes: Sequence[str] | None) -> LabelledClips:
    clips = read_charades(path, videos, names)
    if classes is not None and tuple(classes) != clips.classes:
        raise InputError(
            f"{names} names other classes than the {len(classes)} wanted: expected the same, in their order"
        )
    return clips


def _read_kinetics(path: Path, listing: Listing, classes: Sequence[str] | None) -> LabelledClips:
    return read_kinetics(path, listing.videos or "", _classes_of(listing, classes))


def _read_avid(path: Path, listing: Listing, classes: Sequence[str] | None) -> LabelledClips:
    return read_avid(path, listing.videos or "", _classes_of(listing, classes), hierarchy=listing.hierarchy)


def read_clip_data(
    data: Path,
    held_out: float,
    seed: int,
    listing: Listing | None = None,
    classes: Sequence[str] | None = None,
) -> ClipData:
    """Clips to train on and to evaluate on: where there is no evaluation part, a share ``held_out`` is split off.

    They are of ``classes`` where these are given, of which some may have no clip.

    Where the evaluation list is Charades', videos without an action are left out of it, as Charades' own scores do.
    ``InputError`` for what is none of the kinds of data, a broken one, and one that can't be split.
    """
    train_part, val_part = find_clip_parts(data, listing)
    clips = train_part.read(classes)
    if val_part is None:
        train, val = clips.split(held_out, seed)
        return ClipData(replace(train, missing=clips.missing), _to_score(train_part, val), data)
    val = val_part.read(clips.classes)
    if clips.multilabel or val.multilabel:
        clips, val = clips.as_multilabel(), val.as_multilabel()
    return ClipData(clips, _to_score(val_part, val), None)


def read_clips_to_score(
    data: Path, classes: Sequence[str] | None, listing: Listing | None = None
) -> tuple[LabelledClips, str, bool]:
    """(the clips of the evaluation part, or of all where there is none; the part's name; whether it is the latter).

    Labels are positions in ``classes``, or where these are None in the data's own. Of Charades' lists, the videos that
    have an action.
    """
    train_part, val_part = find_clip_parts(data, listing)
    part = val_part or train_part
    return _to_score(part, part.read(classes)), part.name, val_part is None


def _to_score(part: ClipPart, clips: LabelledClips) -> LabelledClips:
    if part.format != "Charades":
        return clips
    labelled = [i for i, label in enumerate(clips.labels) if label]
    if not labelled:
        raise InputError(f"none of the {len(clips)} videos in {part.name} has an action, so there is nothing to score")
    return replace(clips.subset(labelled), missing=clips.missing)


def clip_name(source: VideoSource, data: Path, listing: Listing | None = None) -> str:
    """How held_out.json names a video of ``data``, wherever that lies: its path from the folder, or from the list's, or
    from ``listing.videos``; in full where it lies elsewhere.
    """
    path = Path(str(source))
    is_list = data.suffix.lower() in (".csv", ".json") and not data.is_dir()
    base = (listing.videos if listing else None) or (data.parent if is_list else data)
    return (path.relative_to(base) if path.is_relative_to(base) else path).as_posix()
