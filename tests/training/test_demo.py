"""The demo with one epoch: files, numbers and models that agree. Its full run is too long for a test."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokenlearner.data import digits
from tokenlearner.evaluation.predict import predict
from tokenlearner.insertion.insert import insertion_of
from tokenlearner.insertion.saving import load
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import Speed
from tokenlearner.training.demo import demo

NAMES = ("plain", "tokenlearner")


def speeds(models: dict[str, nn.Module], inputs: torch.Tensor) -> list[Speed]:
    """In place of measuring for six seconds; tests/inspection/test_speed.py has the measuring."""
    assert inputs.shape == (64, 1, 12, 12)
    return [Speed(name, 100.0 * (i + 1), 2.5, 1.0 + i, 9, len(inputs)) for i, name in enumerate(models)]


def run_to(output: Path) -> tuple[Path, dict, list[str]]:
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tokenlearner.training.demo.measure_speed", speeds)
        return output, demo(output, epochs=1, log=log.append), log


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, list[str]]:
    return run_to(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.load(0.25)


def test_summary(run):
    output, summary, log = run
    assert json.loads((output / "summary.json").read_text()) == summary
    assert [model["name"] for model in summary["models"]] == list(NAMES)
    plain, few = summary["models"]
    assert (plain["tokens_per_layer"], few["tokens_per_layer"]) == ([36] * 4, [36, 36, 8, 8])
    assert few["macs"] < 0.7 * plain["macs"]
    assert [(m["images_per_second"], m["speedup"]) for m in (plain, few)] == [(100.0, 1.0), (200.0, 2.0)]
    assert (summary["held_out"], summary["seed"]) == (450, 0)
    assert [line.split(":")[0] for line in log] == list(NAMES)


@pytest.mark.parametrize("number", [0, 1])
def test_saved_models_are_the_ones_of_the_summary(run, data, number):
    output, summary, _ = run
    written, model = summary["models"][number], load(output / NAMES[number])
    with torch.no_grad():
        logits = model(data.test.images)
    assert written["accuracy"] == pytest.approx(float((logits.argmax(-1) == data.test.labels).float().mean()), abs=1e-6)
    # After one epoch all may be taken for one digit, by other weights too; hardly with the same loss.
    with (output / NAMES[number] / "metrics.csv").open(newline="") as file:
        (loss,) = (float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"])
    assert float(F.cross_entropy(logits, data.test.labels)) == pytest.approx(loss, abs=1e-5)
    counted = cost(model, (1, 12, 12))
    assert (written["parameters"], written["macs"]) == (counted.parameters, counted.macs)
    assert model.label_names == tuple("0123456789")
    assert (insertion_of(model) is None) == (NAMES[number] == "plain")


def test_pictures_are_files_of_what_the_model_was_scored_on(run, data):
    output, model = run[0], load(run[0] / "tokenlearner")
    files = sorted((output / "pictures").iterdir())
    assert [file.name for file in files] == [f"digit-{digit}.png" for digit in range(10)]
    first = [int((data.test.labels == digit).nonzero()[0]) for digit in range(10)]
    with torch.no_grad():
        expected = model(data.test.images[first]).softmax(-1)
    for found, row in zip(predict(model, files, top=10), expected, strict=True):
        assert dict(found.labels) == pytest.approx({str(i): float(p) for i, p in enumerate(row)}, abs=1e-5)


def test_report(run):
    output, summary, _ = run
    page = (output / "report.html").read_text()
    for model in summary["models"]:
        assert re.search(f"<td[^>]*>{model['accuracy']:.2%}</td>", page)
        assert re.search(f"<td[^>]*>{model['parameters']:,}</td>", page)
    assert re.search("<td[^>]*>36×2 \\+ 8×2</td>", page)
    assert page.count('<div class="look">') == 10
    assert page.count("data:image/png;base64,") == 10 * 9
    assert not re.search(r"https?:|<script|<link|url\((?!#)", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))


def metrics(folder: Path) -> list[str]:
    return [(folder / name / "metrics.csv").read_text() for name in NAMES]


def test_a_seed_fixes_the_result(run, tmp_path):
    torch.rand(7)  # whatever was drawn before
    output, summary, _ = run
    _, again, _ = run_to(tmp_path)
    assert [model["accuracy"] for model in again["models"]] == [model["accuracy"] for model in summary["models"]]
    assert metrics(tmp_path) == metrics(output)
    assert len(set(metrics(output))) == 2
    first, second = (load(folder / "tokenlearner").state_dict() for folder in (output, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)
