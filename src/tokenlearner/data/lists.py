"""Labelled images from a CSV: a header with ``file`` and ``label``, then a line an image.

    file,label
    photos/001.jpg,cat
    photos/002.jpg,dog

A label of several classes joined by ``;``, or of none (an empty cell), makes the whole list multi-label.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenlearner.data.images import Label, LabelledImages, class_positions, unknown_class
from tokenlearner.errors import InputError

_LABEL_COLUMNS = ("label", "labels")


class _Row(NamedTuple):
    line: int
    file: Path
    names: tuple[str, ...]


def read_list(path: str | Path, classes: Sequence[str] | None = None) -> LabelledImages:
    """The images of a CSV (UTF-8) with the columns ``file`` and ``label`` (or ``labels``), in its order.

    A file is an absolute path or one from the CSV's folder; whether it is there is found out when it is decoded. Other
    columns are passed over, and so is a line that says again what an earlier one said. The classes are the labels,
    sorted, or ``classes`` in their own order.

    ``InputError`` for a file that is no such list, a line that lacks a cell, a file with two different labels, a label
    that is not in ``classes``, and fewer than two classes where ``classes`` is not given.
    """
    path = Path(path)
    rows, multilabel = _read_rows(path)
    if classes is None:
        classes = sorted({name for row in rows for name in row.names})
        if len(classes) < 2:
            one = f"a single class, {classes[0]}" if classes else "no class"
            raise InputError(f"{path} holds {one}: expected at least 2 classes")
    label_of = class_positions(classes)
    labels: list[Label] = []
    for row in rows:
        for name in row.names:
            if name not in label_of:
                raise InputError(f"{path}, line {row.line}: label {name!r} {unknown_class(name, classes)}")
        positions = sorted(label_of[name] for name in row.names)
        labels.append(tuple(positions) if multilabel else positions[0])
    return LabelledImages(tuple(row.file for row in rows), tuple(labels), tuple(classes))


def _read_rows(path: Path) -> tuple[list[_Row], bool]:
    """The lines, each file once, and whether any label is of several classes or of none."""
    rows: dict[Path, _Row] = {}
    multilabel = False
    for line, file, label in _cells(path):
        names = sorted({name.strip() for name in label.split(";")} - {""})
        multilabel = multilabel or ";" in label or not label
        row = _Row(line, path.parent / file, tuple(names))
        first = rows.setdefault(row.file, row)
        if first.names != row.names:
            raise InputError(f"{path}, line {line}: {file} has another label than in line {first.line}")
    if not rows:
        raise InputError(f"{path} lists no image: expected a line for each below the header")
    return list(rows.values()), multilabel


def _cells(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, file, label) of every line that is not empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            header = [name.strip() for name in next(reader, [])]
            label_column = next((name for name in _LABEL_COLUMNS if name in header), "label")
            for name in ("file", label_column):
                if name not in header:
                    there = ", ".join(header) if any(header) else "none"
                    raise InputError(f"{path} has no column {name!r}: expected file and label, its columns are {there}")
            file_at, label_at = header.index("file"), header.index(label_column)
            for cells in reader:
                if not cells:
                    continue
                if len(cells) <= max(file_at, label_at):
                    raise InputError(
                        f"{path}, line {reader.line_num} has {len(cells)} cells, where the header has {len(header)}"
                    )
                if not cells[file_at]:
                    raise InputError(f"{path}, line {reader.line_num} names no file")
                yield reader.line_num, cells[file_at], cells[label_at].strip()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}): expected a CSV with file and label") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no CSV in UTF-8: {error}") from error
