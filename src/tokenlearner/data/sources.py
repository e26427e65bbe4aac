"""What DATA may be: class folders, a CSV or shards, in one part or with an evaluation part beside the training part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tokenlearner.data.images import VAL_NAMES, LabelledImages, find_splits, scan_class_folders
from tokenlearner.data.lists import read_list
from tokenlearner.data.members import ImageSource, TarMember
from tokenlearner.data.shards import COMPRESSED, holds_shards, read_shards, shard_splits
from tokenlearner.errors import InputError


@dataclass(frozen=True)
class ImageData:
    """Training and evaluation images of one class list; ``held_out_of`` is the data the latter were split from."""

    train: LabelledImages
    val: LabelledImages
    held_out_of: Path | None


class Part(NamedTuple):
    """A part of DATA, not read yet. ``name`` is how a sentence calls it: val/, val.csv, the val shards."""

    name: str
    read: Callable[[Sequence[str] | None], LabelledImages]
    """Takes the classes, or None where they are to be found."""


def find_parts(data: Path) -> tuple[Part, Part | None]:
    """(training part, evaluation part), or (all of DATA, None) where it has no evaluation part.

    DATA is, the first that fits:

    - a .csv or .tar file;
    - a folder with shards in it and no folder, or with our dataset.json; their names may have the words train and val;
    - a folder with train.csv and val.csv;
    - a folder with the folders train and val, each of class folders or of shards;
    - a folder of class folders.

    In place of val: valid, validation or test. ``InputError`` for a file of another kind.
    """
    if not data.is_dir():
        if _is_list(data):
            return Part(data.name, partial(read_list, data)), None
        if data.name.lower().endswith((".tar", *COMPRESSED)):
            return Part(data.name, partial(read_shards, data)), None
    if data.is_file():
        raise InputError(f"{data} is neither a .csv nor a .tar: expected one of these, or a folder of images or shards")
    if holds_shards(data):
        splits = shard_splits(data)
        val = next((name for name in VAL_NAMES if name in splits), None)
        if val is None or "train" not in splits:
            return Part("all shards", partial(read_shards, data)), None
        return (
            Part("the train shards", partial(read_shards, data, split="train")),
            Part(f"the {val} shards", partial(read_shards, data, split=val)),
        )
    train_list = data / "train.csv"
    val_list = next((data / f"{name}.csv" for name in VAL_NAMES if (data / f"{name}.csv").is_file()), None)
    if val_list is not None and train_list.is_file():
        return Part("train.csv", partial(read_list, train_list)), Part(val_list.name, partial(read_list, val_list))
    train_folder, val_folder = find_splits(data)
    return _folder_part(train_folder), None if val_folder is None else _folder_part(val_folder)


def _is_list(data: Path) -> bool:
    return data.suffix.lower() == ".csv" and not data.is_dir()


def _folder_part(folder: Path) -> Part:
    return Part(f"{folder.name}/", partial(read_shards if holds_shards(folder) else scan_class_folders, folder))


def read_parts(data: Path, classes: Sequence[str] | None = None) -> tuple[LabelledImages, LabelledImages | None]:
    """The images of both parts, of ``classes`` or else of the training part's; multi-label in both if they are in one.

    ``InputError`` for what is none of the kinds of data, or a broken one.
    """
    train_part, val_part = find_parts(data)
    train = train_part.read(classes)
    if val_part is None:
        return train, None
    val = val_part.read(train.classes)
    if train.multilabel or val.multilabel:
        return train.as_multilabel(), val.as_multilabel()
    return train, val


def read_images(data: Path, held_out: float, seed: int, classes: Sequence[str] | None = None) -> ImageData:
    """Images to train on and to evaluate on: where there is no evaluation part, a share ``held_out`` is split off.

    They are of ``classes`` where these are given, of which some may have no image.

    ``InputError`` for what is none of the kinds of data, a broken one, and one that can't be split.
    """
    images, val = read_parts(data, classes)
    if val is not None:
        return ImageData(images, val, None)
    train, val = images.split(held_out, seed)
    return ImageData(replace(train, strays=images.strays), val, data)


def read_split(data: Path, classes: Sequence[str] | None = None) -> LabelledImages:
    """The evaluation part alone, or everything where there is none; labels are positions in ``classes`` if given.

    It is multi-label by its own labels only: ``as_multilabel`` makes it so where the training part was.
    """
    train_part, val_part = find_parts(data)
    return (val_part or train_part).read(classes)


def name_of(source: ImageSource, data: Path) -> str:
    """How held_out.json names an image of ``data``, wherever that lies: its path from the folder, or from the CSV's, or
    ``archive/member``; in full where it lies elsewhere.
    """
    if isinstance(source, TarMember):
        return f"{source.archive.name}/{source.name}"
    folder = data.parent if _is_list(data) else data
    return (source.relative_to(folder) if source.is_relative_to(folder) else source).as_posix()


def held_out_names(images: ImageData) -> list[str]:
    """The names of the images that were split off for evaluation; none where the data has an evaluation part."""
    if images.held_out_of is None:
        return []
    return [name_of(source, images.held_out_of) for source in images.val.files]
