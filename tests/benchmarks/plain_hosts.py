"""Small ViTs with all parameters at random, and their layers taken one token at a time with loops."""

import math

import torch
from timm.models.vision_transformer import VisionTransformer

SIZE = (3, 16, 16)
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5}
HOSTS = {
    "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "mean, norm after": {"class_token": False, "global_pool": "avg", "fc_norm": True, "qk_norm": True},
    "class token, registers": {"class_token": True, "reg_tokens": 2, "init_values": 0.5},
    "class token, mean": {"class_token": True, "global_pool": "avg", "fc_norm": False},
}


def host(name="mean", **options):
    torch.manual_seed(3)
    model = VisionTransformer(**{**TINY, **HOSTS[name], **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens_of(model, image):
    """The tokens that enter the first layer, as a list of vectors."""
    return list(model._pos_embed(model.patch_embed(image[None]))[0])


def softmax(numbers):
    weights = [torch.exp(number) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def attention_of(block, tokens, sizes):
    """For each token what attention adds to it, all keys (token, head) and all weights (head, query, key)."""
    attn = block.attn
    projected = [attn.qkv(block.norm1(token)).unflatten(0, (3, attn.num_heads, -1)) for token in tokens]
    keys = [attn.k_norm(p[1]) for p in projected]
    weights = []
    for head in range(attn.num_heads):
        rows = []
        for p in projected:
            query = attn.q_norm(p[0])[head]
            logits = [query @ key[head] / math.sqrt(len(query)) + math.log(s) for key, s in zip(keys, sizes)]
            rows.append(softmax(logits))
        weights.append(rows)
    added = []
    for i in range(len(tokens)):
        heads = [sum(w * p[2][head] for w, p in zip(weights[head][i], projected)) for head in range(attn.num_heads)]
        added.append(block.ls1(attn.proj(torch.cat(heads))))
    return added, keys, weights


def with_mlp(block, tokens):
    return [token + block.ls2(block.mlp(block.norm2(token))) for token in tokens]


def logits_of(model, tokens, sizes):
    """The head on the class token, or on the mean of the patches weighted by their sizes."""
    tokens = [model.norm(token) for token in tokens]
    if model.global_pool == "token":
        pooled = tokens[0]
    else:
        patches = list(zip(tokens, sizes))[model.num_prefix_tokens :]
        pooled = sum(token * size for token, size in patches) / sum(size for _, size in patches)
    return model.head(model.fc_norm(pooled))
