"""The learner's kernel against float64, its gradient against autograd, and inside torch.compile."""

import pytest
import torch
from kernel_formulas import HIDDEN, TOLERANCE, assert_near, logits, weights
from torch._dynamo.backends.debugging import aot_eager

from tokenlearner.core import TokenLearner
from tokenlearner.kernels import use


def by_hand(X, *w):
    """The formula in float64, of the same numbers."""
    return logits(X, *w).softmax(dim=1).transpose(1, 2) @ X.double()


def launch(X, w, positions=16, channels=32, eps=1e-6):
    from tokenlearner.kernels.learner import launch as run
    from tokenlearner.kernels.logits import Tile, Weights

    return run(X, Weights(*w), eps, Tile(positions, channels, 4))


@pytest.mark.parametrize(
    ("dtype", "b", "n", "d", "s", "positions", "channels"),
    [
        (torch.float32, 2, 63, 192, 8, 32, 64),  # the last block is not full
        (torch.float32, 1, 33, 40, 17, 16, 16),  # nor are its last channels; tokens fill more than one tile's 16
        (torch.bfloat16, 1, 20, 384, 16, 16, 128),
        (torch.bfloat16, 2, 17, 48, 1, 16, 32),
        (torch.float16, 1, 35, 64, 8, 32, 64),
    ],
    ids=str,
)
def test_agrees_with_float64(device, dtype, b, n, d, s, positions, channels):
    X, w = (torch.randn(b, n, d) + 0.3).to(device, dtype), weights(d, s, dtype, device, logits=3.0)
    Z = launch(X, w, positions, channels)
    assert Z.dtype == dtype
    assert_near(Z, by_hand(X, *w), TOLERANCE[dtype])


def test_the_token_of_one_position_is_that_position(device):
    X = torch.randn(2, 1, 48).to(device, torch.bfloat16)
    assert torch.equal(launch(X, weights(48, 8, torch.bfloat16, device)), X.expand(-1, 8, -1))


def test_a_large_mean_cancels(device):
    """A mean of squares less the squared mean has no digit left here, and a product with another Σ W' few."""
    d, w = 64, weights(64, 8, torch.float32, device)
    X = (1000 + torch.randn(1, 20, d)).to(device)
    expected = by_hand(X, *w)
    away = X.double().mean(1, keepdim=True)  # what weights that are wrong, but sum to one, would still give
    assert_near(launch(X, w).double() - away, expected - away, 2e-3)
    rounded = X.bfloat16() / 8  # a mean of 125, and steps of a half
    w = [weight.bfloat16() for weight in w]
    assert_near(launch(rounded, w), by_hand(rounded, *w), TOLERANCE[torch.bfloat16])


def test_large_logits_do_not_overflow(device):
    """Logits in the thousands, positive and negative; the winner may be in any block."""
    X, w = torch.randn(2, 50, 48).to(device), weights(48, 8, torch.float32, device, logits=3000.0)
    expected = by_hand(X, *w)
    assert torch.isfinite(expected).all()
    assert_near(launch(X, w), expected, 1e-4)


def test_views_are_read_as_they_lie(device):
    """Behind a class token, every other position, channels apart: the same numbers as their copies."""
    whole, w = torch.randn(2, 33, 48).to(device), weights(48, 4, torch.float32, device)
    for X in (whole[:, 1::2], torch.randn(1, 48, 16).to(device).mT):
        assert not X.is_contiguous()
        assert torch.equal(launch(X, w, channels=64), launch(X.contiguous(), w, channels=64))


def test_the_gradient_is_that_of_the_plain_module(device):
    from tokenlearner.kernels.learner import learn

    module = TokenLearner(48, 5, hidden_dim=HIDDEN).to(device)
    x = torch.randn(2, 2, 7, 48, device=device, requires_grad=True)
    alpha = module.alpha
    inputs = [alpha.norm.weight, alpha.norm.bias, alpha.fc1.weight, alpha.fc1.bias, alpha.fc2.weight, alpha.fc2.bias]
    direction = torch.randn(2, 5, 48, device=device)
    wanted = torch.autograd.grad((module(x) * direction).sum(), [x, *inputs])
    Z = learn(x.flatten(1, 2), *inputs, alpha.norm.eps)
    for gradient, expected in zip(torch.autograd.grad((Z * direction).sum(), [x, *inputs]), wanted):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    alpha.requires_grad_(False)
    (gradient,) = torch.autograd.grad((learn(x.flatten(1, 2), *inputs, alpha.norm.eps) * direction).sum(), [x])
    torch.testing.assert_close(gradient, wanted[0], rtol=1e-4, atol=1e-5)


def test_autocast_with_weights_in_float32(device):
    """The kernel takes them in X's dtype, and their gradients come back in their own."""
    module = TokenLearner(32, 3, hidden_dim=HIDDEN).to(device)
    x = torch.randn(1, 2, 7, 32, device=device).bfloat16()
    wanted = torch.autograd.grad(module.double()(x.double()).square().sum(), list(module.parameters()))
    use(module.float())
    with torch.autocast(device, torch.bfloat16):
        Z = module(x)
        assert not torch.equal(Z, use(module, False)(x))
        loss = Z.float().square().sum()
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    found, expected = (torch.cat([gradient.flatten().double() for gradient in some]) for some in (gradients, wanted))
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_compiles_without_graph_breaks(device):
    torch._dynamo.reset()
    module = use(TokenLearner(48, 5, hidden_dim=HIDDEN).to(device, torch.bfloat16))
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    x = torch.randn(1, 2, 7, 48, device=device).bfloat16().requires_grad_()
    out = torch.compile(module, fullgraph=True, backend=backend)(x)
    assert "tokenlearner.learn.default" in seen
    expected = module(x)
    assert torch.equal(out, expected)
    (gradient,), (wanted,) = (torch.autograd.grad(Z.float().square().sum(), x) for Z in (out, expected))
    assert torch.equal(gradient, wanted)


@pytest.mark.slow
def test_the_operator_passes_pytorchs_own_checks(device):
    from tokenlearner.kernels.learner import learn

    X, w = torch.randn(1, 9, 16, device=device, requires_grad=True), weights(16, 2, torch.float32, device)
    torch.library.opcheck(learn, (X, *w, 1e-6))


def test_a_small_batch_gets_small_blocks(device):
    from tokenlearner.kernels.learner import tile_for

    assert tile_for(64, 1024, 132).positions == 128
    assert tile_for(8, 1024, 132).positions == 32
    assert tile_for(16, 576, 132).positions == 64
    assert tile_for(1, 196, 132).positions == 32
