"""TokenLearner against the official outputs, against loops written from the formulas, and under torch's compilers."""

import copy

import naive
import numpy as np
import pytest
import torch
from naive import randomized, relative_error
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenlearner.core import KINDS, TokenLearner

GRID = (3, 5)  # neither square nor even: a swapped axis shows
POOLS = [
    ("conv", "sum"),
    ("conv", "mean"),
    ("mlp", "softmax"),
    ("conv1", "mean"),
    ("conv1", "sum"),
    ("gate", "mean"),
    ("gate", "sum"),
    ("dense", "sum"),
    ("average", "mean"),
]
MAPPED = [kind for kind in KINDS if kind != "average"]


def make(kind, dim=6, num_tokens=4, grid=GRID, **options):
    return randomized(TokenLearner(dim, num_tokens, kind, grid, hidden_dim=10, **options))


# --- values


@pytest.mark.parametrize("kind", ["conv", "mlp"])
def test_agrees_with_the_official_outputs(kind, reference_dir):
    data = {
        key: torch.from_numpy(value)
        for key, value in np.load(reference_dir / f"learner_{kind}.npz").items()
        if key != "meta"
    }
    state = {"alpha.norm.weight": data["param/LayerNorm_0/scale"], "alpha.norm.bias": data["param/LayerNorm_0/bias"]}
    if kind == "conv":
        for i in range(4):
            state[f"alpha.convs.{i}.weight"] = data[f"param/Conv_{i}/kernel"].permute(3, 2, 0, 1)  # HWIO → OIHW
    else:
        for i in range(2):
            state[f"alpha.fc{i + 1}.weight"] = data[f"param/token_masking/Dense_{i}/kernel"].T
            state[f"alpha.fc{i + 1}.bias"] = data[f"param/token_masking/Dense_{i}/bias"]
    learner = TokenLearner(48, 8, kind)
    learner.load_state_dict(state)
    assert relative_error(learner(data["in/x"]), data["out"]) < 1e-4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("kind", "pool"), POOLS)
def test_agrees_with_a_naive_loop(kind, pool, training):
    """Tokens, maps and every gradient. Pooling is float32 inside, so gradcheck's finite differences can't be asked."""
    learner = make(kind, pool=pool).train(training)
    x = torch.randn(2, *GRID, 6, requires_grad=True)
    inputs = [x, *learner.parameters()]
    expected = naive.tokens(learner, x.double())
    direction = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * direction).sum(), inputs)

    tokens = learner(x)
    gradients = torch.autograd.grad((tokens * direction).sum(), inputs)

    assert relative_error(tokens, expected) < 1e-5
    for gradient, wanted in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    if kind != "average":
        assert relative_error(learner.maps(x), naive.maps(learner, x.double()).expand(2, -1, -1, -1)) < 1e-5


def test_the_pooling_left_out_is_the_papers():
    x = torch.randn(2, *GRID, 6)
    for kind, paper in [("conv", "sum"), ("conv1", "mean"), ("gate", "mean")]:
        learner = make(kind).eval()
        assert relative_error(learner(x), naive.pooled(learner.maps(x), x, mean=paper == "mean")) < 1e-5


