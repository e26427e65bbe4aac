"""Training on a folder of class folders from Python, and using the result."""

import random
import tempfile
from pathlib import Path

import tokenlearner
from tokenlearner.data.images import scan_class_folders
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.training.recipe import Recipe
from tokenlearner.training.train import train

from PIL import Image, ImageDraw


def draw(shape: str) -> Image.Image:
    """A circle or a square of random size and place: stands for your photos."""
    picture = Image.new("RGB", (32, 32), "black")
    size = random.randint(8, 16)
    left, top = random.randint(0, 31 - size), random.randint(0, 31 - size)
    box = (left, top, left + size, top + size)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill="white")
    return picture


random.seed(0)
with tempfile.TemporaryDirectory() as folder:
    data, output = Path(folder) / "shapes", Path(folder) / "run"
    for shape in ("circle", "square"):
        (data / shape).mkdir(parents=True)
        for i in range(40):
            draw(shape).save(data / shape / f"{i}.png")

    recipe = Recipe(model="vit_tiny_patch16_224", image_size=32, tokens=2, epochs=2, batch_size=16, workers=0)
    summary = train(data, recipe, output)
    score = evaluate(tokenlearner.load(output), scan_class_folders(data), workers=0)

print(f"held-out accuracy {summary['models'][0]['accuracy']:.1%}, on all {score.images} pictures {score.top1:.1%}")
assert score.images == 80
