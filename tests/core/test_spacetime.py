"""Tokens over space and time against loops over frames and positions, and against the per-frame learner."""

import copy

import naive
import pytest
import torch
from naive import randomized, relative_error

from tokenlearner.core import NeighbourTokenLearner, TokenLearner, WindowTokenLearner

GRID, T, D, S = (2, 3), 4, 5, 3
KINDS = [("mlp", "softmax"), ("conv", "sum"), ("conv", "mean"), ("conv1", "mean"), ("gate", "sum")]
CLASSES = [NeighbourTokenLearner, WindowTokenLearner]


def make(cls, kind="mlp", pool=None, **options):
    return randomized(cls(D, S, kind, hidden_dim=7, pool=pool, **options))


def clip(frames=T, **options):
    return torch.randn(2, frames, *GRID, D, **options)


def per_frame(learner):
    """A TokenLearner with the parameters ``learner`` shares with it."""
    frame = TokenLearner(D, S, learner.kind, pool=learner.pool, hidden_dim=7)
    frame.load_state_dict({key: value for key, value in learner.state_dict().items() if key.startswith("alpha.")})
    return frame.train(learner.training)


def seen_by(learner, x):
    """X_t + Σ_k w_k ⊙ X_{t+k}, offset by offset, with nothing outside the clip."""
    reach, out = learner.window // 2, x.clone()
    for t in range(x.shape[1]):
        for k in range(-reach, reach + 1):
            if 0 <= t + k < x.shape[1]:
                out[:, t] = out[:, t] + x[:, t + k] * learner.time_weight.double()[:, k + reach]
    return out


# --- neighbours


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize(("kind", "pool"), KINDS)
def test_neighbours_agree_with_a_naive_loop(kind, pool, window, training):
    learner = make(NeighbourTokenLearner, kind, pool, window=window).train(training)
    x = clip(requires_grad=True)
    inputs = [x, *learner.parameters()]
    A = naive.maps(learner, seen_by(learner, x.double()).flatten(0, 1))
    expected = naive.pooled(A, x.double().flatten(0, 1), mean=pool == "mean").reshape(2, T, S, D)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)

    tokens = learner(x)
    assert relative_error(tokens, expected) < 1e-5
    for gradient, expected_gradient in zip(torch.autograd.grad((tokens * direction).sum(), inputs), wanted):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    assert relative_error(learner.maps(x), A.reshape(2, T, S, *GRID)) < 1e-5


@pytest.mark.parametrize(("kind", "pool"), KINDS)
def test_new_neighbours_change_nothing_until_trained(kind, pool):
    learner = NeighbourTokenLearner(D, S, kind, pool=pool, hidden_dim=7).eval()
    frame, x = per_frame(learner), clip()
    assert torch.equal(learner(x), frame(x.flatten(0, 1)).unflatten(0, (2, T)))
    learner(x).square().sum().backward()
    assert learner.time_weight.grad.abs().min() > 0  # and it can be trained


def test_a_map_sees_its_neighbours_and_no_further():
    """``mlp`` reads single positions, so what moves a map of frame 0 is a change within its window of three."""
    learner, x = make(NeighbourTokenLearner), clip()
    maps = learner.maps(x)[:, 0]
    for t, moves in [(1, True), (2, False), (3, False)]:
        changed = x.clone()
        changed[:, t] += torch.randn_like(x[:, t])
        assert torch.equal(learner.maps(changed)[:, 0], maps) is not moves


