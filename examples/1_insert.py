"""Insertion into a timm ViT: half the multiply-adds, the same parameters, and the way back."""

import tokenlearner

import timm
import torch

model = timm.create_model("vit_small_patch16_224").eval()
images = torch.randn(1, 3, 224, 224)
before, keys = model(images), list(model.state_dict())
plain = tokenlearner.cost(model)

tokenlearner.insert(model, num_tokens=8, at=0.5)  # in place: layers 6 to 11 now run on 8 tokens and the class token
print(f"plain    {plain}")
print(f"8 tokens {tokenlearner.cost(model)}")

maps = tokenlearner.attention_maps(model, images)  # {layer: (batch, tokens, height, width)}
assert maps[6].shape == (1, 8, 14, 14)

tokenlearner.remove(model)
assert list(model.state_dict()) == keys
assert torch.equal(model(images), before)