@pytest.mark.parametrize(
    ("h", "w", "cells", "row_cuts", "column_cuts"),
    [
        (4, 8, 8, [0, 2, 4], [0, 2, 4, 6, 8]),
        (8, 4, 8, [0, 2, 4, 6, 8], [0, 2, 4]),
        (5, 7, 6, [0, 2, 5], [0, 2, 4, 7]),  # divides neither side: every position still in exactly one cell
        (7, 7, 6, [0, 3, 7], [0, 2, 4, 7]),  # 2×3 and 3×2 are equally square
        (3, 5, 1, [0, 3], [0, 5]),
        (2, 7, 7, [0, 2], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_grid_takes_each_cells_mean(h, w, cells, row_cuts, column_cuts):
    learner, x = TokenLearner(6, cells, "grid"), torch.randn(2, h, w, 6)
    weights = naive.cell_weights(h, w, row_cuts, column_cuts).expand(2, -1, -1, -1)
    assert relative_error(learner(x), naive.pooled(weights, x.double())) < 1e-6
    assert relative_error(learner.maps(x), weights) < 1e-6


def test_more_cells_than_positions_repeat_positions():
    x = torch.randn(1, 2, 2, 6)
    expected = torch.stack([x[0, y, x_] for y in (0, 1) for x_ in (0, 0, 1, 1)])  # 2×4 cells on 2×2
    assert relative_error(TokenLearner(6, 8, "grid")(x)[0], expected) < 1e-6


# --- the grid is given, never guessed


@pytest.mark.parametrize("kind", KINDS)
def test_flat_positions_with_a_grid_are_the_map(kind):
    learner = make(kind).eval()
    x = torch.randn(2, *GRID, 6)
    flat = x.flatten(1, 2)
    assert torch.equal(learner(flat), learner(x))  # the constructor's grid
    learner.grid = None
    assert torch.equal(learner(flat, grid=GRID), learner(x))
    learner.grid = (15, 1)
    assert torch.equal(learner(flat, grid=GRID), learner(x))  # the call's grid wins


def test_144_positions_are_not_taken_for_a_square():
    x, learner = torch.randn(1, 9 * 16, 6), make("conv", num_tokens=2, grid=None)
    wide, square = learner(x, grid=(9, 16)), learner(x, grid=(12, 12))
    assert relative_error(wide, naive.tokens(learner, x.double().reshape(1, 9, 16, 6))) < 1e-5
    assert relative_error(square, wide) > 1e-2
    with pytest.raises(ValueError, match=r"\(1, 144, 6\), and 144 positions don't tell .* give grid=\(h, w\)"):
        learner(x)


# --- maps


@pytest.mark.parametrize("kind", MAPPED)
def test_maps_are_the_weights_of_the_tokens(kind):
    learner, x = make(kind).eval(), torch.randn(2, *GRID, 6)
    tokens, maps = learner.tokens_and_maps(x)
    assert torch.equal(tokens, learner(x))
    assert torch.equal(maps, learner.maps(x))
    assert torch.equal(maps, learner.maps(x.flatten(1, 2)))
    mean = kind in ("conv1", "gate")  # these show α itself, so the mean is still to be taken
    assert relative_error(tokens, naive.pooled(maps.double(), x.double(), mean)) < 1e-5


@pytest.mark.parametrize("kind", ["mlp", "grid"])
def test_softmax_and_cell_maps_sum_to_one(kind):
    # 100 times the usual size: a softmax over the wrong axis, or none, can't pass by chance
    total = make(kind).maps(100 * torch.randn(2, *GRID, 6)).sum(dim=(2, 3))
    assert relative_error(total, torch.ones(2, 4)) < 1e-5


def test_dense_maps_are_its_weight():
    learner = make("dense")
    assert torch.equal(learner.maps(torch.randn(2, *GRID, 6))[1].flatten(1), learner.alpha.weight)


def test_average_refuses_maps():
    learner, x = make("average"), torch.randn(2, *GRID, 6)
    for method in (learner.maps, learner.tokens_and_maps):
        with pytest.raises(ValueError, match="kind 'average' has no attention maps"):
            method(x)


# --- memory


class Largest(TorchDispatchMode):
    """Records the most elements any operator returned, in forward and in backward."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_tokens_times_positions_times_channels(kind):
    b, s, h, w, d = 2, 8, 16, 16, 32
    learner, x = make(kind, d, s, (h, w)), torch.randn(b, h, w, d, requires_grad=True)
    with Largest() as seen:
        learner(x).square().sum().backward()
    assert x.numel() <= seen.numel <= b * s * h * w * d // 4

    with Largest() as seen:  # the product written as the paper prints it is seen
        (torch.rand(b, s, h, w, 1) * x[:, None]).sum(dim=(2, 3))
    assert seen.numel == b * s * h * w * d


# --- dropout and starting values


def test_dropout_only_in_training():
    plain = make("mlp")
    dropped = TokenLearner(6, 4, "mlp", hidden_dim=10, dropout=0.5)
    dropped.load_state_dict(plain.state_dict())
    x = torch.randn(2, *GRID, 6)
    assert torch.equal(dropped.eval()(x), plain(x))
    assert relative_error(dropped.train()(x), plain(x)) > 1e-2


def test_initial_weights_have_flaxs_variance():
    """Convolutions: normal, cut at two deviations, variance 1/fan-in after the cut; MLP: Xavier uniform, zero bias."""
    for alpha in (TokenLearner(256, 64, "conv").alpha.convs[0], TokenLearner(256, 64, "conv1").alpha.conv):
        unit = alpha.weight * (256 * 9) ** 0.5
        assert unit.var().item() == pytest.approx(1, rel=0.02)
        assert unit.abs().max().item() == pytest.approx(2 / 0.8796, rel=1e-3)
    alpha = TokenLearner(256, 64, "mlp").alpha
    bound = (6 / (256 + 64)) ** 0.5
    assert alpha.fc1.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert alpha.fc1.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
    assert alpha.fc1.bias.eq(0).all()


# --- compile and export


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks(kind, training):
    torch._dynamo.reset()
    learner, x = make(kind).train(training), torch.randn(2, *GRID, 6, requires_grad=True)
    plain = copy.deepcopy(learner)
    compiled = torch.compile(learner, fullgraph=True, backend="aot_eager")
    expected, tokens = plain(x), compiled(x)
    assert relative_error(tokens, expected) < 1e-6
    (wanted,), (gradient,) = (torch.autograd.grad(out.square().sum(), x) for out in (expected, tokens))
    assert relative_error(gradient, wanted) < 1e-5
    for ours, theirs in zip(learner.buffers(), plain.buffers()):  # gate's running statistics
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("kind", KINDS)
def test_exports_with_a_dynamic_batch(kind):
    learner = make(kind).eval()
    exported = export(learner, (torch.randn(2, 15, 6),), dynamic_shapes={"x": {0: Dim("batch")}})
    for batch in (2, 5):
        x = torch.randn(batch, 15, 6)
        assert relative_error(exported.module()(x), learner(x)) < 1e-6


# --- errors


@pytest.mark.usefixtures("without_shape_checks")  # a checker would speak before the library does
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "cnn"}, r"unknown kind 'cnn'; TokenLearner knows conv, mlp, conv1, gate, grid, dense, average"),
        ({"kind": "mlp", "pool": "sum"}, r"kind 'mlp' pools by 'softmax', not 'sum'"),
        ({"kind": "conv", "pool": "softmax"}, r"kind 'conv' pools by 'sum' or 'mean', not 'softmax'"),
        ({"kind": "dense"}, r"one weight per position: give grid=\(h, w\)"),
        ({"dim": 0}, r"dim must be a positive whole number, not 0"),
        ({"num_tokens": -1}, r"num_tokens must be a positive whole number, not -1"),
        ({"num_tokens": 2.5}, r"num_tokens must be a positive whole number, not 2\.5"),
        ({"hidden_dim": 0}, r"hidden_dim must be a positive whole number, not 0"),
        ({"grid": (3, 0)}, r"grid must be \(h, w\) with two positive whole numbers, not \(3, 0\)"),
        ({"grid": (3, 5, 7)}, r"grid must be \(h, w\) with two positive whole numbers, not \(3, 5, 7\)"),
        ({"grid": (3, 2.5)}, r"grid must be \(h, w\) with two positive whole numbers, not \(3, 2\.5\)"),
    ],
)
def test_constructor_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TokenLearner(**{"dim": 6, **options})


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("kind", "shape", "grid", "sentence"),
    [
        ("mlp", (2, 6), None, r"takes \(b, h, w, d\), or \(b, n, d\) with a grid, and got shape \(2, 6\)"),
        ("mlp", (2, 3, 3, 5, 6), None, r"got shape \(2, 3, 3, 5, 6\)"),
        ("mlp", (2, 3, 5, 7), None, r"dim=6, kind='mlp'\) got 7 channels in shape \(2, 3, 5, 7\); .* must be 6"),
        ("conv", (2, 16, 6), None, r"16 positions in shape \(2, 16, 6\), but a grid of 3×5 has 15"),
        ("conv", (2, 15, 6), (4, 4), r"15 positions in shape \(2, 15, 6\), but a grid of 4×4 has 16"),
        ("conv", (2, 15, 6), (0, 4), r"two positive whole numbers, not \(0, 4\)"),
        ("mlp", (2, 0, 5, 6), None, r"empty feature map, shape \(2, 0, 5, 6\)"),
        ("dense", (2, 5, 3, 6), None, r"built for a grid of 3×5 and got 5×3"),
    ],
)
def test_call_refuses(kind, shape, grid, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(kind)(torch.zeros(shape), grid)
