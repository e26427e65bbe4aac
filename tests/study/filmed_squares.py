"""A folder as UT-Interaction's: a bright square that crosses a dark ground, or stands there."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlearner.data.write_video import write_video

WIDTH, HEIGHT, SIDE, FPS = 64, 48, 12, 10
CLASSES = ("still", "moving")


def frames(moving: bool, count: int, top: int) -> list[Image.Image]:
    """The square, which moves by three pixels a frame to the right."""
    found = []
    for t in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
        left = 3 * t if moving else 4 * top % (WIDTH - SIDE)
        pixels[top : top + SIDE, left : left + SIDE] = 220
        found.append(Image.fromarray(pixels))
    return found


def film(folder: Path, sequences: Sequence[int], each: int = 1, count: int = 16) -> Path:
    """``folder``/ut_interaction with ``each`` clips of both classes in every sequence (1 to 10 are set 1), one of a
    class to be passed over, and the list of them."""
    root = folder / "ut_interaction"
    rows = []
    for sequence in sequences:
        of_set = 1 if sequence <= 10 else 2
        for label, name in enumerate((*CLASSES, "other")):
            for i in range(each):
                file = f"{name}/set{of_set}_seq{sequence:02}_{i}.mp4"
                write_video(frames(name == "moving", count, 6 + 4 * (i % 6)), root / file, FPS)
                rows.append((file, label, name, of_set, sequence))
    with (root / "clips.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("file", "label", "name", "set", "sequence"), *rows])
    return folder
