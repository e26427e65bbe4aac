"""The bottleneck block's parts against loops over positions, and the ten modules' costs against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from core import naive
from core.naive import randomized, relative_error
from tokenlearner.core import KINDS
from tokenlearner.errors import InputError
from tokenlearner.inspection.cost import cost
from tokenlearner.models.bottleneck import (
    MODULES,
    Attention,
    FrameBoT,
    FrameMixer,
    RecomputeSafeBatchNorm3d,
    SpaceTimeAttention,
    TokenTransformer,
    bot_block,
    bottleneck,
    middle,
    module_rows,
)

B, D, T, H, W, S = 2, 8, 4, 2, 3, 3


def clip(dim=D, **options):
    return torch.randn(B, dim, T, H, W, **options)


def agree(module, out, expected, inputs, tolerance=1e-10):
    """The outputs, and the gradients of every input."""
    assert relative_error(out, expected) < tolerance
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)
    for gradient, expected_gradient in zip(torch.autograd.grad((out * direction).sum(), inputs), wanted):
        torch.testing.assert_close(gradient, expected_gradient, rtol=100 * tolerance, atol=10 * tolerance)


def attended(layer, query, keys):
    """One token's output: a softmax over ``keys`` for each head."""
    q, heads = layer.q.weight @ query, []
    k, v = [layer.k.weight @ key for key in keys], [layer.v.weight @ key for key in keys]
    narrow, wide = len(q) // layer.num_heads, len(v[0]) // layer.num_heads
    for e in range(layer.num_heads):
        part, values = slice(e * narrow, (e + 1) * narrow), slice(e * wide, (e + 1) * wide)
        weights = torch.stack([(q[part] * key[part]).sum() / math.sqrt(narrow) for key in k]).exp()
        heads.append(sum(weight * value[values] for weight, value in zip(weights, v)) / weights.sum())
    return torch.cat(heads)


@pytest.mark.parametrize("over", ["joint", "spatial", "temporal"])
def test_attention_agrees_with_a_loop_over_positions(over):
    layer = randomized(SpaceTimeAttention(D, over, key_dim=4, num_heads=2)).double()
    x = clip(dtype=torch.float64, requires_grad=True)
    places = [(t, i, j) for t in range(T) for i in range(H) for j in range(W)]
    meets = {
        "joint": lambda a, b: True,
        "spatial": lambda a, b: a[0] == b[0],
        "temporal": lambda a, b: a[1:] == b[1:],
    }[over]
    out = []
    for one in x:
        tokens = {place: one[(slice(None), *place)] for place in places}
        rows = [attended(layer.attention, tokens[a], [tokens[b] for b in places if meets(a, b)]) for a in places]
        out.append(torch.stack(rows, dim=-1).reshape(D, T, H, W))
    agree(layer, layer(x), torch.stack(out), [x, *layer.parameters()])


@pytest.mark.parametrize("attention", ["vector", "mhsa"])
@pytest.mark.parametrize("kind", KINDS)
def test_token_transformer_agrees_with_its_formulas(kind, attention):
    """TokenLearner, linear and fuser by loops; the attention between them is tested for itself."""
    module = TokenTransformer(D, T, S, kind, (H, W), attention, key_dim=4, num_heads=2, num_weights=2)
    randomized(module).eval()
    x = clip(requires_grad=True)
    X = rearrange(x.double(), "b d t h w -> b t h w d")
    frames = X.flatten(0, 1)
    if kind == "grid":
        cells = naive.cell_weights(H, W, [0, 2], [0, 1, 2, 3])  # three cells of 2×3: one column each
        Z = naive.pooled(cells.expand(B * T, -1, -1, -1), frames)
    else:
        Z = naive.tokens(module.learner, frames)
    Z = Z.reshape(B, T * S, D)
    Z = torch.stack([torch.stack([naive.linear(z, module.linear) for z in one]) for one in Z])
    Y = module.attention.double()(Z)
    fused = torch.stack([naive.fused(module.fuser, *pair) for pair in zip(Y, X.flatten(2, 3))])
    expected = rearrange(fused.reshape(X.shape) + X, "b t h w d -> b d t h w")
    module.attention.float()
    assert relative_error(module(x), expected) < 1e-5


def test_the_fuser_makes_a_new_module_the_identity():
    x = clip()
    assert torch.equal(TokenTransformer(D, T, S, key_dim=4, num_weights=2)(x), x)


def test_mixer_agrees_with_a_loop():
    mixer = randomized(FrameMixer(D, T)).double()
    x = clip(dtype=torch.float64, requires_grad=True)

    def mlp(v, layers):
        return layers[2].weight @ F.gelu(layers[0].weight @ v + layers[0].bias) + layers[2].bias

    def normed(v, norm):
        return (v - v.mean()) / (((v - v.mean()) ** 2).mean() + 1e-5).sqrt() * norm.weight + norm.bias

    out = []
    for one in x:
        y = torch.stack([sum(one[:, t, i, j] for i in range(H) for j in range(W)) / (H * W) for t in range(T)])
        N = torch.stack([normed(v, mixer.norm1) for v in y])
        y = y + torch.stack([mlp(N[:, c], mixer.over_time) for c in range(D)], dim=1)
        y = torch.stack([v + mlp(normed(v, mixer.norm2), mixer.over_channels) for v in y])
        out.append(one + y.T[:, :, None, None])
    agree(mixer, mixer(x), torch.stack(out), [x, *mixer.parameters()])