# --- windows


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize(("kind", "pool"), KINDS)
def test_windows_agree_with_a_naive_loop(kind, pool, window):
    learner = make(WindowTokenLearner, kind, pool, window=window).eval()
    x = clip(requires_grad=True)
    inputs = [x, *learner.parameters()]
    if kind == "mlp":  # a frame's own softmax has lost the constant that the window's still needs
        frames = [naive.each_position(lambda v: naive.mlp(v, learner.alpha), F) for F in x.double().flatten(0, 1)]
        logits = torch.stack(frames).movedim(-1, 1)
    else:
        A = naive.maps(learner, x.double().flatten(0, 1))
        logits = (A / (1 - A)).log()
    logits = logits.reshape(2, T // window, window, S, *GRID)
    maps, tokens = [], []
    for e in range(2):
        for i in range(T // window):
            L = torch.stack([logits[e, i, f] + learner.frame_bias.double()[:, f, None, None] for f in range(window)])
            A = L.exp() / L.exp().sum(dim=(0, 2, 3), keepdim=True) if kind == "mlp" else 1 / (1 + (-L).exp())
            z = sum(naive.pooled(A[f][None], x.double()[e, i * window + f][None])[0] for f in range(window))
            tokens.append(z / (window * GRID[0] * GRID[1]) if pool == "mean" else z)
            maps.append(A.movedim(1, 0))
    expected = torch.stack(tokens).reshape(2, T // window, S, D)
    expected_maps = torch.stack(maps).reshape(2, T // window, S, window, *GRID)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * direction).sum(), inputs)

    out = learner(x)
    assert relative_error(out, expected) < 1e-5
    assert relative_error(learner.maps(x), expected_maps) < 1e-5
    for gradient, expected_gradient in zip(torch.autograd.grad((out * direction).sum(), inputs), wanted):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_a_windows_maps_sum_to_one_over_space_and_time():
    maps = make(WindowTokenLearner, window=4).maps(clip())
    torch.testing.assert_close(maps.sum(dim=(-3, -2, -1)), torch.ones(2, 1, S))


def test_a_new_window_does_not_know_the_order_of_frames_and_a_trained_one_does():
    learner, x = WindowTokenLearner(D, S, window=4, hidden_dim=7), clip()
    torch.testing.assert_close(learner(x.flip(1)), learner(x))
    randomized(learner)
    assert not torch.allclose(learner(x.flip(1)), learner(x), rtol=1e-2)


def test_windows_are_apart():
    learner, x = make(WindowTokenLearner, "conv", window=2), clip()
    changed = x.clone()
    changed[:, 2:] += 1
    assert torch.equal(learner(changed)[:, 0], learner(x)[:, 0])


# --- both


@pytest.mark.parametrize(("kind", "pool"), KINDS)
@pytest.mark.parametrize("cls", CLASSES)
def test_window_one_is_the_per_frame_learner(cls, kind, pool):
    learner, x = make(cls, kind, pool, window=1).eval(), clip()
    frame = per_frame(learner)
    assert set(learner.state_dict()) == set(frame.state_dict())
    assert torch.equal(learner(x), frame(x.flatten(0, 1)).unflatten(0, (2, T)))
    maps = learner.maps(x) if cls is NeighbourTokenLearner else learner.maps(x).squeeze(3)
    assert torch.equal(maps, frame.maps(x.flatten(0, 1)).unflatten(0, (2, T)))


@pytest.mark.parametrize("cls", CLASSES)
def test_tokens_and_maps_are_those_of_the_two_calls(cls):
    learner, x = make(cls), clip()
    tokens, maps = learner.tokens_and_maps(x)
    assert torch.equal(tokens, learner(x))
    assert torch.equal(maps, learner.maps(x))
    assert torch.equal(copy.deepcopy(learner)(x), tokens)


@pytest.mark.parametrize("cls", CLASSES)
def test_flat_positions_with_a_grid_are_the_map(cls):
    learner, x = make(cls, "conv"), clip()
    assert torch.equal(learner(x.flatten(2, 3), grid=GRID), learner(x))
    assert torch.equal(learner.maps(x.flatten(2, 3), grid=GRID), learner.maps(x))
    with_grid = cls(D, S, "conv", GRID)
    with_grid.load_state_dict(learner.state_dict())
    assert torch.equal(with_grid(x.flatten(2, 3)), learner(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_autocast_stays_close(cls):
    learner, x = make(cls), clip()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, maps = learner.tokens_and_maps(x)
    assert relative_error(tokens, learner(x)) < 0.03
    assert maps.dtype is torch.float32


def test_errors_say_what_is_wrong():
    for cls in CLASSES:
        for kind in ("grid", "dense", "average"):
            with pytest.raises(ValueError, match=f"{cls.__name__} takes kind 'mlp'.*not '{kind}'"):
                cls(D, S, kind)
        with pytest.raises(ValueError, match=r"takes \(b, t, h, w, d\).*got shape \(2, 3, 5\)"):
            make(cls)(torch.randn(2, 3, D))
        with pytest.raises(ValueError, match="window must be a positive whole number"):
            cls(D, S, window=0)
    with pytest.raises(ValueError, match="window must be odd"):
        NeighbourTokenLearner(D, S, window=2)
    with pytest.raises(ValueError, match=r"got 3 frames .*give a multiple of 2"):
        make(WindowTokenLearner)(clip(3))
