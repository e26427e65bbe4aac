"""The formulas of the paper as plain loops over batch, tokens, positions and channels: slow, obvious, in float64.

Nothing here shares code with ``tokenlearner.core``; parameters are read from the module under test. The loops are
differentiable, so they give reference gradients too.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a−b| / max |b|, in float64."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def randomized(module: nn.Module) -> nn.Module:
    """Gives every parameter and running statistic a value that shows, so that no zero or one hides a mistake."""
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel()
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean=offset, std=1 / math.sqrt(fan_in) if parameter.ndim > 1 else 0.3)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return module


def layer_norm(v: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the channels of one position."""
    mean = v.sum() / len(v)
    variance = ((v - mean) ** 2).sum() / len(v)
    return (v - mean) / (variance + 1e-6).sqrt() * norm.weight.double() + norm.bias.double()


def gelu(v: Tensor) -> Tensor:
    """The tanh approximation, as in Flax."""
    return 0.5 * v * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def linear(v: Tensor, layer: nn.Linear) -> Tensor:
    """Of one position: a dot product per output channel."""
    return torch.stack([row @ v + bias for row, bias in zip(layer.weight.double(), layer.bias.double())])


def mlp(v: Tensor, alpha: nn.Module) -> Tensor:
    """LayerNorm and MLP d→hidden→S of one position."""
    return linear(gelu(linear(layer_norm(v, alpha.norm), alpha.fc1)), alpha.fc2)


def conv(F: Tensor, weight: Tensor) -> Tensor:
    """A k×k convolution with zero padding and no bias: (h, w, c) → (h, w, s)."""
    h, w, _ = F.shape
    s, _, k, _ = weight.shape
    rows = []
    for y in range(h):
        for x in range(w):
            sums = [F.new_zeros(()) for _ in range(s)]
            for i in range(s):
                for dy in range(k):
                    for dx in range(k):
                        yy, xx = y + dy - k // 2, x + dx - k // 2
                        if 0 <= yy < h and 0 <= xx < w:
                            sums[i] = sums[i] + F[yy, xx] @ weight[i, :, dy, dx].double()
            rows.append(torch.stack(sums))
    return torch.stack(rows).reshape(h, w, s)


def each_position(f, F: Tensor) -> Tensor:
    """f at every position of (h, w, d)."""
    return torch.stack([torch.stack([f(v) for v in row]) for row in F])


def batch_norm(A: Tensor, norm: nn.BatchNorm2d, training: bool) -> Tensor:
    """(b, h, w, s): per token, by the batch's statistics in training and by the running ones otherwise."""
    out = []
    for i in range(A.shape[-1]):
        values = A[..., i]
        if training:
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
        else:
            mean, variance = norm.running_mean[i].double(), norm.running_var[i].double()
        out.append((values - mean) / (variance + norm.eps).sqrt() * norm.weight[i].double() + norm.bias[i].double())
    return torch.stack(out, dim=-1)


def cell_weights(h: int, w: int, row_cuts: list[int], column_cuts: list[int]) -> Tensor:
    """(s, h, w): one over the size of a cell inside it and zero outside, cells in reading order."""
    maps = []
    for top, bottom in pairwise(row_cuts):
        for left, right in pairwise(column_cuts):
            A = torch.zeros(h, w, dtype=torch.float64)
            for y in range(top, bottom):
                for x in range(left, right):
                    A[y, x] = 1 / ((bottom - top) * (right - left))
            maps.append(A)
    return torch.stack(maps)


def maps(learner: nn.Module, X: Tensor) -> Tensor:
    """α(X) after its squash: (b, h, w, d) → (b, s, h, w). For ``grid`` see cell_weights."""
    alpha, (h, w) = learner.alpha, X.shape[1:3]
    out = []
    for F in X:
        if learner.kind == "mlp":
            exponentials = each_position(lambda v: mlp(v, alpha), F).exp()
            A = exponentials / exponentials.sum(dim=(0, 1))
        elif learner.kind == "conv":
            A = each_position(lambda v: layer_norm(v, alpha.norm), F)
            for i in range(4):
                A = conv(A, alpha.convs[i].weight)
                A = gelu(A) if i < 3 else A
        elif learner.kind == "conv1":
            A = conv(F, alpha.conv.weight)
        elif learner.kind == "gate":
            summary = each_position(lambda v: torch.stack([v.max(), v.sum() / len(v)]), F)
            A = conv(summary, alpha.conv.weight)
        else:
            assert learner.kind == "dense"
            A = alpha.weight.double().reshape(-1, h, w).movedim(0, -1)
        out.append(A)
    A = torch.stack(out)
    if learner.kind == "gate":
        A = batch_norm(A, alpha.norm, alpha.norm.training)
    if learner.kind in ("conv", "conv1", "gate"):
        A = 1 / (1 + (-A).exp())
    return A.movedim(-1, 1)


