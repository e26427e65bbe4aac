"""Measures how fast one worker reads pictures, against bare Pillow decoding and resizing the same files.

python benchmarks/image_loading.py PICTURES  # a folder of them → benchmarks/image_loading.json (about a minute)
python benchmarks/image_loading.py           # the same of 200 JPEGs that it draws, 500 × 375

Evaluation is a model's own transform (resize, centre crop, normalise), training that of a recipe as it comes (random
crop, flip, RandAugment, colours, normalise), and training_crops has random crops and flips alone. Bare Pillow opens the
file, turns it into RGB, resizes it as evaluation does and crops the centre, which stays in 8 bits: no tensor, no
normalisation. The draft mode, in which JPEGs are decoded at a part of their size, is nobody's: it changes the pixels.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenlearner import Preprocessing  # before what imports torchvision
from tokenlearner.data.images import Damaged, ImageFiles, LabelledImages, find_images
from tokenlearner.inspection.summary import hardware
from tokenlearner.training.material import training_transform
from tokenlearner.training.recipe import AugmentRecipe

import numpy as np
import PIL
import torch
from PIL import Image

OUTPUT = Path(__file__).parent / "image_loading.json"
PREPROCESSING = Preprocessing((3, 224, 224), interpolation="bicubic", crop_pct=0.875)
CROPS = AugmentRecipe(auto_augment=None, color_jitter=0.0)
DRAWN, DRAWN_SIZE = 200, (500, 375)


def draw(folder: Path) -> Path:
    """Pictures with detail at every scale, as noise that is smoothed and added up, so that JPEG has work to do."""
    generator = np.random.default_rng(0)
    for i in range(DRAWN):
        total = np.zeros((*DRAWN_SIZE[::-1], 3))
        for side in (4, 16, 64, 256):
            noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8))
            total += np.asarray(noise.resize(DRAWN_SIZE, Image.Resampling.BICUBIC), float)
        Image.fromarray((total / 4).astype(np.uint8)).save(folder / f"{i:03}.jpg", quality=90)
    return folder


def bare(path: Path) -> Image.Image:
    """The picture as evaluation sees it, still in 8 bits."""
    _, height, width = PREPROCESSING.input_size
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    short = math.floor(height / PREPROCESSING.crop_pct)
    factor = short / min(picture.size)
    size = tuple(int(side * factor) for side in picture.size)  # as torchvision rounds the longer side
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return picture.crop((left, top, left + width, top + height))


def only_decoded(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def as_pixels(image: torch.Tensor) -> np.ndarray:
    """The normalised picture in 8 bits again."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return ((image * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def pictures_per_second(read: Callable[[int], Any], count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        read(i)
    return count / (time.perf_counter() - start)


def measure(files: list[Path], rounds: int) -> dict[str, Any]:
    images = LabelledImages(tuple(files), (0,) * len(files), ("pictures",))
    evaluation = ImageFiles(images, PREPROCESSING.transform())
    readers: dict[str, Callable[[int], Any]] = {
        "evaluation": evaluation.__getitem__,
        "training": ImageFiles(images, training_transform(PREPROCESSING, AugmentRecipe())).__getitem__,
        "training_crops": ImageFiles(images, training_transform(PREPROCESSING, CROPS)).__getitem__,
        "bare_resized": lambda i: bare(files[i]),
        "bare": lambda i: only_decoded(files[i]),
    }
    samples = [evaluation[i] for i in range(len(files))]
    if damaged := [sample.path for sample in samples if isinstance(sample, Damaged)]:
        raise SystemExit(f"{len(damaged)} damaged files, such as {damaged[0]}: give a folder of sound pictures")
    same = sum(np.array_equal(as_pixels(sample[0]), np.asarray(bare(path))) for sample, path in zip(samples, files))
    del samples
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):  # in turn, so that what else the machine does falls on all of them
        for name, read in readers.items():
            speeds[name].append(pictures_per_second(read, len(files)))
    ratios = {
        name: {
            base: round(statistics.median(a / b for a, b in zip(speeds[name], speeds[base])), 3)
            for base in ("bare_resized", "bare")
        }
        for name in ("evaluation", "training", "training_crops")
    }
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    return {"files": len(files), "files_with_equal_pixels": same, "pictures_per_second": medians, "ratio_over": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most", type=int, default=300, help="Takes so many files, evenly spread over the folder.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        found = find_images(arguments.pictures or draw(Path(name)))
        files = found[:: max(1, math.ceil(len(found) / arguments.most))]
        measured = measure(files, arguments.rounds)
    document = {
        "command": "python benchmarks/image_loading.py" + (" PICTURES" if arguments.pictures else ""),
        "what": "each picture to 224 × 224 in one process and one thread; bare: decoded to RGB alone",
        "pictures": arguments.pictures.name if arguments.pictures else "drawn, 500 × 375, JPEG of quality 90",
        "hardware": hardware(),
        "pillow": PIL.__version__,
        "rounds": arguments.rounds,
        **measured,
    }
    OUTPUT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
