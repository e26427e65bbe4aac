"""A trained model made cheaper without a label: with 8 tokens it learns to give the features that it gave before."""

import random
import tempfile
from pathlib import Path

import tokenlearner
from tokenlearner.training.compress import compress
from tokenlearner.training.recipe import AugmentRecipe, CompressOptimizer, CompressRecipe

from PIL import Image
from sklearn.datasets import load_sample_images

recipe = CompressRecipe(
    tokens=8,
    at=0.5,
    elastic=True,  # so that it can do with fewer later
    epochs=2,
    batch_size=32,
    workers=0,
    optimizer=CompressOptimizer(lr=1e-3),
    augment=AugmentRecipe(auto_augment=None),
)

with tempfile.TemporaryDirectory() as folder:
    pictures, output = Path(folder) / "pictures", Path(folder) / "cheaper"
    pictures.mkdir()
    random.seed(0)
    for i in range(400):  # pieces of scikit-learn's two photos; your own pictures in any folder will do
        photo = Image.fromarray(load_sample_images().images[i % 2])
        x, y = random.randrange(photo.width - 96), random.randrange(photo.height - 96)
        photo.crop((x, y, x + 96, y + 96)).save(pictures / f"{i}.png")

    summary = compress("tokenlearner_micro4_32_plain", pictures, output, recipe, unlabelled=True)
    model = tokenlearner.load(output)

scores = summary["features"]
assert scores["trained"]["cosine"] > scores["untrained"]["cosine"]
for tokens in (8, 2):
    tokenlearner.set_num_tokens(model, tokens)
    macs = tokenlearner.cost(model, model.preprocessing.model_input).macs
    print(f"{tokens} tokens: {macs / summary['models'][0]['macs']:.2f} of the host's multiply-adds")
