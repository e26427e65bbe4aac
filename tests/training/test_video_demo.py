"""The video demo with one short epoch: files, numbers and models that agree. Its full run is too long for a test."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tokenlearner.data import moving_digits
from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.videos import find_videos, probe
from tokenlearner.evaluation.clips import clip_files
from tokenlearner.evaluation.predict import predict
from tokenlearner.insertion.insert import insertion_of
from tokenlearner.insertion.saving import load
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import Speed
from tokenlearner.training import video_demo

NAMES = ["plain", "tokenlearner", "frame_average"]


def speeds(models: dict[str, nn.Module], inputs: torch.Tensor) -> list[Speed]:
    """In place of measuring for seconds."""
    assert inputs.shape == (32, 1, 8, 20, 20)
    return [Speed(name, 100.0 * (i + 1), 2.5, 1.0 + i, 9, len(inputs)) for i, name in enumerate(models)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict, list[str]]:
    output, log = tmp_path_factory.mktemp("runs") / "demo-video", []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(video_demo, "measure_speed", speeds)
        patched.setattr(video_demo, "CLIPS", 64)
        return output, video_demo.video_demo(output, epochs=1, log=log.append), log


def test_summary(run):
    output, summary, log = run
    assert json.loads((output / "summary.json").read_text()) == summary
    assert [model["name"] for model in summary["models"]] == NAMES
    plain, few, frames = (model["tokens_per_layer"] for model in summary["models"])
    assert (plain, few, frames) == ([100] * 4, [100, 100, 32, 32], [25] * 4)
    assert (summary["held_out"], summary["seed"]) == (450, 0)
    assert [line.split(":")[0] for line in log] == NAMES


@pytest.mark.parametrize("number", [0, 1])
def test_saved_models_are_the_ones_of_the_summary(run, number):
    output, summary, _ = run
    written, model = summary["models"][number], load(output / NAMES[number])
    clips = moving_digits.load(64).test
    x = torch.stack([clip for clip, _, _ in clips.__getitems__(list(range(len(clips))))])
    with torch.inference_mode():
        right = (model(x).argmax(-1) == clips.labels).float().mean()
    assert written["accuracy"] == pytest.approx(float(right), abs=1e-6)
    counted = cost(model, (1, 8, 20, 20))
    assert (written["parameters"], written["macs"]) == (counted.parameters, counted.macs)
    assert model.label_names == moving_digits.CLASSES
    assert (insertion_of(model) is None) == (number == 0)


def test_clips_are_files_of_what_the_model_was_scored_on(run):
    """But for what the codec loses, which hardly changes the model's answers."""
    output, model = run[0], load(run[0] / "tokenlearner")
    files = find_videos(output / "clips")
    assert sorted(file.stem for file in files) == sorted(moving_digits.CLASSES)
    info = probe(files[0])
    assert (info.frames, info.fps, info.width, info.height) == (8, 4, 20, 20)
    window = clip_files(model, LabelledClips(tuple(files), (0,) * 8, ("",)), (1, 1))
    clips = moving_digits.load(64).test
    original = torch.stack([clips[moving_digits.CLASSES.index(file.stem)][0] for file in files])
    read = torch.stack([window[i][0][0] for i in range(8)])
    error = (read - original) * moving_digits.STD * 255
    assert (error**2).mean().sqrt() < 2.5  # of 255 levels
    with torch.inference_mode():
        expected = model(original).softmax(-1)
    for found, row in zip(predict(model, files, top=8), expected, strict=True):
        named = {name: float(p) for name, p in zip(moving_digits.CLASSES, row)}
        assert dict(found.labels) == pytest.approx(named, abs=0.05)


def test_sheets_and_films_of_what_the_tokens_look_at(run):
    output, _, _ = run
    sheets, films = sorted((output / "maps").glob("*.png")), sorted((output / "maps").glob("*.mp4"))
    assert [path.stem for path in sheets] == [path.stem for path in films]
    assert [path.stem for path in films] == ["by-threes-clockwise", "by-twos-clockwise", "clockwise", "there-and-back"]
    info = probe(films[0])
    assert (info.frames, info.fps, info.width, info.height) == (8, 4, 300, 300)  # the frame and eight maps


def test_report(run):
    output, summary, _ = run
    page = (output / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == page.count("data:image/png;base64,") == 4
    assert "<th>MACs / clip</th><th>clips/s</th>" in page
    assert [model["inputs"] for model in summary["models"]] == ["clips"] * 3
    assert not re.search(r"https?:|<script|<link|url\((?!#)", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page))
