"""A saved model is a folder with everything in it: host, insertion, preprocessing, labels, weights."""

import tempfile

import tokenlearner

import timm
import torch

model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
tokenlearner.insert(model, num_tokens=8, at=0.5).eval()

with tempfile.TemporaryDirectory() as folder:
    tokenlearner.save(model, folder, labels=["cat", "dog", "heron"])
    again = tokenlearner.load(folder)

images = torch.randn(2, 3, 224, 224)
assert torch.equal(again(images), model(images))
print(tokenlearner.insertion_of(again).describe(), again.preprocessing, again.label_names, sep="\n")
