"""The commands on videos, one after the other as a user would give them."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tokenlearner.cli import main
from tokenlearner.data.write_video import write_video
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.training import train as training

TINY = (
    *("--model", "vivit_micro_patch8x2_64", "--image-size", "16", "--clip.frames", "4", "--clip.fps", "5"),
    *("--tokens", "2", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--held-out", "0.25"),
)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Four films of each of two classes, one second long, and one that is none."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    for name, level in (("dark", 40), ("bright", 200)):
        for i in range(4):
            frames = [Image.fromarray(np.full((16, 24, 3), level + 2 * t, np.uint8)) for t in range(10)]
            write_video(frames, folder / name / f"{i}.mp4", fps=10)
    (folder / "dark" / "none.mp4").write_text("no film")
    return folder


@pytest.fixture(scope="module")
def model(videos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "films"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "measure_speed", partial(measure_speed, seconds_per_round=0.001))
        main(["train", str(videos), *TINY, "--output", str(output)])
    return output


def test_train_leaves_films_in_its_report(model):
    page = (model / "report.html").read_text()
    assert page.count("<video controls loop muted playsinline") == page.count("data:video/mp4;base64,") >= 1
    assert "clips to learn from" in page
    assert "MACs / clip" in page
    summary = json.loads((model / "summary.json").read_text())
    assert (summary["models"][0]["inputs"], summary["damaged"]["count"]) == ("clips", 1)


def test_evaluate(run, videos, model):
    code, out, err = run("evaluate", model, videos, "--images", "all", "--views", 2, 1, "--workers", 0)
    assert code == 0
    assert re.search(r"clips +│ 8 +│", out)
    assert re.search(r"views +│ 2×1 +│", out)
    assert "1 damaged file skipped:" in err


def test_evaluate_a_list_with_its_videos_elsewhere(run, videos, model, tmp_path):
    (tmp_path / "val.json").write_text(json.dumps({"0.mp4": "dark", "1.mp4": "dark", "gone.mp4": "bright"}))
    options = ("--videos", videos / "dark", "--views", 1, 1, "--workers", 0, "--json")
    code, out, _ = run("evaluate", model, tmp_path / "val.json", *options)
    document = json.loads(out)
    assert (code, document["clips"]) == (0, 2)
    assert [Path(file).name for file in document["missing"]["files"]] == ["gone.mp4"]


def test_predict(run, videos, model):
    code, out, err = run("predict", model, videos / "dark", "--views", 1, 1, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert [Path(row["file"]).name for row in document["predictions"]] == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    assert {entry["label"] for row in document["predictions"] for entry in row["predictions"]} == {"dark", "bright"}
    assert document["damaged"]["count"] == 1


def test_maps(run, videos, model, tmp_path):
    code, out, err = run("maps", model, videos / "dark" / "0.mp4", videos / "bright" / "0.mp4", "--output", tmp_path)
    assert (code, err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "0.mp4", "0-2.png", "0-2.mp4"}
    assert "film" in out


def test_data(run, videos, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"0.mp4": "dark", "1.mp4": "grey"}))
    code, out, _ = run("data", tmp_path / "list.json", "--videos", videos / "dark", "--json")
    document = json.loads(out)
    assert (code, document["kind"], document["classes"], document["items"]) == (0, "videos", 2, 2)


def test_pictures_for_a_model_of_clips(run, model, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, out, err = run("predict", model, tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "holds no video" in err


def test_cost_of_clips(run):
    code, out, _ = run("cost", "vivit_micro_patch8x2_64", "--tokens", 8, "--over", "window", "--window", 4)
    assert code == 0
    assert "at 3×16×64×64, tokens 512×2 + 16×2" in " ".join(out.split())
    assert run("cost", "vivit_micro_patch8x2_64", "--input-size", "3,16,64,64")[0] == 0
    code, out, err = run("cost", "vivit_micro_patch8x2_64", "--over", "window")
    assert (code, out) == (1, "")
    assert "go with --tokens" in err


def test_an_image_model_given_videos(run, videos, tmp_path):
    code, _, err = run("train", videos, "--model", "vit_tiny_patch16_224", "--output", tmp_path / "run")
    assert (code, err.count("\n")) == (1, 1)
    assert "give a model of clips, such as vivit_tiny_patch16x2_224" in err
