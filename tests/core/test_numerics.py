"""Where float32 is kept under reduced precision, and the gate's statistics under gradient checkpointing."""

import copy

import naive
import pytest
import torch
from naive import randomized, relative_error
from torch.utils.checkpoint import checkpoint

from tokenlearner.core import KINDS, Reproject, TokenFuser, TokenLearner, Unpool

# Room for the roundings on the way (at most four convolutions deep): a few units in the last place.
TOLERANCE = {torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["bf16", "fp16"])


def make(kind):
    return randomized(TokenLearner(16, 4, kind, (3, 5))).eval()


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_stays_within_the_dtypes_rounding(kind, dtype):
    learner, x = make(kind), torch.randn(2, 3, 5, 16)
    expected = copy.deepcopy(learner).double()(x.double())
    with torch.autocast("cpu", dtype):
        tokens = learner(x)
        from_low = learner(x.to(dtype))  # what a layer before it would hand over
    assert tokens.dtype == torch.float32
    assert from_low.dtype == dtype
    assert relative_error(tokens, expected) < TOLERANCE[dtype]
    assert relative_error(from_low, expected) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "average"])
def test_pooling_and_maps_are_float32_under_autocast(kind, dtype):
    """The α network may run in the low precision; squash and sum may not: Z = A X up to the result's own rounding."""
    learner = make(kind)
    mean = learner.pool == "mean" and kind != "grid"
    for given in (torch.float32, dtype):
        x = torch.randn(2, 3, 5, 16).to(given)
        with torch.autocast("cpu", dtype):
            tokens, maps = learner.tokens_and_maps(x)
        assert maps.dtype == torch.float32
        if kind == "mlp":
            assert relative_error(maps.sum(dim=(2, 3)), torch.ones(2, 4)) < 1e-6
        expected = naive.pooled(maps.double(), x.double(), mean)
        # element by element: maps rounded to the dtype would show where the sum nearly cancels
        rtol = torch.finfo(dtype).eps / 2 if given == dtype else 0
        torch.testing.assert_close(tokens.double(), expected, rtol=rtol, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("kind", ["conv", "conv1", "gate", "dense"])
def test_a_sum_over_4096_positions_keeps_its_precision(kind, dtype):
    h = w = 64
    learner = TokenLearner(16, 2, kind, (h, w), pool="sum").eval()
    if kind == "dense":
        torch.nn.init.uniform_(learner.alpha.weight)
    x = torch.rand(1, h, w, 16)  # of one sign, so that the sum really grows
    expected = copy.deepcopy(learner).double()(x.double())
    with torch.autocast("cpu", dtype):
        assert relative_error(learner(x), expected) < TOLERANCE[dtype]
        assert relative_error(learner(x.to(dtype)), expected) < TOLERANCE[dtype]

    A, X, total = learner.maps(x).flatten(2).to(dtype), x.flatten(1, 2).to(dtype), torch.zeros(1, 2, 16, dtype=dtype)
    for n in range(h * w):  # what an accumulator of the low precision would have made of it
        total += A[:, :, n, None] * X[:, n, None]
    assert relative_error(total, expected) > 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_module_returns_bfloat16(kind):
    learner, x = make(kind).bfloat16(), torch.randn(2, 3, 5, 16).bfloat16()
    tokens = learner(x)
    assert tokens.dtype == torch.bfloat16
    assert relative_error(tokens, copy.deepcopy(learner).double()(x.double())) < TOLERANCE[torch.bfloat16]
    if kind != "average":
        assert learner.maps(x).dtype == torch.float32


@DTYPES
@pytest.mark.parametrize(
    "module",
    [TokenFuser(16, 4), TokenFuser(16, 4, beta="linear", norm=False), Reproject(16, 4), Unpool()],
    ids=["fuser", "bare fuser", "reproject", "unpool"],
)
def test_the_way_back_under_reduced_precision(module, dtype):
    module = randomized(module)
    Z, x, maps = torch.randn(2, 4, 16), torch.randn(2, 3, 5, 16), torch.rand(2, 4, 3, 5)
    more = (maps,) if isinstance(module, Unpool) else ()
    expected = copy.deepcopy(module).double()(Z.double(), x.double(), *more)
    with torch.autocast("cpu", dtype):
        out = module(Z, x, *more)
        from_low = module(Z.to(dtype), x.to(dtype), *more)
    low = copy.deepcopy(module).to(dtype)(Z.to(dtype), x.to(dtype), *more)
    assert (out.dtype, from_low.dtype, low.dtype) == (torch.float32, dtype, dtype)
    for got in (out, from_low, low):
        assert relative_error(got, expected) < TOLERANCE[dtype]
    if not list(module.parameters()):
        assert relative_error(out, expected) < 1e-6  # nothing but the spreading, which is float32


def test_the_meta_device_knows_no_autocast():
    with torch.device("meta"):
        learner, fuser, x = TokenLearner(16), TokenFuser(16), torch.empty(2, 3, 5, 16)
    tokens = learner(x)
    assert (tokens.shape, fuser(tokens, x).shape) == ((2, 8, 16), (2, 3, 5, 16))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_a_batch_once(use_reentrant):
    plain, x = make("gate").train(), torch.randn(2, 3, 5, 16, requires_grad=True)
    checkpointed, before = copy.deepcopy(plain), copy.deepcopy(plain)
    wanted = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    checkpoint(checkpointed, x, use_reentrant=use_reentrant).square().sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in checkpointed.parameters())]
    for gradient, expected in zip(gradients, wanted):
        torch.testing.assert_close(gradient, expected)

    norm = checkpointed.alpha.norm
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.running_mean, plain.alpha.norm.running_mean)
    assert torch.equal(norm.running_var, plain.alpha.norm.running_var)
    # closed form: 0.9 old + 0.1 of the batch's mean, which the second forward would have taken to 0.81 and 0.19
    summary = torch.stack([x.amax(-1), x.mean(-1)], dim=1)
    batch_mean = before.alpha.conv(summary).mean(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, 0.9 * before.alpha.norm.running_mean + 0.1 * batch_mean)