def test_bot_attention_agrees_with_a_loop():
    """timm's, with both relative positions: q·k / √c + q·(rows apart) + q·(columns apart), on a grid not square."""
    layer = randomized(FrameBoT(D, (H, W), num_heads=2)).double()
    inner, x = layer.attention, clip(dtype=torch.float64)
    rows, columns = inner.pos_embed.height_rel, inner.pos_embed.width_rel
    places, c = [(i, j) for i in range(H) for j in range(W)], D // 2
    expected = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            qkv = {p: inner.qkv.weight[..., 0, 0] @ x[b, :, t, *p] for p in places}
            for a in places:
                for e in range(2):
                    q = qkv[a][e * c : (e + 1) * c]
                    logits = []
                    for o in places:
                        k = qkv[o][D + e * c : D + (e + 1) * c]
                        logits.append(
                            q @ k / math.sqrt(c) + q @ (rows[o[0] - a[0] + H - 1] + columns[o[1] - a[1] + W - 1])
                        )
                    weights = torch.stack(logits).softmax(0)
                    values = [qkv[o][2 * D + e * c : 2 * D + (e + 1) * c] for o in places]
                    expected[b, e * c : (e + 1) * c, t, *a] = sum(weight * v for weight, v in zip(weights, values))
    assert relative_error(layer(x), expected) < 1e-12


def test_convolutions_stay_in_their_axes():
    """Conv2D is a 3×3 within each frame, Conv1D a 3 over time at each place, BatchNorm and ReLU after either."""
    module = randomized(middle("Conv2D + Conv1D", D, stride=2)).double().eval()
    x = clip(dtype=torch.float64)
    (conv2d, norm1, _), (conv1d, norm2, _) = module

    def normed(y, norm):
        return F.relu(F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias))

    frames = [F.conv2d(x[:, :, t], conv2d.weight[:, :, 0], stride=2, padding=1) for t in range(T)]
    y = normed(torch.stack(frames, dim=2), norm1)
    z = torch.zeros_like(y)
    for i in range(y.shape[3]):
        for j in range(y.shape[4]):
            z[..., i, j] = F.conv1d(y[..., i, j], conv1d.weight[..., 0, 0], padding=1)
    assert y.shape[2:] == (T, 1, 2)
    assert relative_error(module(x), normed(z, norm2)) < 1e-12


