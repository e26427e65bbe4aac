"""Measured speeds: exact values on a clock of our own, and one real measurement."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tokenlearner.inspection import measure_speed, speed


class Slow(nn.Module):
    """Takes ``seconds`` on the clock, longer and longer with ``drift``, and notes its calls."""

    def __init__(self, clock, seconds: float, calls: list[str] | None = None, name: str = "", drift: float = 0) -> None:
        super().__init__()
        self.inner = nn.BatchNorm1d(3)
        self.clock, self.seconds, self.drift, self.name = clock, seconds, drift, name
        self.calls = [] if calls is None else calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert not self.inner.training
        assert torch.is_inference_mode_enabled()
        self.calls.append(self.name)
        self.clock.now += self.seconds * (1 + self.drift * self.clock.now)
        return self.inner(x)


@pytest.fixture
def clock(monkeypatch):
    """Stands still but for the models that advance it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    return clock


def test_speeds_and_ratios_are_those_of_the_clock(clock):
    models = {"dear": Slow(clock, 0.05), "cheap": Slow(clock, 0.005), "middling": Slow(clock, 0.01)}
    results = measure_speed(models, torch.ones(4, 3), rounds=5, seconds_per_round=0.1)
    assert [result.name for result in results] == ["dear", "cheap", "middling"]
    assert [result.images_per_second for result in results] == pytest.approx([80, 800, 400])
    assert [result.ratio for result in results] == pytest.approx([1, 10, 5])
    assert [result.spread for result in results] == pytest.approx([0, 0, 0], abs=1e-6)
    assert {(result.rounds, result.batch_size) for result in results} == {(5, 4)}


def test_models_take_turns_and_fill_their_time(clock):
    calls = []
    models = {"a": Slow(clock, 0.05, calls, "a"), "b": Slow(clock, 0.025, calls, "b")}
    measure_speed(models, torch.ones(1, 3), rounds=3, seconds_per_round=0.1)
    warmup = ["a"] * 4 + ["b"] * 4
    a, b = ["a"] * 2, ["b"] * 4
    assert calls == warmup + a + b + b + a + a + b


def test_drift_moves_the_speeds_but_hardly_the_ratio(clock):
    """A machine that gets slower all the time: within a round both models suffer about alike."""
    models = {"one": Slow(clock, 0.004, drift=0.2), "other": Slow(clock, 0.001, drift=0.2)}
    one, other = measure_speed(models, torch.ones(1, 3), rounds=15, seconds_per_round=0.1)
    assert one.images_per_second < 0.8 / 0.004
    assert one.spread > 0.1 * one.images_per_second
    assert other.ratio == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_are_restored(clock, fails):
    model = Slow(clock, 0.01)
    model.train()
    model.inner.eval()
    if fails:
        with pytest.raises(RuntimeError, match="running_mean should contain 5 elements"):
            measure_speed({"model": model}, torch.ones(2, 5), rounds=1)
    else:
        measure_speed({"model": model}, torch.ones(2, 3), rounds=1)
    assert model.training
    assert not model.inner.training


def test_a_model_ten_times_as_dear_is_slower():
    """Real seconds, on a machine that may be busy: only a factor of 3 is asked for."""
    cheap = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)])
    dear = nn.Sequential(*[nn.Linear(128, 128) for _ in range(40)])
    x = torch.randn(64, 128)
    one, other = measure_speed({"cheap": cheap, "dear": dear}, x, rounds=9, seconds_per_round=0.01)
    assert one.ratio == 1
    assert other.ratio < 1 / 3
    assert other.images_per_second / one.images_per_second == pytest.approx(other.ratio, rel=0.5)
