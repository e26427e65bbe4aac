"""Which output of a trained model is which class of somebody's data."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import timm.data

from tokenlearner.data.images import unknown_class
from tokenlearner.errors import InputError

Data = TypeVar("Data")


def published_labels(outputs: int) -> list[str] | None:
    """The class folders' names of the ImageNet whose number of classes this is, in the order of timm's outputs."""
    info = _imagenet(outputs)
    return info.label_names() if info else None


def read_as(
    labels: Sequence[str], read: Callable[[Sequence[str] | None], Data], found: Callable[[Data], Sequence[str]]
) -> Data:
    """``read(classes)`` with the classes in the order of a model's ``labels``.

    Where the data has other names for them, ``classes`` has these in the labels' places: names that differ in case and
    punctuation only, one of several in a label ("tench, Tinca tinca"), and of ImageNet's classes the words for a folder
    such as n01440764, or such a folder for the words. A label that is there twice is told apart by its place, as
    :func:`distinct` does.

    Args:
        read: Takes the classes, or None to take them from the data.
        found: The classes of what ``read`` gave.

    Raises:
        InputError: The data has a class that is none of the labels, or could be two of them.
    """
    known = distinct(labels)
    try:
        return read(known)
    except InputError as error:
        try:
            names = found(read(None))
        except InputError:
            raise error from None  # it is not about classes
        if set(names) <= set(known):
            raise
        return read(renamed(labels, names))


def distinct(labels: Sequence[str]) -> list[str]:
    """``labels``, with its place behind each that is there twice: of ImageNet's cranes, "crane (134)" is the bird."""
    times = Counter(labels)
    return [f"{label} ({place})" if times[label] > 1 else label for place, label in enumerate(labels)]


def renamed(labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """``labels``, told apart as :func:`distinct` does, and each replaced by the one of ``names`` that means it, if any.

    Raises:
        InputError: A name means none of them, or several, or two mean the same.
    """
    known: defaultdict[str, set[int]] = defaultdict(set)
    for place, words in enumerate(_words(labels)):
        for word in words:
            known[_plain(word)].add(place)
    labels = distinct(labels)
    classes = list(labels)
    for name in names:
        places = {labels.index(name)} if name in labels else known[_plain(name)]
        if not places:
            raise InputError(f"the class {name} {unknown_class(name, labels)}")
        if len(places) > 1:
            raise InputError(
                f"the class {name} could be {' or '.join(labels[place] for place in sorted(places))}: name it as one"
            )
        (place,) = places
        if classes[place] != labels[place]:
            raise InputError(f"the classes {classes[place]} and {name} both mean {labels[place]}: put them into one")
        classes[place] = name
    return classes


def _words(labels: Sequence[str]) -> list[list[str]]:
    """What each of the labels may be called."""
    found = [[label, *label.split(",")] for label in labels]
    info = _imagenet(len(labels))
    if info is None:
        return found
    folders = info.label_names()
    described = [info.label_name_to_description(folder).split(",") for folder in folders]
    if list(labels) == folders:
        return [[*own, *words] for own, words in zip(found, described)]
    alike = sum(bool({*map(_plain, own)} & {*map(_plain, words)}) for own, words in zip(found, described))
    if alike < 0.9 * len(labels):  # as many outputs as ImageNet has classes, and others, or in another order
        return found
    return [[*own, folder] for own, folder in zip(found, folders)]


def _plain(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.replace("_", " ").casefold()))


def _imagenet(outputs: int) -> timm.data.ImageNetInfo | None:
    subset = {1000: "imagenet-1k", 11821: "imagenet-12k", 21841: "imagenet-22k", 21843: "imagenet-21k-goog"}.get(
        outputs
    )
    return timm.data.ImageNetInfo(subset) if subset else None
