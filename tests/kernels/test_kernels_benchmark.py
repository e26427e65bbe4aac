"""benchmarks/kernels.py: its floors in closed form, and what it says where there is no GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import tokenlearner  # noqa: F401 - before timm, which the script imports


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("kernels_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_floors_are_bytes_over_bandwidth_and_operations_over_rate(script):
    best = {"bytes_per_second": 3e12, "operations_per_second": 8e14}
    learner = script.floors(64, 1024, 1024, "learner", **best)
    assert learner["bytes"] == pytest.approx(64 * 1024 * 1024 * 2 / 3e12)  # 45 µs
    multiply_adds = 64 * 1024 * (1024 * 64 + 64 * 8 + 8 * 1024)
    assert learner["operations"] == pytest.approx(2 * multiply_adds / 8e14)
    fuser = script.floors(64, 1024, 1024, "fuser", **best)
    assert fuser == {"bytes": 2 * learner["bytes"], "operations": learner["operations"]}


def test_without_a_gpu_it_says_so_in_one_sentence(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--out", str(tmp_path / "kernels.json")])
    with pytest.raises(SystemExit, match="times kernels on a CUDA GPU, and PyTorch finds none on this machine"):
        script.main()
    assert list(tmp_path.iterdir()) == []