@pytest.mark.parametrize(("stride", "out_dim"), [(1, None), (2, None), (1, 6), (2, 6)])
def test_a_block_is_its_shortcut_at_first_and_adds_the_middle_later(stride, out_dim):
    block = bottleneck("Conv2D + Conv1D", D, 10, out_dim, stride=stride).eval()
    x = clip()
    if stride == 1 and out_dim is None:
        assert torch.equal(block(x), x.relu())
    else:
        weight = block.shortcut[0].weight[..., 0, 0, 0]
        strided = torch.einsum("o d, b d t h w -> b o t h w", weight, x[..., ::stride, ::stride])
        torch.testing.assert_close(block(x), F.relu(strided / math.sqrt(1 + 1e-5)))
    randomized(block)
    inside = block.project[1](block.project[0](block.middle(block.expand(x))))
    assert torch.equal(block(x), F.relu(block.shortcut(x) + inside))
    assert block(x).shape == (B, out_dim or D, T, -(-H // stride), -(-W // stride))


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_of_every_block_learns(name):
    options = {"num_weights": 2, "num_tokens": S} if "TokenLearner" in name else {}
    block = randomized(bottleneck(name, 4, 16, num_frames=T, key_dim=4, num_heads=2, **options)).train()
    x = torch.randn(B, 4, T, H, W)
    block(x).square().mean().backward()
    dead = [key for key, p in block.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


def test_bot_block():
    block = randomized(bot_block(D, 4, grid=(H, W), num_heads=2)).eval()
    x = clip()
    attention, norm, _ = block.middle
    y = block.expand(x)
    expected = F.relu(x + block.project(F.relu(norm(attention(y)))))
    assert torch.equal(block(x), expected)
    each = torch.stack([block(x[:, :, t : t + 1]) for t in range(T)], dim=2)[:, :, :, 0]
    torch.testing.assert_close(block(x), each)  # frames don't see each other
    with torch.device("meta"):
        count = cost(bot_block(grid=(14, 14)), (2048, 1, 14, 14))
    n, d, positions = 196, 512, (2 * 14 - 1) * 2 * 128
    assert count.parameters == 2 * 2048 * d + 3 * d * d + positions + 2 * (2048 + 2 * d)
    relative = 4 * n * 128 * 2 * (2 * 14 - 1)
    assert count.macs == n * (2 * 2048 * d + 3 * d * d) + 2 * n * n * d + relative


# --- costs


def norms(*widths):
    return 2 * sum(widths)


def test_costs_of_the_parts_are_the_closed_forms():
    """At the paper's size: 432 channels, 4096 positions in 64 frames, 512 tokens."""
    d, n, m, t = 432, 4096, 512, 64
    conv2d, conv1d, projections = 9 * d * d, 3 * d * d, d * (2 * 128 + d)
    joint, frame = n * n * (128 + d), 64 * 64 * 64 * (128 + d)
    learner = 9 * d * 8 * n + 8 * n * d
    vector = m * projections + m * m * (24 * (128 + 24) + d)
    fuser = m * m * d + n * (d * 64 + 64 * 8) + n * 8 * d
    tokens = learner + m * d * d + vector + fuser
    mixer = 64 * 2 * d * d + d * 2 * t * t
    macs = {
        "Joint space-time MHSA": n * projections + joint,
        "Conv2D + Joint space-time MHSA": n * (conv2d + projections) + joint,
        "TokenLearner": tokens,
        "Conv2D + TokenLearner": n * conv2d + tokens,
        "Conv2D + Conv1D": n * (conv2d + conv1d),
        "Conv2D + MLPMixer": n * conv2d + mixer,
        "Conv2D + Temporal transformer": n * (conv2d + projections) + frame,
        "Spatial + Temporal transformer": 2 * (n * projections + frame),
        "Conv2D + Spatial + Temporal transformer": n * conv2d + 2 * (n * projections + frame),
        "SpatialT + TokenLearner": n * projections + frame + tokens,
    }
    fuser_parameters = m * m + m + d * 64 + 64 + 64 * 8 + 8 + 3 * 2 * d
    token_parameters = 9 * d * 8 + d * d + d + projections + 24 * (128 + 24) + 24 + fuser_parameters
    parameters = {
        "TokenLearner": token_parameters + norms(d),
        "Conv2D + Conv1D": conv2d + conv1d + norms(d, d),
        "Conv2D + MLPMixer": conv2d + 2 * (t * t + t + d * d + d) + norms(d, d) + norms(d, d),
        "Spatial + Temporal transformer": 2 * projections + norms(d, d),
    }
    for name in MODULES:
        with torch.device("meta"):
            count = cost(middle(name), (d, 64, 8, 8))
        assert count.macs == macs[name], name
        assert count.parameters == parameters.get(name, count.parameters), name


def test_the_papers_rows():
    rows = module_rows()
    assert len(rows) == 2 * len(MODULES) + 3
    assert all(row["fits"] for row in rows)
    ratios = {(row["table"][:7], row["name"], row["unit"]): row["ratio"] for row in rows}
    off = {key: ratio for key, ratio in ratios.items() if abs(ratio - 1) > 0.0105}
    assert off == {
        ("table11", "Joint space-time MHSA", "GFLOPs"): 0.9648,
        ("table11", "Conv2D + Joint space-time MHSA", "GFLOPs"): 0.9772,
        ("table11", "SpatialT + TokenLearner", "GFLOPs"): 0.989,
    }
    for name, printed in [("Joint space-time MHSA", 22.0), ("Conv2D + Joint space-time MHSA", 35.8)]:
        counted = next(row["counted"] for row in rows if (row["name"], row["unit"]) == (name, "GFLOPs"))
        assert round(counted + 6 * 8 * 4096**2 / 1e9, 1) == printed  # as the note says
    models = {row["name"]: row["counted"] for row in rows if row["table"] == "table10_avid"}
    swapped = models["Backbone X(2+1)D-M"] - models["TokenLearner"]
    assert swapped == pytest.approx(3 * (18.345885696 - 3.403153408), rel=1e-5)


# --- errors


def test_errors_say_what_is_wrong():
    with pytest.raises(InputError, match="no module 'MHSA'; there are 'Joint space-time MHSA'"):
        middle("MHSA")
    with pytest.raises(InputError, match="'TokenLearner' has no convolution to take stride 2"):
        bottleneck("TokenLearner", D, 16, stride=2)
    with pytest.raises(InputError, match="has no TokenLearner to take kind"):
        middle("Conv2D + Conv1D", D, kind="mlp")
    with pytest.raises(InputError, match="num_heads must divide dim and key_dim, and 3 does not: 9, 128"):
        Attention(9, num_heads=3)
    with pytest.raises(InputError, match="attention is 'vector' or 'mhsa', not 'scalar'"):
        TokenTransformer(D, T, attention="scalar")
    for module in (TokenTransformer(D, T + 1, key_dim=4, num_weights=2), FrameMixer(D, T + 1)):
        with pytest.raises(InputError, match="built for clips of 5 frames, and got 4"):
            module(clip())
    with pytest.raises(InputError, match="the relative positions are of another grid than 2×3"):
        FrameBoT(D, (3, 2))(clip())


def test_parts_end_in_norm_and_relu():
    for name in MODULES:
        options = {"num_weights": 2} if "TokenLearner" in name else {}
        for part in middle(name, 16, num_frames=T, **options):
            assert [type(layer) for layer in part[1:]] == [RecomputeSafeBatchNorm3d, nn.ReLU]
