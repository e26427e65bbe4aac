"""Models timed side by side: exact values on a clock of our own, memory in closed form, and that nothing is changed."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch._dynamo.testing import CompileCounter

from tokenlearner import InputError
from tokenlearner.inspection import speed
from tokenlearner.inspection.bench import BenchRow, Conditions, bench
from tokenlearner.inspection.bench_picture import draw_bench
from tokenlearner.inspection.memory import peak_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODULE = sys.modules[bench.__module__]


class Clock:
    """Stands still but for the models that advance it; their copies share it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __deepcopy__(self, memo: dict) -> "Clock":
        return self

    def pass_for(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


class Timed(nn.Module):
    """3 × ``width`` MACs, which take ``seconds`` for each input."""

    def __init__(self, clock: Clock, name: str, seconds: float, width: int) -> None:
        super().__init__()
        self.clock, self.name, self.seconds = clock, name, seconds
        self.linear = nn.Linear(3, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.pass_for(self.name, self.seconds * len(x))
        return self.linear(x)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(MODULE, "matmul_pass", lambda *_: partial(clock.pass_for, "matmul", 0.5))
    return clock


@pytest.fixture
def small_matmul(monkeypatch):
    monkeypatch.setitem(MODULE.MATMUL_SIDE, "cpu", 16)


def test_rows_are_those_of_the_clock(clock):
    models = {"dear": Timed(clock, "dear", 0.04, 40), "cheap": Timed(clock, "cheap", 0.01, 20)}
    rows = bench(models, (3,), batch_sizes=(2, 1), rounds=3, device="cpu")
    assert [(row.name, row.batch_size) for row in rows] == [("dear", 2), ("cheap", 2), ("dear", 1), ("cheap", 1)]
    assert [row.images_per_second for row in rows] == pytest.approx([25, 100, 25, 100])
    assert [row.seconds_per_batch for row in rows] == pytest.approx([0.08, 0.02, 0.04, 0.01])
    assert [row.speedup for row in rows] == pytest.approx([1, 4, 1, 4])
    assert [row.macs for row in rows] == [120, 60, 120, 60]
    assert [row.mac_ratio for row in rows] == [1, 2, 1, 2]
    assert [row.realised for row in rows] == pytest.approx([1, 2, 1, 2])
    assert [row.latency for row in rows] == pytest.approx([0.04, 0.01, 0.04, 0.01])
    assert [row.parameters for row in rows] == [120, 60, 120, 60]
    rate = 1024**3 / 0.5
    assert [row.matmul_share * rate for row in rows] == pytest.approx([120 / 0.04, 60 / 0.01] * 2)


def test_a_training_step_counts_as_three_passes_and_has_no_latency(clock):
    (row,) = bench({"it": Timed(clock, "it", 0.04, 40)}, (3,), batch_sizes=(2,), rounds=2, device="cpu", mode="train")
    assert row.matmul_share * 1024**3 / 0.5 == pytest.approx(3 * 120 / 0.04)
    assert row.macs == 120
    assert row.latency is None


def test_ratios_are_taken_within_a_round():
    """A machine that is slower in some rounds: the median of the ratios is none of the ratios of medians."""
    medians = MODULE._medians([1, 2, 8, 4], [4, 4, 4, 4], [2, 2, 2, 2], 10, mac_ratio=2.5, work=0.1)
    assert medians["speedup"] == 1.5  # of 4, 2, 0.5 and 1
    assert medians["speedup_quartiles"] == (0.625, 3.5)
    assert medians["realised"] == 0.6
    assert medians["images_per_second"] == 3.75  # of 10, 5, 1.25 and 2.5
    assert medians["images_per_second_spread"] == (8.75 - 1.5625) / 2
    assert medians["matmul_share"] == pytest.approx(0.075)  # of 0.2, 0.1, 0.025 and 0.05


@pytest.mark.parametrize(("values", "expected"), [([3], (3, 3)), ([3, 1], (1, 3)), ([1, 2, 3, 4, 5, 6, 7], (2, 6))])
def test_quartiles(values, expected):
    assert speed.quartiles(values) == expected


def test_models_and_matrix_product_take_turns(clock):
    models = {"a": Timed(clock, "a", 0.05, 4), "b": Timed(clock, "b", 0.025, 4)}
    bench(models, (3,), batch_sizes=(2,), rounds=2, seconds_per_round=0.1, mode="train", device="cpu")
    a, b = ["a"], ["b"] * 2
    counting, trial = ["a", "b"], ["a", "b"]
    warm_up = ["a"] * 4 + ["b"] * 4 + ["matmul"] * 2  # whose one call is more than a round
    memory = ["a", "b"]
    assert clock.calls == counting + trial + warm_up + a + b + ["matmul"] + ["matmul"] + b + a + memory


def test_progress_counts_the_rounds(clock):
    steps = []
    models = {"a": Timed(clock, "a", 0.05, 4)}
    bench(models, (3,), rounds=2, device="cpu", progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 6) for i in range(1, 7)]  # of latency, batch 1 and batch 8


@pytest.mark.parametrize(("one_by_one", "waits"), [(False, "wccw"), (True, "wcwcww")])
def test_a_gpu_is_waited_for(monkeypatch, one_by_one, waits):
    """w is waiting, c a call: between the clock's readings all calls that were queued, or each alone."""
    happened = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("w"))
    speed._time(lambda: happened.append("c"), CUDA, 2, one_by_one)
    assert "".join(happened) == waits