def pooled(A: Tensor, X: Tensor, mean: bool = False) -> Tensor:
    """z_i = ρ(X ⊙ γ(A_i)), position by position: (b, s, h, w), (b, h, w, d) → (b, s, d)."""
    b, h, w, d = X.shape
    Z = []
    for e in range(b):
        for i in range(A.shape[1]):
            z = X.new_zeros(d)
            for y in range(h):
                for x in range(w):
                    z = z + A[e, i, y, x] * X[e, y, x]
            Z.append(z / (h * w) if mean else z)
    return torch.stack(Z).reshape(b, A.shape[1], d)


def average(learner: nn.Module, X: Tensor) -> Tensor:
    """The mean over the frame, then a linear layer whose output is cut into S tokens."""
    d = X.shape[-1]
    return torch.stack([linear(F.reshape(-1, d).sum(0) / F[..., 0].numel(), learner.alpha).reshape(-1, d) for F in X])


def tokens(learner: nn.Module, X: Tensor) -> Tensor:
    if learner.kind == "average":
        return average(learner, X)
    return pooled(maps(learner, X), X, mean=learner.pool == "mean")


def fused(fuser: nn.Module, Z: Tensor, X: Tensor) -> Tensor:
    """β(X) Y of one frame or clip, without the residual: tokens (T·s, d), X (T, n, d) → (T, n, d)."""
    frames, n, d = X.shape
    s = len(Z) // frames
    has_norm = isinstance(fuser.norm1, nn.LayerNorm)
    normed = [layer_norm(z, fuser.norm1) if has_norm else z for z in Z]
    weight, bias = fuser.mix.weight.double(), fuser.mix.bias.double()
    Y = []
    for i in range(len(Z)):  # the same weights for every channel, over all tokens of the clip
        y = bias[i].expand(d)
        for j in range(len(Z)):
            y = y + weight[i, j] * normed[j]
        Y.append(layer_norm(y, fuser.norm2) if has_norm else y)
    out = []
    for t in range(frames):
        for p in range(n):
            v = X[t, p]
            logits = mlp(v, fuser.beta) if hasattr(fuser.beta, "fc1") else linear(v, fuser.beta.fc)
            x = v.new_zeros(d)
            for i in range(s):  # only this frame's own tokens
                x = x + Y[t * s + i] / (1 + (-logits[i]).exp())
            out.append(x)
    return torch.stack(out).reshape(frames, n, d)


def unpooled(A: Tensor, Z: Tensor, normalize: bool) -> Tensor:
    """Aᵀ Z: (b, s, n), (b, s, d) → (b, n, d)."""
    b, s, n = A.shape
    out = []
    for e in range(b):
        for p in range(n):
            total = sum(A[e, i, p] for i in range(s)) if normalize else 1
            out.append(sum(A[e, i, p] / total * Z[e, i] for i in range(s)))
    return torch.stack(out).reshape(b, n, -1)


def reprojected(module: nn.Module, Z: Tensor, X: Tensor) -> Tensor:
    """Multi-head attention with queries from X (n, d) and keys, values from Z (s, d), without the residual."""
    n, d = X.shape
    c = d // module.num_heads
    keys_values = [linear(layer_norm(z, module.norm_tokens), module.kv) for z in Z]
    out = []
    for p in range(n):
        q = linear(layer_norm(X[p], module.norm_x), module.q)
        heads = []
        for e in range(module.num_heads):
            part = slice(e * c, (e + 1) * c)
            scores = torch.stack([(q[part] * kv[:d][part]).sum() / math.sqrt(c) for kv in keys_values])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(weight * kv[d:][part] for weight, kv in zip(weights, keys_values)))
        out.append(linear(torch.cat(heads), module.proj))
    return torch.stack(out)
