"""Pictures of two classes that a tiny model tells apart in an epoch or two: noise around a colour."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "blue": (40, 40, 200)}


def draw_photos(folder: Path, each: int, colours: dict[str, tuple[int, int, int]] = COLOURS, noise: int = 40) -> Path:
    """``each`` pictures of 24×24 pixels for every class, in a folder of its name; the same every time."""
    numbers = np.random.default_rng(0)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = np.array(colour) + numbers.integers(-noise, noise + 1, (24, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02}.png")
    return folder
