"""Any data as shards: pictures of one size in a few large tars, which webdataset's readers and ours can read."""

from __future__ import annotations

import io
import json
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import ExifTags, Image, JpegImagePlugin

from tokenlearner.data.images import Damaged, DamagedImage, LabelledImages, OnError, damaged_entries, read_picture
from tokenlearner.data.members import ImageSource, TarMember
from tokenlearner.data.shards import DESCRIPTION, FORMAT
from tokenlearner.data.sources import read_parts
from tokenlearner.errors import InputError


class _Stored(NamedTuple):
    """An image as it goes into a shard: its place in the data, its JPEG file, and whether that is the original."""

    image: int
    jpeg: bytes
    original: bool


def write_shards(
    data: str | Path,
    output: str | Path,
    *,
    size: int = 256,
    per_shard: int = 1000,
    quality: int = 90,
    on_error: OnError = "skip",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the images of ``data`` as shards of ``per_shard`` into ``output`` and returns the summary.

    The shards are ``train-000000.tar`` … and ``val-000000.tar`` …, or ``data-000000.tar`` … where the data has no
    evaluation part, with ``dataset.json`` beside them. A sample is a JPEG of ``quality`` (1 to 100), shrunk to ``size``
    pixels on its short side, and a ``.cls`` with its class's position, or for multi-label images a ``.json`` with a
    list of those. A JPEG in RGB, upright, and no larger, is stored as it is. Training images are shuffled by the seed,
    so that every shard has some of every kind; the evaluation part keeps its order. Damaged images are left out, named
    and counted. Equal images, options and library versions give equal bytes.

    A run that ends early leaves no ``dataset.json``. ``progress`` is called with the number of images done
    and of all.

    Raises:
        InputError: Data that can't be read or has a part without a readable image, an ``output`` that has shards, or
            an option out of range.
        DamagedImage: With ``on_error="raise"``, the first damaged image.
    """
    start, data, output = time.perf_counter(), Path(data), Path(output)
    if size < 1 or per_shard < 1 or not 1 <= quality <= 100:
        raise InputError(
            f"size {size}, per_shard {per_shard} and quality {quality} don't fit: give at least 1, 1, and 1 to 100"
        )
    train, val = read_parts(data)
    parts = {"data": train} if val is None else {"train": train, "val": val}
    _make_empty(output)
    total, done, kept = sum(len(images) for images in parts.values()), 0, 0
    damaged: list[Damaged] = []
    splits: dict[str, list[dict[str, Any]]] = {}

    def watched(images: LabelledImages, order: Iterable[int]) -> Iterator[_Stored]:
        """The readable ones, counted."""
        nonlocal done, kept
        for index in order:
            try:
                stored = _Stored(index, *_jpeg(images.files[index], size, quality))
                kept += stored.original
                yield stored
            except DamagedImage as error:
                if on_error == "raise":
                    raise
                damaged.append(Damaged(error.path, error.reason))
            done += 1
            if progress is not None:
                progress(done, total)

    # Inside the output, because a folder beside it may lie on another disk, from where nothing can be renamed.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=output) as unfinished:
        for name, images in parts.items():
            order = list(range(len(images)))
            if name != "val":
                random.Random(seed).shuffle(order)
            splits[name] = _write_split(name, images, watched(images, order), Path(unfinished), per_shard, done)
        description = {
            "format": FORMAT,
            "classes": list(train.classes),
            "multilabel": train.multilabel,
            "size": size,
            "splits": splits,
        }
        (Path(unfinished) / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
        for file in [entry["file"] for part in splits.values() for entry in part] + [DESCRIPTION]:
            (Path(unfinished) / file).rename(output / file)
    return {
        "data": str(data),
        "output": str(output),
        "classes": len(train.classes),
        "multilabel": train.multilabel,
        "size": size,
        "splits": splits,
        "images": total - len(damaged),
        "stored_as_they_were": kept,
        "damaged": damaged_entries(damaged),
        "strays": [str(path) for path in train.strays],
        "seconds": time.perf_counter() - start,
    }


def _make_empty(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        there = sorted(entry.name for entry in output.iterdir() if entry.name == DESCRIPTION or entry.suffix == ".tar")
    except OSError as error:
        raise InputError(f"{output} can't be written to ({error.strerror}): give a folder for the shards") from error
    if there:
        raise InputError(f"{output} already has {there[0]}: give a new folder, or empty this one first")


def _write_split(
    name: str, images: LabelledImages, stored: Iterable[_Stored], folder: Path, per_shard: int, first: int
) -> list[dict[str, Any]]:
    """The shards of one split, each with its number of samples; keys are numbered from ``first``."""
    from webdataset import ShardWriter  # type: ignore[import-untyped]

    shards: list[dict[str, Any]] = []
    open_files: list[BinaryIO] = []

    def open_shard(file: str) -> BinaryIO:  # webdataset itself would take a colon in the path for a protocol
        open_files.append((folder / file).open("wb"))
        return open_files[-1]

    def finished(file: str) -> None:
        open_files.pop().close()
        shards.append({"file": file, "samples": writer.count})

    options = {"maxcount": per_shard, "maxsize": float("inf"), "opener": open_shard, "post": finished}
    # A fixed time, so that equal images make equal shards.
    with ShardWriter(f"{name}-%06d.tar", verbose=0, mtime=0, **options) as writer:
        for number, (image, jpeg, _) in enumerate(stored, start=first):
            label = images.labels[image]
            suffix, content = ("json", json.dumps(label)) if isinstance(label, tuple) else ("cls", str(label))
            writer.write({"__key__": _key(number, images.files[image]), "jpg": jpeg, suffix: content})
    if not shards[0]["samples"]:
        raise InputError(f"none of the {len(images)} {name} images could be decoded")
    return shards


def _key(number: int, source: ImageSource) -> str:
    """Unique by its number; what follows is for people, without the dots at which a reader would cut it."""
    stem = Path(source.name).stem
    return f"{number:08d}-" + re.sub(r"[^A-Za-z0-9_-]+", "-", stem)[:48].strip("-")


def _jpeg(source: ImageSource, size: int, quality: int) -> tuple[bytes, bool]:
    """The picture as a JPEG file, at most ``size`` pixels on its short side, and whether it is the original file."""
    picture = read_picture(source)
    short = min(picture.size)
    if short > size:
        width, height = (max(1, round(side * size / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    else:
        original = source.read() if isinstance(source, TarMember) else source.read_bytes()
        if _is_plain_jpeg(original):
            return original, True
    file = io.BytesIO()
    try:
        picture.save(file, "JPEG", quality=quality)
    except OSError as error:
        raise DamagedImage(str(source), f"can't be a JPEG of {picture.width} × {picture.height}: {error}") from error
    return file.getvalue(), False


def _is_plain_jpeg(file: bytes) -> bool:
    """Whether any reader sees what ours does: RGB, and no turn that some apply and some don't."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the size and the tags, as when it was decoded
            with JpegImagePlugin.JpegImageFile(io.BytesIO(file)) as image:
                return image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # no JPEG, or with metadata that a stricter reader may stumble over
        return False
