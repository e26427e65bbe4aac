"""The first k of a module's tokens: as cut from all of them, and as a module of k tokens has them."""

import copy

import pytest
import torch
from naive import randomized
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from insertion.hosts import cut
from tokenlearner.core import KINDS, NeighbourTokenLearner, TokenFuser, TokenLearner, WindowTokenLearner

DIM, S, GRID, FRAMES = 6, 5, (3, 4), 4
ORDERED = [kind for kind in KINDS if kind != "grid"]
OF_FRAMES = [
    (cls, kind) for cls in (NeighbourTokenLearner, WindowTokenLearner) for kind in ("mlp", "conv", "conv1", "gate")
]


def learner(kind, tokens=S, cls=TokenLearner):
    return randomized(cls(DIM, tokens, kind, GRID, hidden_dim=7))


def using(module, k):
    """A copy that uses k tokens."""
    fewer = copy.deepcopy(module)
    fewer.used_tokens = k
    return fewer


def multiply_adds(module, *inputs):
    counter = FlopCounterMode(display=False)
    with counter:
        copy.deepcopy(module).requires_grad_(False)(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("k", [1, 3, S])
@pytest.mark.parametrize("kind", ORDERED)
def test_they_are_the_first_of_all_tokens(kind, k, training):
    module, x = learner(kind).train(training), torch.randn(2, *GRID, DIM)
    fewer = using(module, k)
    assert_close(fewer(x), module(x)[:, :k])
    if kind != "average":
        assert_close(fewer.maps(x), module.maps(x)[:, :k])
        tokens, maps = fewer.tokens_and_maps(x)
        assert_close((tokens, maps), (fewer(x), fewer.maps(x)))


@pytest.mark.parametrize(("cls", "kind"), OF_FRAMES)
def test_of_frames_too(cls, kind):
    module, x = learner(kind, cls=cls).eval(), torch.randn(2, FRAMES, *GRID, DIM)
    fewer = using(module, 2)
    assert_close(fewer(x), module(x)[:, :, :2])
    assert_close(fewer.maps(x), module.maps(x)[:, :, :2])


@pytest.mark.parametrize("kind", [kind for kind in ORDERED if kind != "conv"])  # conv's inner layers stay S wide
def test_gradients_and_cost_are_those_of_a_learner_of_as_many_tokens(kind):
    module, x = learner(kind).train(), torch.randn(2, *GRID, DIM)
    fewer, small = using(module, 2), cut(learner(kind, 2), module)
    weights = torch.randn(2, 2, DIM)
    assert multiply_adds(fewer, x) == multiply_adds(small, x) < multiply_adds(module, x)
    (fewer(x) * weights).sum().backward()
    (small(x) * weights).sum().backward()
    wanted = dict(small.named_parameters())
    for name, parameter in fewer.named_parameters():
        expected = torch.zeros_like(parameter)
        expected[tuple(slice(side) for side in wanted[name].shape)] = wanted[name].grad
        assert_close(parameter.grad, expected)


def test_conv_saves_what_its_last_layer_and_the_sum_take():
    module, x, positions = learner("conv"), torch.randn(1, *GRID, DIM), GRID[0] * GRID[1]
    saved = (S - 2) * positions * (9 * S + DIM)
    assert multiply_adds(using(module, 2), x) == multiply_adds(module, x) - saved


def test_the_statistics_of_the_gates_in_use_move_alone():
    module, x = learner("gate").train(), torch.randn(2, *GRID, DIM)
    before = copy.deepcopy(module.alpha.norm)
    fewer = using(module, 2)
    module(x)
    fewer(x)
    for name in ("running_mean", "running_var"):
        expected = torch.cat([getattr(module.alpha.norm, name)[:2], getattr(before, name)[2:]])
        assert_close(getattr(fewer.alpha.norm, name), expected)
        assert not torch.equal(expected[:2], getattr(before, name)[:2])
    assert fewer.alpha.norm.num_batches_tracked == before.num_batches_tracked + 1


def test_a_recomputation_moves_no_statistics():
    fewer, x = using(learner("gate").train(), 2), torch.randn(2, *GRID, DIM, requires_grad=True)
    checkpointed = copy.deepcopy(fewer)
    fewer(x).square().sum().backward()
    checkpoint(checkpointed, x, use_reentrant=False).square().sum().backward()
    assert_close(checkpointed.state_dict(), fewer.state_dict())
    assert_close(checkpointed.alpha.conv.weight.grad, fewer.alpha.conv.weight.grad)


@pytest.mark.parametrize("beta", ["mlp", "linear"])
@pytest.mark.parametrize("frames", [None, FRAMES])
def test_a_fuser_is_one_of_as_many_tokens(frames, beta):
    fuser = randomized(TokenFuser(DIM, S, num_frames=frames, beta=beta, hidden_dim=7))
    small = cut(TokenFuser(DIM, 2, num_frames=frames, beta=beta, hidden_dim=7), fuser, frames or 1)
    tokens = torch.randn(2, 2 * (frames or 1), DIM)
    x = torch.randn(2, *([frames] if frames else []), *GRID, DIM)
    fewer = using(fuser, 2)
    assert_close(fewer(tokens, x), small(tokens, x))
    assert multiply_adds(fewer, tokens, x) == multiply_adds(small, tokens, x)
    fewer(tokens, x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in fewer.parameters())
    with pytest.raises(ValueError, match=rf"takes tokens \(b, {2 * (frames or 1)}, 6\)"):
        fewer(torch.randn(2, S * (frames or 1), DIM), x)


def test_a_layer_with_hooks_runs_as_a_module_where_all_tokens_are_used():
    """As adapters and observers need it; with fewer tokens a part of its weights is used directly."""
    module, calls = learner("mlp"), []
    assert isinstance(module.alpha.fc2, nn.Linear)
    module.alpha.fc2.register_forward_hook(lambda *_: calls.append(1))
    module(torch.randn(1, *GRID, DIM))
    assert calls == [1]


def test_the_numbers_are_shown():
    assert "num_tokens=5, used_tokens=2" in repr(using(learner("mlp"), 2))
    assert "used_tokens" not in repr(learner("mlp"))
    assert "num_tokens=5, used_tokens=2" in repr(using(TokenFuser(DIM, S), 2))
