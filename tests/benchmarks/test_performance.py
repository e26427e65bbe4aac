"""The script that measures: its plan, that it goes on where it stopped, its arithmetic, and what its report says."""

import json
from functools import partial

import performance
import performance_report
import pytest
import timm
import torch
from performance import AGAIN, ALL_PEERS, INSERTED, LEARNED, PLANS, Case, measure, parts, variant
from performance_report import write_report
from torch import nn

import tokenlearner
from tokenlearner.inspection.bench import BenchRow

SIZE = (3, 64, 64)
CASE = Case("tiny", "test_vit", SIZE, (8, 1), (AGAIN, LEARNED, "tome"))


def entry(name: str, batch_size: int, **changes: float) -> BenchRow:
    values = {
        "images_per_second": 10.0,
        "images_per_second_spread": 0.1,
        "seconds_per_batch": batch_size / 10,
        "speedup": 1.0,
        "speedup_quartiles": (1.0, 1.0),
        "macs": 2 * 10**9,
        "mac_ratio": 1.0,
        "realised": 1.0,
        "matmul_share": 0.7,
        "parameters": 5,
        "peak_memory": 2_000_000,
        "latency": 0.1,
    }
    return BenchRow(name=name, batch_size=batch_size, **{**values, **changes})


def fake_bench(models, size, *, batch_sizes, **options):
    """The variant is 1.8 times as fast where its MACs would make it twice as fast."""
    assert size == SIZE
    assert options == {"rounds": 2, "seconds_per_round": 0.2, "device": "cpu"}
    fast = {"speedup": 1.8, "speedup_quartiles": (1.7, 1.9), "mac_ratio": 2.0, "realised": 0.9, "macs": 10**9}
    first, second = models
    return [e for b in batch_sizes for e in (entry(first, b), entry(second, b, **fast))]


@pytest.fixture
def plan(monkeypatch):
    """One case in the place of the CPU's."""
    monkeypatch.setitem(PLANS, "cpu", (CASE,))
    monkeypatch.setattr(performance, "bench", fake_bench)
    monkeypatch.setattr(performance, "parts", lambda *_: PARTS)
    monkeypatch.setattr(performance, "bytes_read_per_second", lambda: 2e9)
    monkeypatch.setattr(performance, "variant", lambda name, host, size: (host, "86 merges" if name == "tome" else ""))


# The host takes 100 ms for 10 GMACs, so its rate makes the floors 40, 2 and 8 ms.
PARTS = [
    {"part": "before", "macs": (4 * 10**9, 4 * 10**9), "seconds": (0.044, 0.045), "weights": 10**7},
    {"part": "learning", "macs": (0, 2 * 10**8), "seconds": (0.0, 0.005), "weights": 2000},
    {"part": "after", "macs": (6 * 10**9, 8 * 10**8), "seconds": (0.056, 0.010), "weights": 8 * 10**6},
]


def run(output, only="", minutes=1.0):
    measure("cpu", output, only, minutes, rounds=2)


@pytest.mark.slow
def test_the_hosts_of_the_plans_can_be_built_with_their_insertions():
    cases = {(case.host, *case.options.items()): case for plan in ("cpu", "gpu") for case in PLANS[plan]}
    for case in cases.values():
        assert set(case.variants) <= {AGAIN, *INSERTED, *ALL_PEERS}
        for arguments in (INSERTED[name] for name in case.variants if name in INSERTED):
            with torch.device("meta"):
                model = tokenlearner.insert(timm.create_model(case.host, **case.options), **arguments)
            assert len(set(tokenlearner.cost(model, case.size).tokens)) == 2


@pytest.mark.parametrize("name", ["tome", "average pooling", "shortened"])
def test_a_peer_has_the_macs_of_the_learned_tokens(name):
    host = timm.create_model("test_vit", img_size=64)
    few, _ = variant(LEARNED, host, SIZE)
    peer, setting = variant(name, host, SIZE)
    assert setting
    assert tokenlearner.cost(peer, SIZE).macs == pytest.approx(tokenlearner.cost(few, SIZE).macs, rel=0.15)
    assert tokenlearner.insertion_of(host) is None


def test_the_host_again_is_another_with_its_weights():
    host = nn.Linear(3, 4)
    again, setting = variant(AGAIN, host, (3,))
    assert (setting, again is host) == ("", False)
    assert torch.equal(again.weight, host.weight)


