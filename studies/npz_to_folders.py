"""Turns a set of ``../shared/data/images/*.npz`` into class folders, as ``tokenlearner train`` reads them.

    python studies/npz_to_folders.py ../shared/data/images/flowers128.npz runs/flowers

writes ``OUT/train/daisy/00012.jpg``, ``OUT/val/…`` and ``OUT/test/…`` where the set has a split, and
``OUT/daisy/00012.jpg`` where it has none. The JPEG bytes are copied as they are; the number is the position in the
file. Sets whose split is the file name (CIFAR-10) go into one folder with two commands:

    python studies/npz_to_folders.py ../shared/data/images/cifar10_train.npz runs/cifar10-folders/train
    python studies/npz_to_folders.py ../shared/data/images/cifar10_test.npz runs/cifar10-folders/val
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np


def convert(npz: Path, out: Path) -> Counter[str]:
    """Writes every image; returns how many went into each split ("" where there is none).

    Raises:
        ValueError: The file is no such set, or a folder that it would fill has files already: two sets in one folder
            would be one training set by mistake.
    """
    with np.load(npz) as data:
        if missing := {"jpeg", "offsets", "labels", "classes"} - set(data.files):
            raise ValueError(f"no image set: it lacks {', '.join(sorted(missing))}")
        jpeg, offsets, labels = data["jpeg"], data["offsets"], data["labels"]
        classes = [str(name) for name in data["classes"]]
        splits = [str(name) for name in data["split"]] if "split" in data.files else [""] * len(labels)
    folders = {(split, label): out / split / classes[label] for split in set(splits) for label in range(len(classes))}
    for folder in folders.values():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} has files already; give an empty OUT")
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for i, (split, label) in enumerate(zip(splits, labels)):
        path = folders[split, int(label)] / f"{i:05}.jpg"
        path.write_bytes(jpeg[offsets[i] : offsets[i + 1]].tobytes())
    return Counter(splits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        counts = convert(given.npz, given.out)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"npz_to_folders: {given.npz}: {error}")
    for split, count in sorted(counts.items()):
        print(f"{count} images in {given.out / split}")


if __name__ == "__main__":
    main()
