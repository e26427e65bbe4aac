"""Training on videos, from their files to a model that scores them: every model of clips, and what is refused."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from whole_runs import brief_timing, stopped_at_first_checkpoint

import tokenlearner
from tokenlearner.data.clip_sources import Listing
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation.protocols import score
from tokenlearner.training.build import build_model
from tokenlearner.training.compress import compress
from tokenlearner.training.recipe import AugmentRecipe, ClipRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.train import train

RECIPE = Recipe(
    model="vivit_micro_patch8x2_64",
    image_size=16,
    tokens=2,
    epochs=2,
    batch_size=4,
    workers=0,
    held_out=0.25,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=0),
    augment=AugmentRecipe(auto_augment=None, color_jitter=0.0, scale=(0.8, 1.0)),
    clip=ClipRecipe(frames=4, fps=10.0),
)


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch) -> None:
    brief_timing(monkeypatch)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Four films each that get brighter and that get darker, 0.8 s of 10 frames a second, and a broken one."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    for i in range(4):
        levels = [20 + 20 * t + 5 * i for t in range(8)]
        for name, order in (("brighter", levels), ("darker", levels[::-1])):
            frames = [Image.fromarray(np.full((16, 24, 3), level, np.uint8)) for level in order]
            write_video(frames, folder / name / f"{i}.mp4", fps=10)
    (folder / "darker" / "broken.mp4").write_bytes(b"no film")
    return folder


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "films"
    with pytest.MonkeyPatch.context() as patched:
        brief_timing(patched)
        train(videos, RECIPE, output)
    return output


def test_videos_become_a_model_that_scores_them(videos, trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["train_clips"], summary["held_out"], summary["classes"]) == (7, 2, 2)
    assert [Path(entry["file"]).name for entry in summary["damaged"]["files"]] == ["broken.mp4"]
    model = tokenlearner.load(trained)
    prepared = model.preprocessing
    assert (prepared.frames, prepared.fps, prepared.model_input) == (4, 10.0, (3, 4, 16, 16))
    assert (model.label_names, model.token_learner_insertion.num_tokens) == (("brighter", "darker"), 2)
    result = score(model, trained, videos, workers=0)
    assert "held out in training" in result["which"]
    assert (result["clips"], result["views"]) == (summary["held_out"] - len(result["damaged"]["files"]), [4, 3])


@pytest.mark.slow
def test_order_in_time_is_learned(videos, tmp_path):
    recipe = replace(RECIPE, epochs=25, batch_size=6, optimizer=OptimizerRecipe("muon", lr=5e-3, warmup_epochs=2))
    listed = tmp_path / "list.csv"
    with listed.open("w", newline="") as file:
        rows = [(path, path.parent.name) for path in sorted(videos.rglob("[0-9].mp4"))]
        csv.writer(file).writerows([("file", "label"), *rows])
    train(listed, recipe, tmp_path / "run", listing=Listing(val=listed))
    result = score(tokenlearner.load(tmp_path / "run"), tmp_path / "run", listed, views=(1, 1), workers=0)
    assert result["top1"] == 1.0


@pytest.mark.slow
def test_a_trained_model_is_made_cheaper(videos, tmp_path, monkeypatch):
    recipe = replace(
        RECIPE, tokens=0, epochs=25, batch_size=6, optimizer=OptimizerRecipe("muon", lr=5e-3, warmup_epochs=2)
    )
    listed = tmp_path / "list.csv"
    with listed.open("w", newline="") as file:
        rows = [(path, path.parent.name) for path in sorted(videos.rglob("[0-9].mp4"))]
        csv.writer(file).writerows([("file", "label"), *rows])
    listing = Listing(val=listed)
    train(listed, recipe, tmp_path / "host", listing=listing)
    short = replace(recipe, model=None, image_size=None, tokens=2, epochs=2, maps="clusters", clip=ClipRecipe())
    summary = compress(str(tmp_path / "host"), listed, tmp_path / "out", short, listing=listing, log=lambda line: None)
    before, after = summary["models"]
    assert (before["accuracy"], before["inputs"]) == (1.0, "clips")
    assert after["macs"] < before["macs"]
    model = tokenlearner.load(tmp_path / "out")
    assert (model.token_learner_insertion.num_tokens, model.preprocessing.frames) == (2, 4)
    assert model.preprocessing.fps == tokenlearner.load(tmp_path / "host").preprocessing.fps == 10.0  # the host's own
    assert list((tmp_path / "out/maps").glob("*.png"))


def test_the_same_run_with_workers_and_after_a_stop(videos, trained, tmp_path, monkeypatch):
    random = replace(
        RECIPE, augment=AugmentRecipe(erasing=0.5, mixup=0.5, cutmix=0.5), drop_path=0.1, checkpoint_steps=1
    )
    train(videos, random, tmp_path / "one")
    train(videos, replace(random, workers=2), tmp_path / "two")
    with stopped_at_first_checkpoint(monkeypatch):
        train(videos, random, tmp_path / "three")
    train(videos, random, tmp_path / "three", resume=True)
    weights = [tokenlearner.load(tmp_path / name).state_dict() for name in ("one", "two", "three")]
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())


@pytest.mark.parametrize("tokens", [0, 2])
def test_x2plus1d(videos, tmp_path, tokens):
    recipe = replace(RECIPE, model="x2plus1d_micro", image_size=32, tokens=tokens, kind="conv1", epochs=1)
    train(videos, recipe, tmp_path)
    model = tokenlearner.load(tmp_path)
    assert tokenlearner.learners(model).keys() == (set(range(3)) if tokens else set())
    assert score(model, tmp_path, videos, workers=0, views=(1, 1))["clips"] >= 1


@pytest.mark.parametrize(("module", "tokens"), [("Conv2D + TokenLearner", 3), ("Conv2D + MLPMixer", 0)])
def test_the_module_of_x2plus1d(module, tokens):
    recipe = replace(RECIPE, model="x2plus1d_micro", tokens=tokens, clip=ClipRecipe(module=module))
    model = build_model(recipe, 2, on="meta")
    assert model.arguments["module"] == module
    assert {learner.num_tokens for learner in tokenlearner.learners(model).values()} == ({3} if tokens else set())


def test_what_x2plus1d_does_not_take(videos, tmp_path):
    recipe = replace(RECIPE, model="x2plus1d_micro", clip=ClipRecipe())
    for change, reason in (
        ({"at": 1, "fuser": "fuser"}, "tokens and kind can be chosen, at, fuser can't"),
        ({"tokens": 0, "clip": ClipRecipe(module="TokenLearner")}, "'TokenLearner' learns tokens: tokens can't be 0"),
        ({"clip": ClipRecipe(module="Conv2D + MLPMixer")}, "learns no tokens: tokens has to be 0"),
        ({"clip": ClipRecipe(module="Conv4D")}, "no module 'Conv4D'"),
        ({"model": "vivit_micro_patch8x2_64", "clip": ClipRecipe(module="TokenLearner")}, "clip.module is about"),
    ):
        with pytest.raises(InputError, match=reason):
            train(videos, replace(recipe, **change), tmp_path / "run")


def test_an_image_models_weights_are_inflated(videos, tmp_path):
    recipe = replace(RECIPE, init="tokenlearner_micro4_32_plain.cifar10", image_size=64, epochs=1)
    summary = train(videos, recipe, tmp_path)
    assert summary["init"]["unused"] == ["head.weight", "head.bias"]
    learner = [name for name in summary["init"]["new"] if "token_learner" in name]
    assert sorted([*learner, "head.weight", "head.bias"]) == sorted(summary["init"]["new"])


def test_a_model_of_clips_goes_on_from_a_saved_one(videos, trained, tmp_path):
    recipe = replace(RECIPE, model=None, init=str(trained), tokens=8, image_size=32, epochs=1, clip=ClipRecipe(6, 10.0))
    summary = train(videos, recipe, tmp_path / "vivit")
    assert summary["init"]["new"] == summary["init"]["unused"] == []
    model = tokenlearner.load(tmp_path / "vivit")
    assert (model.preprocessing.model_input, model.token_learner_insertion.num_tokens) == ((3, 6, 32, 32), 2)


def test_x2plus1d_goes_on_from_a_saved_one_with_other_classes(videos, tmp_path):
    recipe = replace(RECIPE, model="x2plus1d_micro", tokens=0, image_size=32, epochs=1)
    train(videos, recipe, tmp_path / "first")
    other = tmp_path / "other"
    for name, new in (("brighter", "up"), ("darker", "down")):
        shutil.copytree(videos / name, other / new)
    summary = train(other, replace(recipe, model=None, init=str(tmp_path / "first")), tmp_path / "second")
    assert summary["init"]["new"] == summary["init"]["unused"] == ["head.weight", "head.bias"]
    with pytest.raises(InputError, match="the weights don't fit the X2Plus1D"):
        train(videos, replace(recipe, tokens=2, init=str(tmp_path / "first")), tmp_path / "third")


def test_several_labels_by_window(videos, tmp_path):
    """Charades' layout: an action seen in the first half of every film, another in the second."""
    names = [f"{i}" for i in range(4)]
    (tmp_path / "classes.txt").write_text("c000 Dark\nc001 Bright\n")
    lines = [f"{name},c000 0.0 0.4;c001 0.4 9.0" for name in names] + ["gone,c000 0 1"]
    (tmp_path / "train.csv").write_text("\n".join(["id,actions", *lines]) + "\n")
    listing = Listing(videos / "brighter", tmp_path / "classes.txt", val=tmp_path / "train.csv")
    recipe = replace(RECIPE, loss="sigmoid", clip=ClipRecipe(2, 10.0, label_by="window"))
    summary = train(tmp_path / "train.csv", recipe, tmp_path / "run", listing=listing)
    assert summary["models"][0]["metric"] == "mean average precision"
    assert summary["models"][0]["accuracy"] == 1.0  # every film has both
    assert [Path(file).name for file in summary["missing"]["files"]] == ["gone.mp4"] * 2
    with pytest.raises(InputError, match="label_by is 'window', which takes multi-label clips with events"):
        train(videos, recipe, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "test_vit"}, "test_vit takes images, and clip.frames and clip.tubelet are about a model of clips"),
        ({"model": "test_vit", "clip": ClipRecipe()}, "the model takes images: give a model of clips, such as"),
        ({"clip": ClipRecipe(frames=5)}, r"clips of 5×16×16 .* don't divide into tubelets"),
        ({"clip": ClipRecipe(frames=0)}, "clip.frames must be at least 1, not 0"),
        ({"clip": ClipRecipe(fps=0.0)}, "clip.fps must be above 0, not 0.0"),
        ({"clip": ClipRecipe(views=(0, 1))}, "clip.views must be at least one window and one crop"),
        ({"clip": ClipRecipe(short_side=-1)}, "clip.short_side must be at least 1"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_written(videos, tmp_path, change, reason):
    with pytest.raises(InputError, match=reason):
        train(videos, replace(RECIPE, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_clips_takes_no_pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / f"{i}.png")
    with pytest.raises(InputError, match="the model takes clips, and DATA holds pictures"):
        train(tmp_path / "data", replace(RECIPE, clip=ClipRecipe()), tmp_path / "run")
    with pytest.raises(InputError, match="--videos, --classes, --val and --hierarchy are about videos"):
        train(tmp_path / "data", replace(RECIPE, model="test_vit"), tmp_path / "run", listing=Listing(videos=tmp_path))
