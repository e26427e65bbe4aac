"""Labelled images in uncompressed tars of webdataset's layout, read at random through an index of their members.

A sample is the files of one key, the name up to the first dot of its last part: ``0001.jpg`` and ``0001.cls``. The
index holds where each picture's bytes lie, so images of shards are shuffled, split and counted as files are.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenlearner.data.images import IMAGE_SUFFIXES, VAL_NAMES, Label, LabelledImages, class_positions, unknown_class
from tokenlearner.data.members import TarMember
from tokenlearner.errors import InputError

DESCRIPTION = "dataset.json"  # beside the shards that we wrote, and written after the last of them
FORMAT = "tokenlearner-shards-1"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of gzip, bzip2, xz and zstandard
_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's base_plus_ext
_BLOCK = 512  # bytes; a tar ends with two blocks of zeros

_Stored = int | str | list[int | str]  # a label as it stands in the shard


class _Description(NamedTuple):
    """What ``dataset.json`` says; ``splits`` has each split's shards and how many samples they hold."""

    classes: list[str]
    multilabel: bool
    splits: dict[str, dict[str, int]]


class _Sample(NamedTuple):
    key: str
    picture: TarMember
    label: _Stored


def read_shards(
    source: str | Path | Sequence[str | Path], classes: Sequence[str] | None = None, split: str | None = None
) -> LabelledImages:
    """The images of a folder of tars, of one tar, or of several; of a folder all of them, or those of one ``split``.

    A sample is one picture and a label: ``.cls`` with a class's position or name, or ``.json`` with that, a list of
    them (then all images are multi-label), or either as its "label". Positions are those in the ``dataset.json`` or
    ``classes.txt`` (a name a line) beside the shards; without these in ``classes``, or "0", "1", … up to the largest.
    The result has those classes, or ``classes``, into which they are translated by name.

    ``InputError`` for a missing, compressed, damaged or cut-off tar, one that holds another number of samples than
    ``dataset.json`` says, a sample without picture or label, and a label that is none of the classes.
    """
    if isinstance(source, str | Path):
        folder = Path(source)
        splits = shard_splits(folder)
        if split is not None and split not in splits:
            raise InputError(f"{folder} has no shards of {split!r}: there is {', '.join(splits)}")
        shards = [shard for name, part in splits.items() if split in (None, name) for shard in part]
    else:
        shards = [Path(shard) for shard in source]
        folder = shards[0] if shards else Path()
    if not shards:
        raise InputError(f"{folder} holds no shard: expected files that end in .tar")
    folder = shards[0].parent
    description = _description(folder)
    counts = description.splits.values() if description else ()
    expected = {folder / name: count for part in counts for name, count in part.items()}
    samples: list[_Sample] = []
    for shard in shards:
        found = _samples(shard)
        wanted = expected.get(shard, len(found))
        if len(found) != wanted:
            raise InputError(
                f"{shard} holds {len(found)} samples, where {DESCRIPTION} says {wanted}: write the shards again"
            )
        samples += found
    if not samples:
        raise InputError(f"{folder} holds no sample: expected pictures and their labels in {shards[0].name}")
    own = description.classes if description else _class_list(folder)
    return _labelled(samples, own, classes, multilabel=description is not None and description.multilabel)


def shard_splits(folder: Path) -> dict[str, list[Path]]:
    """The tars by split, as ``dataset.json`` says or by the words of their names; "data" where there is one part.

    By names there are two parts if some have the word train and others val, valid, validation or test; what has
    neither then belongs to none.
    """
    description = _description(folder)
    if description is not None:
        return {name: [folder / shard for shard in part] for name, part in description.splits.items()}
    if not folder.is_dir():
        return {"data": [folder]}
    tars = _tars(folder)
    words = {tar: re.split(r"[-_.]", tar.name) for tar in tars}
    by_split = {name: [tar for tar in tars if name in words[tar]] for name in ("train", *VAL_NAMES)}
    val = next((name for name in VAL_NAMES if by_split[name]), None)
    if val is None or not by_split["train"]:
        return {"data": tars}
    return {"train": by_split["train"], val: by_split[val]}


def holds_shards(folder: Path) -> bool:
    """Whether the folder has a ``dataset.json`` of ours, or tars and no folder (a dataset may lie beside its archive).

    ``InputError`` for a ``dataset.json`` of ours that can't be read.
    """
    if _description(folder) is not None:
        return True
    try:
        visible = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:  # whoever reads the folder says why
        return False
    return any(_is_tar(entry) for entry in visible) and not any(entry.is_dir() for entry in visible)


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar", *COMPRESSED)) and not path.name.startswith(".")


def _tars(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if _is_tar(entry))