def test_a_call_longer_than_a_round_is_warmed_up_twice_only(clock):
    long = partial(clock.pass_for, "long", 1.0)
    assert speed.seconds_in_turns([long], CPU, rounds=2, seconds_per_round=0.2) == [[1, 1]]
    assert clock.calls == ["long"] * 4


# ---- memory


def test_memory_of_an_mlp_is_its_closed_form():
    """The widest moment: GELU's input and output, or its output and that of the last layer."""
    for hidden, out in ((128, 32), (32, 128)):
        model = nn.Sequential(nn.Linear(16, hidden), nn.GELU(), nn.Linear(hidden, out))
        x = torch.randn(10, 16)
        with torch.inference_mode():
            assert peak_memory(partial(model, x), CPU) == 4 * 10 * (hidden + max(hidden, out))


def test_memory_of_a_training_step_has_gradients(small_matmul):
    """Of a layer that is nearly all weights: a gradient of their size, and little beside it."""
    (row,) = bench({"it": nn.Linear(5000, 4, bias=False)}, (5000,), batch_sizes=(2,), rounds=1, mode="train")
    assert 4 * 4 * 5000 <= row.peak_memory < 4 * 4 * 5000 + 1000


def test_memory_that_was_there_before_does_not_count():
    old = [torch.ones(1000)]

    def run() -> torch.Tensor:
        old.clear()
        small = torch.empty(200)
        large = torch.empty(500)
        del small
        return large.neg()

    assert peak_memory(run, CPU) == 4 * 1000


def test_memory_of_a_gpu_is_that_above_the_weights(monkeypatch):
    happened = []
    fakes = {"synchronize": None, "reset_peak_memory_stats": None, "memory_allocated": 100, "max_memory_allocated": 350}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, n=name, v=value: (happened.append(n), v)[1])
    assert peak_memory(lambda: happened.append("run"), CUDA) == 250
    reset, run, most = (happened.index(name) for name in ("reset_peak_memory_stats", "run", "max_memory_allocated"))
    assert reset < happened.index("memory_allocated") < run < most
    assert happened[most - 1] == "synchronize"


# ---- how models run


class Noting(nn.Module):
    """Notes in what form it runs, in a list that its copies share."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.outputs, self.notes = outputs, NOTES

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not x.is_meta:
            autocast = torch.is_autocast_enabled("cpu")
            NOTES.add((x.dtype, self.conv.weight.dtype, autocast, self.training, torch.is_inference_mode_enabled()))
        y = self.dropout(self.norm(self.conv(x))).mean(dim=(2, 3))
        return y if self.outputs == 1 else (y,) * self.outputs


NOTES: set[tuple] = set()
FORMS = {
    ("forward", "float32"): (torch.float32, torch.float32, False, False, True),
    ("forward", "bf16"): (torch.bfloat16, torch.bfloat16, False, False, True),
    ("train", "float32"): (torch.float32, torch.float32, False, True, False),
    ("train", "bf16"): (torch.float32, torch.float32, True, True, False),
}


@pytest.mark.parametrize(("mode", "precision"), FORMS)
def test_models_run_as_asked_and_are_left_alone(small_matmul, mode, precision):
    model = Noting().double()
    model.norm.eval()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(model)
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters()]
    random = torch.get_rng_state()
    NOTES.clear()
    bench({"it": model}, (3, 4, 4), batch_sizes=(2,), rounds=1, seconds_per_round=0.001, mode=mode, precision=precision)
    assert {FORMS[mode, precision]} == NOTES
    assert (model.training, model.norm.training) == (True, False)
    for (name, value), expected in zip(model.state_dict().items(), before.state_dict().values()):
        assert value.dtype == expected.dtype, name
        assert torch.equal(value, expected), name
    for parameter, (gradient, values) in zip(model.parameters(), gradients):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)
    assert torch.equal(torch.get_rng_state(), random)


def test_models_with_two_heads_can_be_trained(small_matmul):
    (row,) = bench({"it": Noting(2)}, (3, 4, 4), batch_sizes=(2,), rounds=1, seconds_per_round=0.001, mode="train")
    assert row.seconds_per_batch > 0


def test_all_models_of_a_class_are_compiled(small_matmul, monkeypatch):
    """At two batch sizes each; PyTorch would stop at eight graphs and run the rest as they are."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    models = {str(i): nn.Sequential(nn.Linear(3, 4 + i)) for i in range(10)}
    bench(models, (3,), batch_sizes=(2,), rounds=1, seconds_per_round=0.001, compiled=True)
    assert counter.frame_count == 20


