"""Folders of images: found, labelled by folder, split by class, and read with the damaged files counted.

One damaged file in a million must neither end a run nor vanish: ``ImageFiles`` hands it on as ``Damaged``, ``collate``
carries it in the batch, and whoever counts the score can say how many images it stands for.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenlearner.data.decode import DamagedImage, decode_image
from tokenlearner.errors import InputError

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for names in ("jpg jpeg jpe jfif png webp gif bmp", "tif tiff ppm pgm pbm pnm jp2 j2k avif")
    for name in names.split()
)
OnError = Literal["skip", "raise"]  # what to do with a damaged file
HELD_OUT = "held_out.json"  # in a run's folder: the files it kept for evaluation, relative to its data
_HELD_OUT_NAMES = ("val", "valid", "validation", "test")


def find_images(path: str | Path) -> list[Path]:
    """The file itself, whatever its suffix, or every image under the folder at any depth, sorted.

    Suffixes count in either case. Linked folders are followed, each real folder once. Names starting with a dot are
    passed over. Broken links and pipes with an image's name are listed: decoding says what is wrong with them.
    ``InputError`` if there is nothing to find.
    """
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where a parent folder is closed to us)
        return _images_under(path)
    if not os.path.lexists(path):
        raise InputError(f"{path} does not exist: give an image file or a folder of images ({_suffixes()})")
    return [path]


def _images_under(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} can't be listed: {error.strerror}") from error

    found: list[Path] = []
    visited = {os.path.realpath(folder)}
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=refuse):
        enter = []
        for name in sorted(subfolders):
            real = os.path.realpath(Path(directory, name))
            if not name.startswith(".") and real not in visited:
                visited.add(real)  # a link back up, or a second way to the same pictures
                enter.append(name)
        subfolders[:] = enter
        found += [Path(directory, name) for name in names if _is_image_name(name)]
    if not found:
        raise InputError(f"{folder} holds no image: looked at any depth for {_suffixes()}")
    return sorted(found)


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(tuple(IMAGE_SUFFIXES))


def _suffixes() -> str:
    return " ".join(sorted(IMAGE_SUFFIXES))


@dataclass(frozen=True)
class LabelledImages:
    """``labels[i]`` is the position of the class of ``files[i]`` in ``classes``; ``strays`` lay in no class folder."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    strays: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def subset(self, indices: Iterable[int]) -> LabelledImages:
        """These images in this order, of the same classes, without the strays (they belong to the scan)."""
        chosen = list(indices)
        return LabelledImages(tuple(self.files[i] for i in chosen), tuple(self.labels[i] for i in chosen), self.classes)

    def split(self, held_out: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
        """(train, held out), a share ``held_out`` of every class, rounded, but at least one image in each part.

        A class with a single image stays in train. What is held out of a class depends on the seed, the class's name
        and the order of its paths, not on the order of ``files``, the folder they lie in, or the other classes.
        ``InputError`` unless 0 < ``held_out`` < 1 and some class has two images.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out is {held_out}: give the share of the images to hold out, above 0 and below 1")
        members: defaultdict[int, list[int]] = defaultdict(list)
        for index in sorted(range(len(self)), key=self.files.__getitem__):
            members[self.labels[index]].append(index)
        held: set[int] = set()
        for label, indices in members.items():
            count = min(max(round(held_out * len(indices)), 1), len(indices) - 1)  # 0 of a single image
            # A string keeps seeds 1 and -1 apart, which an integer would not; numpy may change its streams.
            held.update(random.Random(f"{seed} {self.classes[label]}").sample(indices, count))
        if not held:
            raise InputError(f"none of {len(self)} images can be held out: no class has two, one for each part")
        return (
            self.subset(i for i in range(len(self)) if i not in held),
            self.subset(i for i in range(len(self)) if i in held),
        )


def scan_class_folders(root: str | Path, classes: Sequence[str] | None = None) -> LabelledImages:
    """The images under ``root``, where each folder is a class and holds its images at any depth.

    The classes are the folders' names, sorted, or ``classes`` in their own order, of which some may have no folder.
    Images lying in ``root`` itself have no class: they are the ``strays``.

    ``InputError`` if ``root`` is no folder or has no class folder, for a folder that is not in ``classes``, for a class
    folder without an image, and for a single class where ``classes`` is not given.
    """
    root = Path(root)
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"{root} can't be listed ({error.strerror}): expected a folder that holds one for each class"
        ) from error
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        raise InputError(f"{root} holds no class folder: expected one folder for each class, with its images inside")
    if classes is None:
        classes = [folder.name for folder in folders]
        if len(classes) < 2:
            raise InputError(f"{root} holds a single class folder, {classes[0]}: expected at least 2 classes")
    label_of = {name: label for label, name in enumerate(classes)}
    if len(label_of) < len(classes):
        raise InputError(f"a class name is there twice: {_abbreviated(sorted(classes))}")
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        if folder.name not in label_of:
            raise InputError(f"{folder} is not one of the {len(classes)} known classes: {_abbreviated(classes)}")
        images = _images_under(folder)
        files += images
        labels += [label_of[folder.name]] * len(images)
    strays = tuple(entry for entry in entries if _is_image_name(entry.name) and not entry.is_dir())
    return LabelledImages(tuple(files), tuple(labels), tuple(classes), strays)


def _abbreviated(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", … and {len(names) - most} more" if len(names) > most else "")


def find_splits(root: str | Path) -> tuple[Path, Path | None]:
    """(root/train, root/val) if both are there, else (root, None). Without val: valid, validation or test."""
    root = Path(root)
    held_out = next((root / name for name in _HELD_OUT_NAMES if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        return root, None
    return root / "train", held_out


class Damaged(NamedTuple):
    """A file that could not be decoded, and why, in words."""

    path: str
    reason: str


Sample = tuple[Tensor, int, int]


class ImageFiles(Dataset[Sample | Damaged]):
    """``images`` read one at a time: (transformed picture, label, index), or ``Damaged`` in its place.

    ``transform`` takes an upright RGB picture and must be picklable for DataLoader workers. With ``on_error="raise"`` a
    damaged file raises ``DamagedImage`` instead. What ``transform`` raises is not the file's fault and is passed on.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: Callable[[Image.Image], Tensor],
        on_error: OnError = "skip",
    ) -> None:
        self.images = images
        self.transform = transform
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Sample | Damaged:
        try:
            picture = decode_image(self.images.files[i])
        except DamagedImage as damaged:
            if self.on_error == "raise":
                raise
            return Damaged(damaged.path, damaged.reason)
        return self.transform(picture), self.images.labels[i], i


def damaged_entries(damaged: Iterable[Damaged]) -> dict[str, Any]:
    """The damaged files as every summary and JSON document lists them."""
    files = [{"file": entry.path, "reason": entry.reason} for entry in damaged]
    return {"count": len(files), "files": files}


class Batch(NamedTuple):
    """``images`` (b, …), ``labels`` (b,) and ``indices`` (b,) of the b readable files, and the ones that were not."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    damaged: tuple[Damaged, ...]


def collate(samples: Sequence[Sample | Damaged]) -> Batch:
    """The readable ``samples`` stacked, the damaged carried along; ``images`` has shape (0,) if none was readable."""
    damaged = tuple(sample for sample in samples if isinstance(sample, Damaged))
    good = [sample for sample in samples if not isinstance(sample, Damaged)]
    return Batch(
        torch.stack([image for image, _, _ in good]) if good else torch.empty(0),
        torch.tensor([label for _, label, _ in good], dtype=torch.int64),
        torch.tensor([index for _, _, index in good], dtype=torch.int64),
        damaged,
    )
