"""What both kernels' tests compare with: the MLP of α written out in float64, and how near is near enough."""

import math

import torch

HIDDEN = 10
# Of the largest value, after a few roundings (inputs of products, parts, output); the interpreter cuts bfloat16 off.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def weights(d, s, dtype, device, logits=1.0):
    """γ, β, W₁, b₁, W₂, b₂ with values that show, ``logits`` the size of what comes out."""
    sizes = [(d,), (d,), (HIDDEN, d), (HIDDEN,), (s, HIDDEN), (s,)]
    scales = [0.3, 0.3, 1 / math.sqrt(d), 0.3, logits / math.sqrt(HIDDEN), 0.3]
    made = [scale * torch.randn(size) for size, scale in zip(sizes, scales)]
    made[0] += 1
    return [weight.to(device, dtype) for weight in made]


def logits(X, gamma, beta, w1, b1, w2, b2, eps=1e-6):
    """α(X) before its squash, (b, n, s)."""
    X, gamma, beta, w1, b1, w2, b2 = (tensor.double() for tensor in (X, gamma, beta, w1, b1, w2, b2))
    centred = X - X.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gamma + beta
    z = normed @ w1.T + b1
    hidden = z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return hidden @ w2.T + b2


def assert_near(out, expected, tolerance):
    assert out.shape == expected.shape
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance
