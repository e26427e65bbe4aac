"""Lists of labelled videos as their makers publish them, read into ``LabelledClips``.

Whatever the list, videos that are not there are no reason to stop: they are passed over and named in ``missing``, for
every public copy of these sets lacks some. Only where none of a list's videos is there is that an ``InputError``.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenlearner.data.clips import Event, LabelledClips, Span
from tokenlearner.data.images import Label, class_positions, folder_classes, unknown_class
from tokenlearner.data.videos import VideoSource, find_videos
from tokenlearner.errors import InputError


class _Item(NamedTuple):
    file: VideoSource
    label: Label
    span: Span | None = None
    events: tuple[Event, ...] = ()


def _clips(
    path: Path, items: Sequence[_Item], classes: Sequence[str], missing: Sequence[Path], timed: bool = False
) -> LabelledClips:
    """``InputError`` where there is no item."""
    if not items:
        there = f": none of its {len(missing)} videos is there, {missing[0]} the first" if missing else ""
        raise InputError(f"{path} gives no clip{there or ': expected a line for each'}")
    return LabelledClips(
        tuple(item.file for item in items),
        tuple(item.label for item in items),
        tuple(classes),
        tuple(item.span for item in items) if any(item.span for item in items) else None,
        tuple(item.events for item in items) if timed else None,
        tuple(missing),
    )


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The class names of a text file, one a line in the order of their numbers; ``InputError`` for none or a double."""
    path = Path(path)
    names = tuple(line for _, line in _lines(path))
    if not names:
        raise InputError(f"{path} names no class: expected one a line")
    class_positions(names)
    return names


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of the lines that are not empty."""
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error}") from error


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by column) of a CSV that has these columns, quoted line ends and all."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        for name in columns:
            if name not in header:
                there = ", ".join(header) if any(header) else "none"
                raise InputError(f"{path} has no column {name!r}: its columns are {there}")
        for cells in reader:
            if len(cells) not in (0, len(header)):
                raise InputError(f"{path}, line {reader.line_num} has {len(cells)} cells, the header {len(header)}")
            if cells:
                yield reader.line_num, {name: cell.strip() for name, cell in zip(header, cells)}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num} is no CSV: {error}") from error


def _seconds(path: Path, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise InputError(f"{path}, line {line}: {text!r} is no time: expected seconds")
    return value


def _position(path: Path, line: int, name: str, label_of: Mapping[str, int]) -> int:
    if name not in label_of:
        raise InputError(f"{path}, line {line}: label {name!r} {unknown_class(name, list(label_of))}")
    return label_of[name]


# ---- Charades


def read_charades(path: str | Path, videos: str | Path, classes: str | Path) -> LabelledClips:
    """Charades' train or test CSV: multi-label clips with events, one a video ``videos/<id>.mp4``.

    ``classes`` is its text file, ``c000 Holding some clothes`` a line. A video's labels are all of its actions (the
    rule of its classification task), none where none is listed; ``ClipFiles(label_by="window")`` takes those of the
    window instead. An action may be listed several times, and to beyond the video's end: it is over when that is.
    """
    path, videos = Path(path), Path(videos)
    codes, names = _charades_classes(Path(classes))
    items: list[_Item] = []
    missing: list[Path] = []
    for line, row in _rows(path, ("id", "actions")):
        events = tuple(_charades_action(path, line, text, codes) for text in row["actions"].split(";") if text.strip())
        file = videos / f"{row['id']}.mp4"
        if file.exists():
            items.append(_Item(file, tuple(sorted({event.label for event in events})), events=events))
        else:
            missing.append(file)
    return _clips(path, items, names, missing, timed=True)


def _charades_classes(path: Path) -> tuple[dict[str, int], list[str]]:
    codes: dict[str, int] = {}
    names: list[str] = []
    for line, text in _lines(path):
        code, _, name = text.partition(" ")
        if not re.fullmatch(r"c\d+", code) or not name or code in codes:
            raise InputError(f"{path}, line {line}: {text!r} is no new class: expected a code and a name, c000 …")
        codes[code] = len(names)
        names.append(name.strip())
    return codes, names


def _charades_action(path: Path, line: int, text: str, codes: Mapping[str, int]) -> Event:
    parts = text.split()
    if len(parts) != 3:
        raise InputError(f"{path}, line {line}: action {text!r}: expected a class, its start and its end, c092 1.5 7.0")
    code, start, end = parts
    return Event(_position(path, line, code, codes), _seconds(path, line, start), _seconds(path, line, end))


# ---- Kinetics


def read_kinetics(
    path: str | Path, videos: str | Path, classes: Sequence[str] | None = None, split: str | None = None
) -> LabelledClips:
    """Kinetics' CSV of label, youtube_id, time_start, time_end and split, for videos anywhere under ``videos``.

    A video is ``<id>_000010_000020.mp4``, cut to the clip already, or else ``<id>.mp4`` (or .mkv, …), of which the clip
    is a span. The classes are the labels, sorted, or ``classes`` in their own order (``read_labels`` of the published
    file). ``split`` takes the rows of that split alone.
    """
    path = Path(path)
    there: dict[str, VideoSource] = {}
    for video in find_videos(videos):
        there.setdefault(_stem(video), video)
    rows = [
        (line, row)
        for line, row in _rows(path, ("label", "youtube_id", "time_start", "time_end"))
        if split is None or row.get("split") == split
    ]
    classes = sorted({row["label"] for _, row in rows}) if classes is None else classes
    label_of = class_positions(classes)
    items: list[_Item] = []
    missing: list[Path] = []
    for line, row in rows:
        label = _position(path, line, row["label"], label_of)
        start, end = (_seconds(path, line, row[name]) for name in ("time_start", "time_end"))
        cut = f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}"
        if cut in there:
            items.append(_Item(there[cut], label))
        elif row["youtube_id"] in there:
            items.append(_Item(there[row["youtube_id"]], label, (start, end)))
        else:
            missing.append(Path(videos, f"{cut}.mp4"))
    return _clips(path, items, classes, missing)


def _stem(video: VideoSource) -> str:
    return Path(str(video)).stem


# ---- AViD


def read_avid(
    path: str | Path,
    videos: str | Path,
    classes: Sequence[str] | None = None,
    *,
    hierarchy: str | Path | None = None,
    drop: Sequence[str] = (),
) -> LabelledClips:
    """AViD's JSON, ``{"abcdefgh.mp4": "label", …}``, for videos in the folder ``videos``.

    The label "none" is a class like the others; ``drop=("none",)`` passes over its videos. With AViD's ``hierarchy``
    the clips are multi-label: a clip's classes are its label and all that lie above it. A few labels are not in the
    published hierarchy: they have nothing above them.
    """
    path = Path(path)
    document = _json(path)
    above = {} if hierarchy is None else _ancestors(Path(hierarchy))
    named = {name: label for name, label in document.items() if label not in drop}
    for name, label in named.items():
        if not isinstance(label, str):
            raise InputError(f"{path}: the label of {name} is {label!r}: expected a class name")
    sets = {name: sorted({label, *above.get(label, ())}) for name, label in named.items()}
    classes = sorted({label for labels in sets.values() for label in labels}) if classes is None else classes
    label_of = class_positions(classes)
    items: list[_Item] = []
    missing: list[Path] = []
    for name, labels in sets.items():
        for label in labels:
            if label not in label_of:
                raise InputError(f"{path}: {name}: label {label!r} {unknown_class(label, classes)}")
        file = Path(videos, name)
        if not file.exists():
            missing.append(file)
        elif hierarchy is None:
            items.append(_Item(file, label_of[labels[0]]))
        else:
            items.append(_Item(file, tuple(sorted(label_of[label] for label in labels))))
    return _clips(path, items, classes, missing)


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f'{path} holds a {type(document).__name__}: expected {{"file.mp4": "label", …}}')
    return document


def _ancestors(path: Path) -> dict[str, set[str]]:
    """All classes above each; the root, whose name is empty, is none, and a class that is its own parent is not its
    own ancestor (the published file has one).
    """
    try:
        parents = {name: [p for p in entry["parents"] if p] for name, entry in _json(path).items()}
    except (TypeError, KeyError) as error:
        raise InputError(f'{path} is no hierarchy: expected {{"label": {{"parents": ["label", …]}}, …}}') from error
    found: dict[str, set[str]] = {}
    for name in parents:
        above: set[str] = set()
        waiting = list(parents[name])
        while waiting:
            parent = waiting.pop()
            if parent not in above and parent != name:
                above.add(parent)
                waiting += parents.get(parent, [])
        found[name] = above
    return found


# ---- folders and lists of one's own


def scan_video_folders(
    root: str | Path, classes: Sequence[str] | None = None, *, frame_fps: float | None = None
) -> LabelledClips:
    """The videos under ``root``, where each folder is a class, as ``scan_class_folders`` takes images.

    With ``frame_fps``, folders of pictures in the class folders are videos of so many frames a second. A folder
    ``air_drumming`` is the class "air drumming" where ``classes`` has that alone, as in copies of Kinetics.
    """
    root = Path(root)
    try:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{root} can't be listed ({error.strerror}): expected a folder for each class") from error
    classes = folder_classes(root, folders, classes, "videos")
    label_of = class_positions(classes)
    items = []
    for folder in folders:
        name = folder.name if folder.name in label_of else folder.name.replace("_", " ")
        if name not in label_of:
            raise InputError(f"{folder} {unknown_class(folder.name, classes)}")
        items += [_Item(video, label_of[name]) for video in find_videos(folder, frame_fps)]
    return _clips(root, items, classes, ())


def read_clip_list(
    path: str | Path,
    classes: Sequence[str] | None = None,
    *,
    keep: Callable[[Mapping[str, str]], bool] | None = None,
) -> LabelledClips:
    """The clips of a CSV (UTF-8) with the columns ``file`` and ``label`` or ``name``, in its order.

    Files are as in ``read_list``, and so are labels of several classes joined by ``;``. Where both columns are there,
    ``label`` is a number and ``name`` the class of that number. ``start`` and ``end``, where they are, are the clip's
    seconds in its file; empty, the clip is all of it. ``keep`` is given a row's cells and says whether to take it:
    ``keep=lambda row: row["sequence"] != "7"``.
    """
    path = Path(path)
    rows = [(line, row) for line, row in _rows(path, ("file",)) if keep is None or keep(row)]
    if rows and not {"label", "name"} & set(rows[0][1]):
        raise InputError(f"{path} has no column 'label': its columns are {', '.join(rows[0][1])}")
    column = "name" if rows and "name" in rows[0][1] else "label"
    cells = [{name.strip() for name in row[column].split(";")} - {""} for _, row in rows]
    multilabel = any(";" in row[column] or not row[column] for _, row in rows)
    if classes is None:
        classes = (
            _numbered(path, rows) if rows and {"label", "name"} <= set(rows[0][1]) else sorted(set().union(*cells))
        )
    label_of = class_positions(classes)
    items: list[_Item] = []
    missing: list[Path] = []
    for (line, row), names in zip(rows, cells):
        labels = tuple(sorted(_position(path, line, name, label_of) for name in names))
        file = path.parent / row["file"]
        if file.exists():
            items.append(_Item(file, labels if multilabel else labels[0], _span(path, line, row)))
        else:
            missing.append(file)
    return _clips(path, items, classes, missing)


def _span(path: Path, line: int, row: Mapping[str, str]) -> Span | None:
    start, end = row.get("start", ""), row.get("end", "")
    if not start and not end:
        return None
    span = _seconds(path, line, start), _seconds(path, line, end)
    if span[0] >= span[1]:
        raise InputError(f"{path}, line {line}: the clip ends at {end} s, not after its start at {start} s")
    return span


def _numbered(path: Path, rows: Sequence[tuple[int, Mapping[str, str]]]) -> list[str]:
    """The classes by the numbers beside their names; without a number, sorted."""
    numbers: dict[str, str] = {}
    for line, row in rows:
        if numbers.setdefault(row["name"], row["label"]) != row["label"]:
            raise InputError(f"{path}, line {line}: {row['name']} is {row['label']}, above {numbers[row['name']]}")
        if not row["label"].isdecimal():
            raise InputError(f"{path}, line {line}: label {row['label']!r} is no number, as beside a name it must be")
    return sorted(numbers, key=lambda name: int(numbers[name]))
