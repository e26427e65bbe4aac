"""Trained models by folder and by name; the weights that come with the package."""

import json
from pathlib import Path

import pytest
import safetensors
import timm
import torch

import tokenlearner
from tokenlearner.cli import main
from tokenlearner.data.annotations import read_clip_list
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.models import open_trained, presets

VIDEOS = Path(__file__).parents[3] / "shared/data/videos/ut_interaction"

NAMES = [key.split(".")[0] for key in presets.WEIGHTS if key.endswith(".cifar10")]
OF_CLIPS = [key for key in presets.WEIGHTS if key.endswith(".ut_interaction")]


@pytest.mark.parametrize("name", NAMES)
def test_our_weights_are_found_without_a_network_and_say_what_they_are(name, monkeypatch):
    monkeypatch.setattr("socket.socket", None)
    model = open_trained(name)
    assert model.label_names == presets.WEIGHTS[f"{name}.cifar10"]["label_names"]
    assert model.preprocessing.input_size == (3, 32, 32)
    assert (model.preprocessing.mean, model.preprocessing.crop_pct) == ((0.4914, 0.4822, 0.4465), 1.0)
    assert not model.training
    file = presets.__file__.replace("presets.py", f"weights/{name}.cifar10")
    with open(f"{file}.safetensors", "rb") as weights:  # noqa: PTH123
        assert len(weights.read()) < 13e6
    with open(f"{file}.md", encoding="utf-8") as card:  # noqa: PTH123
        assert name in card.read()


@pytest.mark.parametrize("key", OF_CLIPS)
def test_weights_of_clips_say_how_fast_a_clip_is_shown(key):
    model = open_trained(key)
    assert (model.label_names, model.preprocessing.model_input) == (presets.WEIGHTS[key]["label_names"], (3, 8, 64, 64))
    file = presets.__file__.replace("presets.py", f"weights/{key}.safetensors")
    with safetensors.safe_open(file, framework="pt") as weights:
        trained = Preprocessing.from_dict(json.loads(weights.metadata()["preprocessing"]))
    assert model.preprocessing == trained
    assert trained.fps == 2.5
    assert not model.training
    assert tokenlearner.learners(model).keys() == ({0, 1, 2} if "tokenlearner" in key else set())


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="the shared videos are not here")
@pytest.mark.parametrize(("key", "at_least"), [*zip(OF_CLIPS, (0.7, 0.6))])
def test_weights_of_clips_score_what_their_card_says(key, at_least):
    """On the set they were not trained on, by one view of a clip; the cards have it by six."""
    clips = read_clip_list(VIDEOS / "clips.csv", keep=lambda row: row["set"] == "2" and row["name"] != "other")
    model = open_trained(key)
    assert clips.classes == model.label_names
    assert evaluate(model, clips, views=(1, 1), workers=0).top1 >= at_least - 0.05


def test_a_name_with_its_tag_is_the_same_model():
    one, other = (open_trained(f"tokenlearner_micro4_32_plain{tag}") for tag in ("", ".cifar10"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(one(x), other(x))


def test_a_folder_is_opened_as_it_was_saved(tmp_path):
    saved = timm.create_model("test_vit", num_classes=2, img_size=32)
    model = open_trained(tokenlearner.save(saved, tmp_path, labels=("cat", "dog")))
    assert model.label_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["tokenlearner_micro4_32_8at2", "runs/gone"])
def test_what_is_neither_folder_nor_name_is_refused(name):
    with pytest.raises(InputError, match=rf"no folder {name}, and no model of that name.*; .* tokenlearner_micro4_32_"):
        open_trained(name)


def test_a_slip_in_a_folders_name_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="there is no folder runs/gone, and no model of that name; give"):
        open_trained("runs/gone")


def test_weights_nobody_has_are_refused():
    with pytest.raises(InputError, match="nobody has published weights for tokenlearner_s32_224_plain"):
        open_trained("tokenlearner_s32_224_plain")


def test_predict_and_maps_take_a_name(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (40, 30), (90, 140, 230)).save(tmp_path / "sky.png")
    main(["predict", "tokenlearner_micro4_32_8at2_mlp", str(tmp_path / "sky.png"), "--json"])
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    assert {entry["label"] for entry in row["predictions"]} < set(
        presets.WEIGHTS["tokenlearner_micro4_32_plain.cifar10"]["label_names"]
    )
    main(
        [
            "maps",
            "tokenlearner_micro4_32_8at3_mlp",
            str(tmp_path / "sky.png"),
            "--output",
            str(tmp_path / "maps"),
            "--json",
        ]
    )
    assert (tmp_path / "maps" / "maps.png").exists()


def test_folders_of_timm_are_opened_too(tmp_path):
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": ["blue", "red"]})
    for source in (tmp_path, f"local-dir:{tmp_path}"):
        found = open_trained(source)
        assert (found.label_names, found.preprocessing.input_size) == (("blue", "red"), (3, 32, 32))
        assert not found.training
        assert all(torch.equal(value, found.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_checkpoint_is_no_folder(tmp_path):
    torch.save({}, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt is a file: give the folder of .*tokenlearner compress"):
        open_trained(tmp_path / "last.pt")