def test_every_row_is_written_at_once_and_none_measured_twice(plan, tmp_path, monkeypatch, capsys):
    output, calls = tmp_path / "performance.json", []

    def interrupted(models, *arguments, **options):
        calls.append(list(models)[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fake_bench(models, *arguments, **options)

    monkeypatch.setattr(performance, "bench", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(output)
    assert [row["variant"] for row in json.loads(output.read_text())["rows"]] == [AGAIN]
    run(output)
    assert calls == [AGAIN, LEARNED, LEARNED, "tome", "tome"]  # with the host, and with learned tokens
    document = json.loads(output.read_text())
    assert [row["variant"] for row in document["rows"]] == [AGAIN, LEARNED, "tome"]
    assert document["threads"] == torch.get_num_threads()
    assert document["torch"] == torch.__version__
    tome = document["rows"][2]
    assert (tome["case"], tome["setting"], tome["rounds"]) == ("tiny", "86 merges", 2)
    assert [BenchRow.from_dict(e) for e in tome["host"]] == [entry("host", 8), entry("host", 1)]
    assert [e["realised"] for e in tome["measured"]] == [0.9, 0.9]
    assert "tiny, tome, batch 8: 10/s, 1.800× of 2.000×, realised 0.900" in capsys.readouterr().out


def test_only_some_rows_or_minutes(plan, tmp_path):
    output = tmp_path / "performance.json"
    run(output, only="tome")
    assert [row["variant"] for row in json.loads(output.read_text())["rows"]] == ["tome"]
    with pytest.raises(SystemExit, match="-1 minutes are over before tiny, the host again; call again to go on"):
        run(output, minutes=-1)


def test_rows_of_two_machines_are_not_mixed(plan, tmp_path):
    output = tmp_path / "performance.json"
    run(output, only="tome")
    document = json.loads(output.read_text())
    output.write_text(json.dumps({**document, "hardware": "another"}))
    with pytest.raises(SystemExit, match="is of another plan, machine or version"):
        run(output)


def test_parts_are_those_of_the_clock(monkeypatch):
    """A clock that layers of the host advance by 1, learned tokens' layers by 0.25 and the learner by 0.5."""
    now = [0.0]
    monkeypatch.setattr(performance.time, "perf_counter", lambda: now[0])

    def advance(module, args, output=None, *, tokens_take=1.0):
        now[0] += tokens_take

    host = timm.create_model("test_vit", img_size=64)
    model = tokenlearner.insert(timm.create_model("test_vit", img_size=64), 4, 2)
    for it, later in ((host, 1.0), (model, 0.25)):
        for i, block in enumerate(it.blocks):
            block.register_forward_hook(partial(advance, tokens_take=1.0 if i < 2 else later))
    model.blocks[2].token_learner.register_forward_hook(partial(advance, tokens_take=0.5))
    before, learning, after = parts(host, model, SIZE, 2, rounds=2)
    depth = len(host.blocks)
    assert before["seconds"] == (2, 2)
    assert learning["seconds"] == (0, 0.5)
    assert after["seconds"] == (depth - 2, (depth - 2) / 4)
    d, hidden = host.embed_dim, 64
    assert learning["macs"] == (0, 16 * (d * hidden + hidden * 4 + 4 * d))  # of 16 patches
    assert sum(part["macs"][1] for part in (before, learning, after)) == tokenlearner.cost(model, SIZE).macs
    assert sum(part["macs"][0] for part in (before, learning, after)) == tokenlearner.cost(host, SIZE).macs
    assert learning["weights"] == 4 * (2 * d + (d + 1) * hidden + (hidden + 1) * 4)
    assert after["weights"] == 4 * sum(p.numel() for block in host.blocks[2:] for p in block.parameters())
    assert before["weights"] == 4 * sum(p.numel() for p in model.parameters()) - learning["weights"] - after["weights"]


def test_memory_is_read_at_a_plausible_rate():
    assert 1e8 < performance.bytes_read_per_second(2**24) < 1e13


# ---- the report


def report(tmp_path):
    write_report(tmp_path / "performance.md", {"cpu": tmp_path / "performance.json", "gpu": tmp_path / "gpu.json"})
    return (tmp_path / "performance.md").read_text()


def test_the_report_says_what_was_measured(plan, tmp_path):
    run(tmp_path / "performance.json")
    text = report(tmp_path)
    assert "| tiny | 8 | 0.900 | 0.850–0.950 | 0.97 | missed by 0.070 | 1.800 | 70% |" in text
    assert "| tiny | 1 | 0.900 | 0.850–0.950 | 0.92 | missed by 0.020, within the quartiles | 1.800 | 70% |" in text
    shown = "1.00 | 10 | 1.80× (1.70–1.90) | 2.00× | 0.90 | 70% | 2 MB | 100 ms |"
    assert text.count(f"| tome | 86 merges | {shown}") == 2
    assert text.count("| host |  | 2.00 | 10 | 1.00× (1.00–1.00) | 1.00× | 1.00 | 70% | 2 MB | 100 ms |") == 2
    assert "Not run on a GPU. Ready, as `python benchmarks/performance.py gpu`: ViT-B/16 384², batch 64 and 256" in text


def test_the_report_says_where_the_time_goes(plan, tmp_path):
    """60 ms where the floor is 50: 5 too many before, 3 in learning, 2 after."""
    run(tmp_path / "performance.json")
    text = report(tmp_path)
    assert "| up to the learner | 32.00 | 44.00 | 40.00 | 45.00 | +8.3% of the pass | 10 MB | 5.00 |" in text
    assert "| learning the tokens | 1.60 |  | 2.00 | 5.00 | +5.0% of the pass | 2 kB | 0.00 |" in text
    assert "| from there on | 6.40 | 56.00 | 8.00 | 10.00 | +3.3% of the pass | 8 MB | 4.00 |" in text
    assert (
        "In these passes 0.833 is realised; what is above the floor adds up to the rest, mostly up to the learner. "
        "Reading is at 2 GB/s" in text
    )


def test_the_report_says_what_the_late_linear_layers_allow(plan, tmp_path, monkeypatch):
    """50 of 60 ms are realised; with the layers' 8 ms in 2, of 54."""
    found = {"weights": 4 * 10**7, "seconds": {"as it is": 0.008, "summed": 0.002}}
    document = {"command": "a command", "what": "the layers, float32", "hosts": {"tiny": found, "not planned": found}}
    (tmp_path / "late.json").write_text(json.dumps(document))
    monkeypatch.setattr(performance_report, "LATE_LINEARS", tmp_path / "late.json")
    run(tmp_path / "performance.json", only=AGAIN)
    assert "| tiny | summed | 2.00 | 20.0 | not run |" in report(tmp_path)
    run(tmp_path / "performance.json")
    text = report(tmp_path)
    assert "`a command` times these layers alone" in text
    assert "| tiny | as it is | 8.00 | 5.0 | 0.83 |\n| tiny | summed | 2.00 | 20.0 | 0.93 |\n" in text
    assert "not planned" not in text


@pytest.mark.parametrize(
    ("speedup", "faster", "slower"), [(0.8, "none", "tome"), (0.95, "none", "none"), (1.2, "tome", "none")]
)
def test_the_report_names_the_peers_that_are_faster(speedup, faster, slower, plan, tmp_path):
    """Those whose quartiles over learned tokens, timed in the same rounds, leave out 1."""
    run(tmp_path / "performance.json")
    document = json.loads((tmp_path / "performance.json").read_text())
    (row,) = document["together"]
    assert [(e["name"], e["batch_size"]) for e in row["measured"]] == [
        (name, size) for size in (8, 1) for name in (LEARNED, "tome")
    ]
    row["measured"][1] |= {"speedup": speedup, "speedup_quartiles": (speedup - 0.1, speedup + 0.1)}
    (tmp_path / "performance.json").write_text(json.dumps(document))
    text = report(tmp_path)
    assert "| host | batch | tome | top-k | average pooling | faster than learned tokens | slower |" in text
    shown = f"{speedup:.2f}× ({speedup - 0.1:.2f}–{speedup + 0.1:.2f})"
    assert f"| tiny | 8 | {shown} | not run | not run | {faster} | {slower} |" in text
    assert "| tiny | 1 | 1.80× (1.70–1.90) | not run | not run | tome | none |" in text


def test_what_was_not_run_is_marked(plan, tmp_path):
    run(tmp_path / "performance.json", only=AGAIN)
    text = report(tmp_path)
    assert "| tiny | 8 | not run |  | 0.97 |" in text
    assert text.count("| tome | not run |") == 2
    assert "| tiny | 8 | not run | not run | not run | not run |  |" in text
    assert "Where the pass" not in text
    (tmp_path / "performance.json").unlink()
    assert "Not run on a CPU. Ready, as `python benchmarks/performance.py cpu`: tiny, batch 8 and 1." in report(
        tmp_path
    )


def test_a_met_target_is_met(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(performance_report, "TARGETS", {8: 0.9, 1: 0.91})
    run(tmp_path / "performance.json")
    text = report(tmp_path)
    assert "| tiny | 8 | 0.900 | 0.850–0.950 | 0.9 | met, within the quartiles |" in text
    assert "| tiny | 1 | 0.900 | 0.850–0.950 | 0.91 | missed by 0.010, within the quartiles |" in text


def test_the_committed_report_is_of_the_committed_measurements(tmp_path):
    write_report(tmp_path / "performance.md")
    committed = performance.ROOT / "docs/performance.md"
    assert committed.read_text() == (tmp_path / "performance.md").read_text(), "python benchmarks/performance.py report"


def test_tiny_is_not_kept_by_mistake(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["performance.py", "tiny"])
    with pytest.raises(SystemExit):
        performance.main()
    assert "say with --output where it goes" in capsys.readouterr().err
