"""`tokenlearner tokens` as a user gives it."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

from export.families import clip_model, image_model
from tokenlearner import load, save
from tokenlearner.data.write_video import write_video
from tokenlearner.evaluation.tokens import tokens_of


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return save(image_model(), tmp_path_factory.mktemp("runs") / "model")


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Three videos of a second, a folder of three pictures, and one file that is no video."""
    folder = tmp_path_factory.mktemp("data") / "films"
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)) for i in range(10)]
    for name in ("a", "b", "c"):
        write_video(noise, folder / f"{name}.mp4", 10)
    (folder / "shots").mkdir()
    for i in range(3):
        noise[i].save(folder / "shots" / f"{i}.png")
    (folder / "none.mp4").write_text("no film")
    return folder


def test_a_folder_of_everything(run, model, films, tmp_path):
    code, out, err = run("tokens", model, films, tmp_path / "out")
    assert code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}.safetensors" for name in ("a", "b", "c", "shots")
    }
    assert "33 rows of 4 tokens of 32 numbers" in out
    assert "1 damaged file skipped:" in err
    assert "none.mp4: no video of a known format" in err
    with safetensors.safe_open(tmp_path / "out" / "shots.safetensors", "pt") as file:
        assert file.metadata()["model"] == str(model)
        found = file.get_tensor("tokens")
    loaded = load(model)
    prepare = loaded.preprocessing.transform()
    images = torch.stack([prepare(Image.open(films / "shots" / f"{i}.png")) for i in range(3)])
    with torch.no_grad():
        assert_close(found, tokens_of(loaded, images).half())


def test_options_reach_the_files(run, model, films, tmp_path):
    options = ("--layer", "learned", "--dtype", "float32", "--fps", 4, "--batch-size", 3, "--precision", "bf16")
    code, out, err = run("tokens", model, films / "a.mp4", tmp_path / "out", *options, "--device", "cpu", "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["files"] == [{"file": "a.safetensors", "source": str(films / "a.mp4"), "rows": 4}]
    assert (document["layer"], document["tokens"], document["dim"]) == ("learned", 4, 32)
    path = tmp_path / "out" / "a.safetensors"
    found = safetensors.torch.load_file(path)
    assert (found["tokens"].shape, found["tokens"].dtype) == ((4, 4, 32), torch.float32)
    assert found["times"].tolist() == [0, 0.25, 0.5, 0.75]
    with safetensors.safe_open(path, "pt") as file:
        assert {key: file.metadata()[key] for key in ("layer", "fps", "precision")} == {
            "layer": "learned",
            "fps": "4",
            "precision": "bf16",
        }


def test_shards_and_resume(run, model, films, tmp_path):
    out = tmp_path / "out"
    assert run("tokens", model, films, out, "--shard", "2/2")[0] == 0  # a, b, c, none, shots
    assert {path.stem for path in out.iterdir()} == {"b"}
    code, text, _ = run("tokens", model, films, tmp_path / "more", "--shard", "9/9")
    assert (code, text) == (0, "nothing to do in shard 9/9: 5 videos and folders of pictures are in others\n")
    code, _, err = run("tokens", model, films, out)
    assert (code, err.count("\n")) == (1, 1)
    assert "already has b.safetensors: go on there with --resume, or give a new folder" in err
    code, text, _ = run("tokens", model, films, out, "--resume")
    assert code == 0
    assert "23 rows of 4 tokens" in text
    assert "1 file was there" in text
    assert {path.stem for path in out.iterdir()} == {"a", "b", "c", "shots"}


def test_frames_of_a_video(run, model, films, tmp_path):
    code, _, _ = run("tokens", model, films / "shots", tmp_path, "--frame-fps", 2)
    assert code == 0
    found = safetensors.torch.load_file(tmp_path / "shots.safetensors")
    assert found["times"].tolist() == [0, 0.5, 1]


def test_a_model_of_clips(run, films, tmp_path):
    model = save(clip_model(), tmp_path / "model")
    code, out, _ = run("tokens", model, films / "a.mp4", tmp_path / "out", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 3)  # a window of six frames, in slices of two
    code, out, err = run("tokens", model, films / "shots", tmp_path / "other")
    assert (code, out) == (1, "")
    assert "holds pictures, and the model takes clips: say with --frame-fps" in err


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (("--shard", "0/2"), 1, "--shard is 0/2: give i/n with i from 1 to n, such as 1/4"),
        (("--shard", "half"), 1, "--shard is half"),
        (("--device", "cuda:99"), 1, "there is no device cuda:99"),
        (("--on-error", "raise"), 1, "none.mp4: no video of a known format"),
        (("--layer", "first"), 2, ""),
    ],
)
def test_bad_input_is_one_sentence(run, model, films, tmp_path, options, code, reason):
    found = run("tokens", model, films, tmp_path / "out", *options)
    assert found[0] == code
    if code == 1:
        assert found[1] == ""
        assert found[2].count("\n") == 1
        assert reason in found[2]


def test_a_model_without_tokens(run, films, tmp_path):
    from insertion.hosts import tiny

    model = save(tiny(), tmp_path / "plain")
    code, out, err = run("tokens", model, films, tmp_path / "out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "VisionTransformer has no TokenLearner" in err
    assert not (tmp_path / "out").exists()
