"""The fuser's kernel against float64, its gradient against autograd, and inside a fuser for clips."""

import copy

import pytest
import torch
from kernel_formulas import HIDDEN, TOLERANCE, assert_near, logits, weights

from tokenlearner.core import TokenFuser
from tokenlearner.kernels import use


def by_hand(X, Y, *w, residual):
    """The formula in float64, of the same numbers."""
    out = 1 / (1 + torch.exp(-logits(X, *w))) @ Y.double()
    return out + X.double() if residual else out


def launch(X, Y, w, residual, positions=16, channels=32, eps=1e-6):
    from tokenlearner.kernels.fuser import launch as run
    from tokenlearner.kernels.logits import Tile, Weights

    return run(X, Y, Weights(*w), eps, residual, Tile(positions, channels, 4))


@pytest.mark.parametrize(
    ("dtype", "b", "n", "d", "s", "positions", "channels", "residual"),
    [
        (torch.float32, 2, 63, 192, 8, 32, 64, True),  # the last block is not full
        (torch.float32, 1, 33, 40, 17, 16, 16, False),  # nor are its last channels; tokens fill more than one tile's 16
        (torch.bfloat16, 1, 20, 384, 16, 16, 128, True),
        (torch.bfloat16, 2, 17, 48, 1, 16, 32, False),
        (torch.float16, 3, 1, 64, 8, 32, 64, True),
    ],
    ids=str,
)
def test_agrees_with_float64(device, dtype, b, n, d, s, positions, channels, residual):
    X, Y = (torch.randn(b, size, d).to(device, dtype) for size in (n, s))
    w = weights(d, s, dtype, device)
    out = launch(X, Y, w, residual, positions, channels)
    assert out.dtype == dtype
    assert_near(out, by_hand(X, Y, *w, residual=residual), TOLERANCE[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, in a sigmoid of 0
def test_a_large_mean_and_large_logits(device):
    X, Y = (1000 + torch.randn(1, 20, 64)).to(device), torch.randn(1, 4, 64).to(device)
    w = weights(64, 4, torch.float32, device)
    assert_near(launch(X, Y, w, residual=False), by_hand(X, Y, *w, residual=False), 1e-3)
    X, w = X - 1000, weights(64, 4, torch.float32, device, logits=3000.0)
    assert_near(launch(X, Y, w, residual=False), by_hand(X, Y, *w, residual=False), 1e-4)


def test_views_are_read_as_they_lie(device):
    """Behind a class token, and with channels apart."""
    w = weights(48, 4, torch.float32, device)
    for X in (torch.randn(2, 17, 48).to(device)[:, 1:], torch.randn(2, 48, 16).to(device).mT):
        Y = torch.randn(2, 48, 4).to(device).mT
        assert not X.is_contiguous()
        assert torch.equal(
            launch(X, Y, w, True, channels=64), launch(X.contiguous(), Y.contiguous(), w, True, channels=64)
        )


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_is_that_of_the_plain_module(device, residual):
    from tokenlearner.kernels.fuser import fuse, plain

    w = [weight.requires_grad_() for weight in weights(48, 5, torch.float32, device)]
    X, Y = (torch.randn(2, size, 48, device=device, requires_grad=True) for size in (9, 5))
    direction = torch.randn(2, 9, 48, device=device)
    expected = by_hand(X, Y, *w, residual=residual)
    wanted = torch.autograd.grad((expected * direction).sum(), [X, Y, *w])
    assert_near(plain(X, Y, *w, 1e-6, residual), expected, 1e-5)
    out = fuse(X, Y, *w, 1e-6, residual)
    for gradient, of in zip(torch.autograd.grad((out * direction).sum(), [X, Y, *w]), wanted):
        torch.testing.assert_close(gradient, of, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [None, 2])
def test_a_fuser_with_the_kernel_agrees_with_itself_in_float64(device, frames):
    """Also the tokens' own part, M over the tokens of a frame or of a clip."""
    fuser = TokenFuser(32, 3, num_frames=frames, hidden_dim=HIDDEN)
    torch.nn.init.normal_(fuser.mix.weight, std=0.5)
    fuser = fuser.to(device, torch.bfloat16)
    tokens = torch.randn(2, 3 * (frames or 1), 32).to(device, torch.bfloat16)
    x = torch.randn(2, *([frames] if frames else []), 2, 5, 32).to(device, torch.bfloat16)
    exact = copy.deepcopy(fuser).double()(tokens.double(), x.double())
    plain = fuser(tokens, x)
    out = use(fuser)(tokens, x)
    assert not torch.equal(out, plain)  # it was the kernel
    assert_near(out, exact, TOLERANCE[torch.bfloat16])
    assert_near(fuser(tokens, x, residual=False), exact - x.double(), TOLERANCE[torch.bfloat16])
