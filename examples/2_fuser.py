"""With a TokenFuser every layer learns its own tokens, and the model keeps its full grid for dense prediction."""

import tokenlearner

import timm
import torch

model = timm.create_model("vit_tiny_patch16_224", img_size=(96, 160), num_classes=0).eval()  # not square
tokenlearner.insert(model, num_tokens=16, at=6, fuser="fuser")

images = torch.randn(2, 3, 96, 160)
features = model.forward_intermediates(images, indices=[11], intermediates_only=True)[0]
print(f"features {tuple(features.shape)} from {tokenlearner.cost(model, (3, 96, 160))}")
assert features.shape == (2, 192, 6, 10)

maps = tokenlearner.attention_maps(model, images)
assert sorted(maps) == [6, 7, 8, 9, 10, 11]  # one TokenLearner a layer
assert all(m.shape == (2, 16, 6, 10) for m in maps.values())