@pytest.mark.parametrize(("cuda_graphs", "mode"), [(False, None), (True, "reduce-overhead")])
def test_what_the_compiler_is_told(monkeypatch, cuda_graphs, mode):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: asked.append(options))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: self)  # there is no GPU here
    Conditions(CUDA, compiled=True, cuda_graphs=cuda_graphs).ready(nn.Linear(3, 4))
    assert asked == [{"dynamic": False, "mode": mode}]


FROZEN = nn.Linear(3, 4).requires_grad_(False)
NEEDS_TWO = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": {}}, "no model to time"),
        ({"batch_sizes": ()}, "different numbers from 1 up"),
        ({"batch_sizes": (1, 0)}, "from 1 up, such as 1 and 8, not \\[1, 0\\]"),
        ({"batch_sizes": (2, 2)}, "different numbers"),
        ({"rounds": 0}, "at least one round"),
        ({"seconds_per_round": 0.0}, "more than 0 seconds is needed, not 15 of 0"),
        ({"precision": "fp8"}, "float32 or bf16, not 'fp8'"),
        ({"mode": "backward"}, "forward or train, not 'backward'"),
        ({"device": "gpu"}, "'gpu' is not the name of a device"),
        ({"device": "cuda:7"}, "there is no device cuda:7 here"),
        ({"device": "meta"}, "there is no device meta here"),
        ({"cuda_graphs": True}, "go with a compiled model on a GPU"),
        ({"input_size": (5,)}, "^it: Linear can't take an input of \\(5,\\)"),
        ({"input_size": ()}, "it: input_size is one input's shape"),
        ({"models": {"it": nn.Identity()}}, "it has no matrix product"),
        ({"models": {"it": torch.compile(nn.Linear(3, 4), backend="eager")}}, "it is compiled already"),
        ({"models": {"it": FROZEN}, "mode": "train"}, "it can't run 1×3 in float32 on cpu: element 0 of tensors"),
        ({"models": {"it": NEEDS_TWO}, "mode": "train"}, "it can't run 1×3 .*: Expected more than 1 value per channel"),
    ],
)
def test_refusals(options, message):
    asked = {"models": {"it": nn.Linear(3, 4)}, "input_size": (3,), "device": "cpu", **options}
    with pytest.raises(InputError, match=message):
        bench(asked.pop("models"), asked.pop("input_size"), **asked)


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(InputError, match="Old GPU has no bfloat16: use float32"):
        Conditions(CUDA, precision="bf16")


def test_a_model_ten_times_as_dear_is_slower(small_matmul):
    """Real seconds, on a machine that may be busy: only a factor of 3 is asked for."""
    dear, cheap = (nn.Sequential(*[nn.Linear(128, 128) for _ in range(n)]) for n in (40, 4))
    rows = bench({"dear": dear, "cheap": cheap}, (128,), batch_sizes=(64,), rounds=9, seconds_per_round=0.01)
    assert rows[1].mac_ratio == 10
    assert rows[1].speedup > 3
    assert rows[0].latency > rows[1].latency


# ---- rows kept and drawn

ROW = BenchRow(
    name="host", batch_size=8, images_per_second=10.0, images_per_second_spread=0.1, seconds_per_batch=0.8,
    speedup=1.0, speedup_quartiles=(1.0, 1.0), macs=1000, mac_ratio=1.0, realised=1.0, matmul_share=0.7,
    parameters=10, peak_memory=123, latency=0.1,
)  # fmt: skip
CHEAP = replace(ROW, name="a$b$", speedup=1.8, speedup_quartiles=(1.7, 1.85), mac_ratio=2.0, realised=0.9, latency=None)


@pytest.mark.parametrize("row", [ROW, CHEAP], ids=["host", "cheap"])
def test_rows_survive_json(row):
    assert BenchRow.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_the_picture_shows_the_rows(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    rows = [ROW, CHEAP, replace(ROW, batch_size=1), replace(CHEAP, batch_size=1, speedup=1.75, realised=0.75)]
    path = draw_bench(rows, tmp_path / "new" / "bench.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axis,) = drawn[0].axes
    assert [bar.get_width() for bar in axis.patches] == [1.0, 1.8, 1.0, 1.75]
    assert [text.get_text() for text in axis.texts] == ["1.00", "0.90", "1.00", "0.75"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["host", "a$b$"]
    marks = [{x for x, _ in line} for line in axis.collections[-1].get_segments()]
    assert marks == [{1.0}, {2.0}]  # the MAC ratios
    assert len({round(bar.get_y(), 6) for bar in axis.patches}) == 4  # beside one another, not on top
