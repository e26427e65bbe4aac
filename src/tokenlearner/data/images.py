"""Images: found in folders, labelled by folder, split by class, and read with the damaged files counted.

One damaged file in a million must neither end a run nor vanish: ``ImageFiles`` hands it on as ``Damaged``, ``collate``
carries it in the batch, and whoever counts the score can say how many images it stands for.
"""

from __future__ import annotations

import difflib
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenlearner.data.decode import DamagedImage, decode_image
from tokenlearner.data.members import ImageSource, TarMember
from tokenlearner.errors import InputError

IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for names in ("jpg jpeg jpe jfif png webp gif bmp", "tif tiff ppm pgm pbm pnm jp2 j2k avif")
    for name in names.split()
)
OnError = Literal["skip", "raise"]  # what to do with a damaged file
Label = int | tuple[int, ...]  # one class, or any number of them where images are multi-label
HELD_OUT = "held_out.json"  # in a run's folder: the files it kept for evaluation, relative to its data
VAL_NAMES = ("val", "valid", "validation", "test")  # of the evaluation part beside "train"


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


class Labelled:
    """What images and clips have in common that know their classes."""

    labels: tuple[Label, ...]

    @property
    def multilabel(self) -> bool:
        return bool(self.labels) and isinstance(self.labels[0], tuple)

    def as_multilabel(self) -> Self:
        """The same, each of one class where they were not multi-label."""
        if self.multilabel:
            return self
        labels = tuple((label,) for label in self.labels if isinstance(label, int))
        return replace(self, labels=labels)  # type: ignore[type-var]


@dataclass(frozen=True)
class LabelledImages(Labelled):
    """``labels[i]`` is the position in ``classes`` of the class of ``files[i]``, or of its classes where the images are
    multi-label (of all or of none of them); ``strays`` lay in no class folder.
    """

    files: tuple[ImageSource, ...]
    labels: tuple[Label, ...]
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
        Multi-label images are split as if they were one class: a rare class may be missing from a part.
        ``InputError`` unless 0 < ``held_out`` < 1 and some class has two images.
        """
        if not 0 < held_out < 1:
            raise InputError(f"held_out is {held_out}: give the share of the images to hold out, above 0 and below 1")
        members: defaultdict[str, list[int]] = defaultdict(list)
        for index in sorted(range(len(self)), key=self.files.__getitem__):
            label = self.labels[index]
            members[self.classes[label] if isinstance(label, int) else ""].append(index)
        held: set[int] = set()
        for name, indices in members.items():
            count = min(max(round(held_out * len(indices)), 1), len(indices) - 1)  # 0 of a single image
            # A string keeps seeds 1 and -1 apart, which an integer would not; numpy may change its streams.
            held.update(random.Random(f"{seed} {name}").sample(indices, count))
        if not held:
            raise InputError(f"none of {len(self)} images can be held out: no class has two, one for each part")
        return (
            self.subset(i for i in range(len(self)) if i not in held),
            self.subset(i for i in range(len(self)) if i in held),
        )


def folder_classes(root: Path, folders: Sequence[Path], classes: Sequence[str] | None, content: str) -> Sequence[str]:
    """``classes``, or the names of the class ``folders`` of ``root``; ``content`` is what a sentence calls their files.

    ``InputError`` if there is no folder, or a single one to take the classes from.
    """
    if not folders:
        raise InputError(f"{root} holds no class folder: expected one folder for each class, with its {content} inside")
    if classes is None:
        classes = [folder.name for folder in folders]
        if len(classes) < 2:
            raise InputError(f"{root} holds a single class folder, {classes[0]}: expected at least 2 classes")
    return classes


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
    classes = folder_classes(root, folders, classes, "images")
    label_of = class_positions(classes)
    files: list[Path] = []
    labels: list[int] = []
    for folder in folders:
        if folder.name not in label_of:
            raise InputError(f"{folder} {unknown_class(folder.name, classes)}")
        images = _images_under(folder)
        files += images
        labels += [label_of[folder.name]] * len(images)
    strays = tuple(entry for entry in entries if _is_image_name(entry.name) and not entry.is_dir())
    return LabelledImages(tuple(files), tuple(labels), tuple(classes), strays)


def class_positions(classes: Sequence[str]) -> dict[str, int]:
    """Each class's place in the list; ``InputError`` if a name is there twice."""
    positions = {name: position for position, name in enumerate(classes)}
    if len(positions) < len(classes):
        raise InputError(f"a class name is there twice: {_abbreviated(sorted(classes))}")
    return positions


def unknown_class(name: str, classes: Sequence[str]) -> str:
    """The rest of a sentence about a class that is none of ``classes``."""
    near = difflib.get_close_matches(name, classes, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"is not one of the {len(classes)} known classes: {_abbreviated(classes)}{hint}"


def _abbreviated(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f", … and {len(names) - most} more" if len(names) > most else "")


def find_splits(root: str | Path) -> tuple[Path, Path | None]:
    """(root/train, root/val) if both are there, else (root, None). Without val: valid, validation or test."""
    root = Path(root)
    held_out = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        return root, None
    return root / "train", held_out


class Damaged(NamedTuple):
    """A file that could not be decoded, and why, in words."""

    path: str
    reason: str


def read_picture(source: ImageSource) -> Image.Image:
    """The picture as ``decode_image`` gives it; ``DamagedImage`` names a tar's member as ``archive/member``."""
    if not isinstance(source, TarMember):
        return decode_image(source)
    try:
        return decode_image(source.read())
    except DamagedImage as damaged:
        raise DamagedImage(str(source), damaged.reason) from damaged
    except OSError as error:
        raise DamagedImage(str(source), error.strerror or str(error)) from error


Sample = tuple[Tensor, int | Tensor, int]


class ImageFiles(Dataset[Sample | Damaged]):
    """``images`` read one at a time: (transformed picture, label, index), or ``Damaged`` in its place.

    The label of a multi-label image is a float vector with a 1 for each of its classes.

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
            picture = read_picture(self.images.files[i])
        except DamagedImage as damaged:
            if self.on_error == "raise":
                raise
            return Damaged(damaged.path, damaged.reason)
        label = self.images.labels[i]
        if isinstance(label, tuple):
            target = torch.zeros(len(self.images.classes))
            target[list(label)] = 1.0
            return self.transform(picture), target, i
        return self.transform(picture), label, i


def damaged_entries(damaged: Iterable[Damaged]) -> dict[str, Any]:
    """The damaged files as every summary and JSON document lists them."""
    files = [{"file": entry.path, "reason": entry.reason} for entry in damaged]
    return {"count": len(files), "files": files}


class Batch(NamedTuple):
    """``images`` (b, …), ``labels`` (b,) and ``indices`` (b,) of the b readable files, and the ones that were not.

    Multi-label ``labels`` are (b, classes) of 0.0 and 1.0.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    damaged: tuple[Damaged, ...]


def collate(samples: Sequence[Sample | Damaged]) -> Batch:
    """The readable ``samples`` stacked, the damaged carried along; ``images`` has shape (0,) if none was readable."""
    damaged = tuple(sample for sample in samples if isinstance(sample, Damaged))
    good = [sample for sample in samples if not isinstance(sample, Damaged)]
    targets = [label for _, label, _ in good if isinstance(label, Tensor)]
    labels = [label for _, label, _ in good if not isinstance(label, Tensor)]
    return Batch(
        torch.stack([image for image, _, _ in good]) if good else torch.empty(0),
        torch.stack(targets) if targets else torch.tensor(labels, dtype=torch.int64),
        torch.tensor([index for _, _, index in good], dtype=torch.int64),
        damaged,
    )
