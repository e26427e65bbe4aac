"""What a set of pictures or videos holds: classes, counts, lengths, sizes and rates, and which files are damaged."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenlearner.data.clip_sources import Listing, find_clip_parts, holds_videos
from tokenlearner.data.clips import LabelledClips, Span
from tokenlearner.data.decode import DamagedImage
from tokenlearner.data.images import (
    IMAGE_SUFFIXES,
    Damaged,
    Label,
    LabelledImages,
    damaged_entries,
    find_images,
    find_splits,
    read_picture,
)
from tokenlearner.data.members import ImageSource
from tokenlearner.data.sources import find_parts, read_parts
from tokenlearner.data.videos import VIDEO_SUFFIXES, VideoInfo, find_videos, probe
from tokenlearner.errors import InputError

Progress = Callable[[int, int], object]  # given the files looked at and all of them
NO_CLASS = "(no class)"  # of files that lie in no class folder


class _Part(NamedTuple):
    name: str
    files: Sequence[Any]
    labels: Sequence[Label | None]
    classes: Sequence[str]
    spans: Sequence[Span | None] | None = None
    missing: tuple[Path, ...] = ()


def statistics(data: str | Path, *, listing: Listing | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """The JSON document of ``tokenlearner data``: every picture is decoded, of every video the first frame.

    DATA is what ``train`` takes, or a folder of pictures or videos without classes; ``listing`` is what a list of
    videos does not say itself. ``InputError`` for none of these.
    """
    data = Path(data)
    if not os.path.lexists(data):
        raise InputError(f"{data} does not exist: give a folder of pictures or videos, or a CSV that lists them")
    videos = holds_videos(data, listing)
    parts = _video_parts(data, listing or Listing()) if videos else _image_parts(data)
    found, damaged = _looked_at(parts, videos, progress)
    missing = [str(file) for part in parts for file in part.missing]
    counted = {part.name: _counted(part) for part in parts}
    return {
        "data": data.name or str(data),
        "kind": "videos" if videos else "images",
        "items": sum(len(part.files) for part in parts),
        "files": len(found) + len(damaged),
        "classes": len({name for counts in counted.values() for name in counts} - {NO_CLASS}),
        "parts": {part.name: {"items": len(part.files), "classes": counted[part.name]} for part in parts},
        "sizes": _sizes(found.values()),
        **(_lengths(parts, found) if videos else {}),
        "damaged": damaged_entries(damaged),
        "missing": {"count": len(missing), "files": missing},
    }


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def table_rows(document: dict[str, Any], most: int = 30) -> list[Table]:
    """The document as two tables of (columns, rows): the ``most`` largest classes, and the rest."""
    parts = document["parts"]
    total: Counter[str] = Counter()
    for part in parts.values():
        total.update(part["classes"])
    classes = [
        (name, *(f"{part['classes'].get(name, 0):,}" for part in parts.values())) for name, _ in total.most_common(most)
    ]
    if len(total) > most:
        classes.append((f"… and {len(total) - most:,} more", *("" for _ in parts)))
    facts = [(document["kind"], f"{document['items']:,}"), ("files", f"{document['files']:,}")]
    facts += [("classes", f"{document['classes']:,}")]
    for name in ("width", "height"):
        facts.append((f"{name} (pixels)", _in_words(document["sizes"][name])))
    if document["kind"] == "videos":
        facts.append(("hours", f"{document['hours']:.2f}"))
        facts.append(("frames", f"{document['frames']:,}"))
        facts.append(("seconds", _in_words(document["seconds"])))
        rates = [f"{rate['fps']:g} ({rate['files']:,})" for rate in document["fps"][:8]]
        facts.append(("frames a second (files)", ", ".join(rates) + (", …" if len(document["fps"]) > 8 else "")))
    facts.append(("damaged", f"{document['damaged']['count']:,}"))
    facts.append(("missing", f"{document['missing']['count']:,}"))
    return [(("class", *parts), classes), ((document["data"], ""), facts)]


def _in_words(spread: dict[str, Any]) -> str:
    return f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}" if "min" in spread else "none read"


# ---- what there is


def _image_parts(data: Path) -> list[_Part]:
    flat = data.is_dir() and not any(entry.is_dir() for entry in data.iterdir())
    if flat and any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in data.iterdir()):
        files = find_images(data)
        return [_Part(data.name, files, [None] * len(files), ())]
    names = [part.name for part in find_parts(data) if part is not None]
    return [_of_images(name, images) for name, images in zip(names, read_parts(data)) if images is not None]


def _of_images(name: str, images: LabelledImages) -> _Part:
    return _Part(name, images.files, images.labels, images.classes)


def _video_parts(data: Path, listing: Listing) -> list[_Part]:
    if not data.is_dir() and data.suffix.lower() in VIDEO_SUFFIXES:
        return [_video_folders(data, listing.frame_fps)]
    parts = find_clip_parts(data, listing)
    if parts[0].format:
        train = parts[0].read(None)
        read = [train, *(part.read(train.classes) for part in parts[1:] if part is not None)]
        return [_of_clips(part.name, clips) for part, clips in zip([p for p in parts if p is not None], read)]
    train_folder, val_folder = find_splits(data)
    return [_video_folders(folder, listing.frame_fps) for folder in (train_folder, val_folder) if folder is not None]


def _of_clips(name: str, clips: LabelledClips) -> _Part:
    return _Part(name, clips.files, clips.labels, clips.classes, clips.spans, clips.missing)


def _video_folders(root: Path, frame_fps: float | None) -> _Part:
    """The videos, each of the class of the folder in ``root`` that it lies in."""
    files = find_videos(root, frame_fps)
    below = [Path(str(file)).relative_to(root).parts for file in files] if root.is_dir() else [() for _ in files]
    names = [parts[0] if len(parts) > 1 else None for parts in below]
    classes = sorted({name for name in names if name is not None})
    labels = [None if name is None else classes.index(name) for name in names]
    return _Part(f"{root.name}/" if root.is_dir() else root.name, files, labels, classes)


# ---- what it is like


def _looked_at(
    parts: Sequence[_Part], videos: bool, progress: Progress | None
) -> tuple[dict[Any, VideoInfo], list[Damaged]]:
    """What each readable file is like, and the others; a file that is listed several times is looked at once."""
    files = list(dict.fromkeys(file for part in parts for file in part.files))
    found: dict[Any, VideoInfo] = {}
    damaged: list[Damaged] = []
    for done, file in enumerate(files, 1):
        try:
            found[file] = probe(file) if videos else _picture_info(file)
        except DamagedImage as error:
            damaged.append(Damaged(error.path, error.reason))
        if progress is not None:
            progress(done, len(files))
    return found, damaged


def _picture_info(file: ImageSource) -> VideoInfo:
    width, height = read_picture(file).size
    return VideoInfo(0.0, 1, 0.0, width, height)


def _counted(part: _Part) -> dict[str, int]:
    """Items of each class, of several where they are multi-label."""
    counts = dict.fromkeys(part.classes, 0)
    for label in part.labels:
        for position in label if isinstance(label, tuple) else (label,):
            name = NO_CLASS if position is None else part.classes[position]
            counts[name] = counts.get(name, 0) + 1
    return counts


def _sizes(infos: Iterable[VideoInfo]) -> dict[str, Any]:
    sizes = [(info.width, info.height) for info in infos]
    return {
        "width": _summary([width for width, _ in sizes]),
        "height": _summary([height for _, height in sizes]),
        "short_side": _histogram([min(size) for size in sizes]),
        "most": [
            {"width": width, "height": height, "files": count}
            for (width, height), count in Counter(sizes).most_common(10)
        ],
    }


def _lengths(parts: Sequence[_Part], found: dict[Any, VideoInfo]) -> dict[str, Any]:
    seconds = [
        found[file].duration if span is None else max(min(span[1], found[file].duration) - span[0], 0.0)
        for part in parts
        for file, span in zip(part.files, part.spans or [None] * len(part.files))
        if file in found
    ]
    rates = Counter(round(info.fps, 2) for info in found.values())
    return {
        "hours": round(sum(seconds) / 3600, 4),
        "frames": sum(info.frames for info in found.values()),
        "seconds": {**_summary(seconds), "histogram": _histogram(seconds)},
        "fps": [{"fps": fps, "files": count} for fps, count in rates.most_common()],
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    spread: dict[str, Any] = {
        "min": min(values),
        "median": np.median(values),
        "mean": np.mean(values),
        "max": max(values),
    }
    return {name: round(float(value), 2) for name, value in spread.items()}


def _histogram(values: Sequence[float], bins: int = 20) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=bins)
    return {"edges": [round(edge, 3) for edge in edges.tolist()], "counts": counts.tolist()}
