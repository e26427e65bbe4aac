"""A transformers model with an insertion: its own save_pretrained and from_pretrained, the insertion included."""

import tempfile

import tokenlearner

import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

config = ViTConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, num_labels=3)
model = ViTForImageClassification(config).eval()  # yours comes from ViTForImageClassification.from_pretrained(...)
print(f"plain    {tokenlearner.cost(model)}")

tokenlearner.insert(model, num_tokens=8, at=0.5)
print(f"8 tokens {tokenlearner.cost(model)}")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForImageClassification.from_pretrained(folder)

images = torch.randn(2, 3, 224, 224)
assert torch.equal(again(images).logits, model(images).logits)
print(type(again).__name__, again.config.token_learner, sep="\n")