def _description(folder: Path) -> _Description | None:
    """What ``write_shards`` wrote down; None if there is nothing, or a file of that name by somebody else."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if FORMAT.rpartition("-")[0] not in text:
        return None
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise InputError(f"{path} has the format {content['format']}, and this version reads {FORMAT}")
        splits = {
            name: {entry["file"]: int(entry["samples"]) for entry in part} for name, part in content["splits"].items()
        }
        return _Description([str(name) for name in content["classes"]], bool(content["multilabel"]), splits)
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} lacks what {FORMAT} has ({error!r}): write the shards again") from error


def _class_list(folder: Path) -> list[str] | None:
    """The names in ``classes.txt`` beside the shards, or one folder up where that holds a train and a val folder."""
    for path in [folder / "classes.txt"] + [folder.parent / "classes.txt"] * (folder.name in ("train", *VAL_NAMES)):
        if path.is_file():
            return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return None


def _samples(shard: Path) -> list[_Sample]:
    """The samples of a shard in its order."""
    pictures: dict[str, TarMember] = {}
    labels: dict[str, dict[str, _Stored | None]] = {}  # by key, then by suffix
    for member, content in _members(shard):
        match = _KEY.fullmatch(member.name)
        if match is None:
            continue
        key, suffix = match[1], match[2].lower()
        if f".{suffix}" in IMAGE_SUFFIXES:
            if key in pictures:
                names = f"{pictures[key].name} and {member.name}"
                raise InputError(f"{shard}: sample {key} has two pictures, {names}: expected one")
            pictures[key] = member
        elif suffix in ("cls", "json"):
            if suffix in labels.setdefault(key, {}):
                raise InputError(f"{shard}: sample {key} is there twice: expected keys that differ")
            try:
                labels[key][suffix] = _label(suffix, content)
            except ValueError as error:
                raise InputError(f"{shard}: {member.name} is no label: {error}") from error
    if alone := next((key for key in labels if key not in pictures), None):
        raise InputError(f"{shard}: sample {alone} has no picture ({' '.join(sorted(IMAGE_SUFFIXES))})")
    samples = []
    for key, picture in pictures.items():
        stored = [label for _, label in sorted(labels.get(key, {}).items()) if label is not None]
        if not stored:
            raise InputError(f"{shard}: sample {key} has no label: expected {key}.cls, or {key}.json with a label")
        samples.append(_Sample(key, picture, stored[0]))  # of both, .cls: .json often holds anything but the label
    return samples


def _label(suffix: str, content: bytes) -> _Stored | None:
    """The label in a ``.cls`` or ``.json`` file, None if the latter is about other things; ``ValueError`` if broken."""
    if suffix == "cls":
        text = content.decode().strip()
        if not text:
            raise ValueError("it is empty")
        return int(text) if re.fullmatch(r"-?[0-9]+", text) else text
    value = json.loads(content)
    if isinstance(value, dict):
        value = value.get("label")
    single = [value] if not isinstance(value, list) else value
    if value is not None and any(isinstance(one, bool) or not isinstance(one, int | str) for one in single):
        raise ValueError("expected a class's position, its name, or a list of these")
    return value


def _members(shard: Path) -> list[tuple[TarMember, bytes]]:
    """Every plain file of a tar, with the content of those that may be labels."""
    found: list[tuple[TarMember, bytes]] = []
    try:
        with shard.open("rb") as file:
            if file.read(6).startswith(_MAGIC) or shard.name.lower().endswith(COMPRESSED):
                raise InputError(f"{shard} is compressed, and images are read from it at random: unpack it to a .tar")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if not info.isreg() or info.issparse():
                        continue
                    content = b""
                    if info.name.lower().endswith((".cls", ".json")):
                        file.seek(info.offset_data)
                        content = file.read(info.size)
                    found.append((TarMember(shard, info.name, info.offset_data, info.size), content))
                end = tar.offset  # tarfile takes a broken header for the end
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise InputError(f"{shard} is damaged or cut off at byte {end:,}: get or write it again")
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{shard} can't be read as a tar ({reason}): get or write it again") from error
    return found


def _labelled(
    samples: Sequence[_Sample], own: Sequence[str] | None, classes: Sequence[str] | None, multilabel: bool
) -> LabelledImages:
    multilabel = multilabel or any(isinstance(sample.label, list) for sample in samples)
    if own is None:
        own = classes if classes is not None else _classes_of(samples)
    if classes is None and len(own) < 2:
        raise InputError(f"{samples[0].picture.archive.parent} holds fewer than 2 classes: {', '.join(own)}")
    own_position = class_positions(own)
    target = own if classes is None else classes
    target_position = class_positions(target)
    labels: list[Label] = []
    for sample in samples:
        stored = sample.label if isinstance(sample.label, list) else [sample.label]
        try:
            names = {_name(one, own, own_position) for one in stored}
            unknown = sorted(names - target_position.keys())
            if unknown:
                raise InputError(f"label {unknown[0]!r} {unknown_class(unknown[0], target)}")
        except InputError as error:
            raise InputError(f"{sample.picture.archive}: sample {sample.key}: {error}") from error
        positions = sorted(target_position[name] for name in names)
        labels.append(tuple(positions) if multilabel else positions[0])
    return LabelledImages(tuple(sample.picture for sample in samples), tuple(labels), tuple(target))


def _name(stored: int | str, own: Sequence[str], own_position: Mapping[str, int]) -> str:
    if isinstance(stored, str):
        if stored not in own_position:
            raise InputError(f"label {stored!r} {unknown_class(stored, own)}")
        return stored
    if not 0 <= stored < len(own):
        raise InputError(f"label {stored} is not the position of one of {len(own)} classes")
    return own[stored]


def _classes_of(samples: Sequence[_Sample]) -> list[str]:
    """The names that are there, sorted, or as many numbers as the largest asks for."""
    used = {one for s in samples for one in (s.label if isinstance(s.label, list) else [s.label])}
    names = sorted(one for one in used if isinstance(one, str))
    numbers = [one for one in used if isinstance(one, int)]
    if names and numbers:
        raise InputError(
            f"{samples[0].picture.archive.parent} labels by number ({numbers[0]}) and by name ({names[0]}): "
            "give the names in a classes.txt beside the shards"
        )
    return names or [str(number) for number in range(max(numbers, default=-1) + 1)]
