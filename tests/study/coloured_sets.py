"""A set of pictures that a tiny model tells apart in an epoch, and the settings to do it by."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from tokenlearner.study.pictures import Pictures

COLOURS = {"blue": (40, 40, 200), "red": (200, 40, 40)}
TINY = Pictures(
    data="colours",
    side=8,
    width=8,
    depth=2,
    epochs=1,
    batch_size=8,
    lr=1e-2,
    warmup_epochs=0.0,
    ema=0.5,
    padding=4,
    precision="32-true",
)


def draw_set(folder: Path, train: int, test: int, colours: Sequence[str] = tuple(COLOURS), side: int = 8) -> Path:
    """``folder``/train and /test with so many noisy pictures a class; the same every time."""
    random = np.random.default_rng(0)
    for part, each in (("train", train), ("test", test)):
        for name in colours:
            (folder / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = np.array(COLOURS[name]) + random.integers(-40, 41, (side, side, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i:02}.png")
    return folder
