"""The two modules of the paper on their own: eight tokens out of a feature map, and back onto it."""

from tokenlearner import TokenFuser, TokenLearner

import torch

x = torch.randn(2, 14, 14, 192)  # a feature map, (batch, height, width, channels)

learner = TokenLearner(dim=192, num_tokens=8)
tokens = learner(x)  # (2, 8, 192): what every later layer runs on
maps = learner.maps(x)  # (2, 8, 14, 14): where each token looks; each map sums to one

fuser = TokenFuser(dim=192, num_tokens=8)
y = fuser(tokens, x)  # (2, 14, 14, 192): the tokens back on the grid, x added

print(f"{tuple(x.shape)} -> tokens {tuple(tokens.shape)} -> {tuple(y.shape)}")
assert torch.allclose(maps.sum(dim=(2, 3)), torch.ones(2, 8), atol=1e-5)
assert torch.equal(y, x)  # a new fuser adds nothing: its mixing matrix starts at zero, as in the official code
