"""A trained model made cheaper: from every way to give one, by a budget, and what is refused."""

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from noisy_photos import draw_photos
from PIL import Image
from scipy.stats import binom
from whole_runs import brief_timing

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.training import side_by_side
from tokenlearner.training.budget import within_budget
from tokenlearner.training.compress import at_least, compress, refuse_chance, stand_alone
from tokenlearner.training.material import read_material
from tokenlearner.training.recipe import AugmentRecipe, ClipRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.train import train

RECIPE = Recipe(
    image_size=32,
    tokens=2,
    epochs=1,
    batch_size=8,
    workers=0,
    held_out=0.5,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=0),
    augment=AugmentRecipe(auto_augment=None, color_jitter=0.0),
)


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch) -> None:
    brief_timing(monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 30)


@pytest.fixture(scope="module")
def host(photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "host"
    with pytest.MonkeyPatch.context() as patched:
        brief_timing(patched)
        train(photos, replace(RECIPE, model="test_vit", tokens=0, epochs=3), output)
    return output


def test_both_models_stand_side_by_side(photos, host, tmp_path):
    lines = []
    summary = compress(str(host), photos, tmp_path / "out", RECIPE, log=lines.append)
    before, after = summary["models"]
    assert (before["name"], after["name"]) == ("host", "tokenlearner")
    assert before["accuracy"] == 1.0
    assert after["macs"] < before["macs"] == tokenlearner.cost(tokenlearner.load(host), (3, 32, 32)).macs
    assert after["accuracy"] >= 0.5
    assert summary["insertion"]["num_tokens"] == 2
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    page = (tmp_path / "out/report.html").read_text()
    assert "host" in page
    assert "trained for 1 epochs towards the model as it was" in page
    assert lines[0] == f"{host}: 100.00% on 30 held-out images"
    model = tokenlearner.load(tmp_path / "out")
    assert (model.label_names, model.token_learner_insertion.at) == (("blue", "red"), 3)


def test_a_checkpoint_becomes_a_folder_first(photos, host, tmp_path):
    model = timm.create_model("test_vit", num_classes=2)
    path = tmp_path / "last.pth.tar"
    wrapped = OrderedDict((f"module.{key}", value) for key, value in model.state_dict().items())
    torch.save({"state_dict": wrapped, "epoch": 3}, path)
    found, folder = stand_alone(str(path), tmp_path / "host", "test_vit")
    assert (folder, found.label_names) == (tmp_path / "host", None)
    saved = tokenlearner.load(folder)
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(InputError, match="is a checkpoint: say whose with --host"):
        stand_alone(str(path), tmp_path / "host", None)


def test_a_checkpoint_has_the_classes_of_the_folders_in_their_order(photos, host, tmp_path):
    path = tmp_path / "last.pt"
    torch.save(tokenlearner.load(host).state_dict(), path)
    summary = compress(str(path), photos, tmp_path / "out", RECIPE, host="test_vit", log=lambda line: None)
    assert summary["models"][0]["accuracy"] == 1.0
    assert tokenlearner.load(tmp_path / "out").label_names == ("blue", "red")
    other = timm.create_model("test_vit", num_classes=3)
    torch.save(other.state_dict(), path)
    with pytest.raises(InputError, match="its 3 outputs can't be the 2 classes of DATA"):
        compress(str(path), photos, tmp_path / "other", RECIPE, host="test_vit")


@pytest.mark.parametrize("headless", [True, False])
def test_without_labels_or_head_it_learns_features(photos, host, tmp_path, headless):
    model = tokenlearner.load(host)
    if headless:
        model.reset_classifier(0)
        tokenlearner.save(model, tmp_path / "host", labels=[])
    source = str(tmp_path / "host") if headless else str(host)
    lines = []
    summary = compress(source, photos, tmp_path / "out", RECIPE, unlabelled=not headless, macs=0.8, log=lines.append)
    assert [row["metric"] for row in summary["models"]] == ["cosine", "cosine"]
    assert summary["models"][0]["accuracy"] == pytest.approx(1.0, abs=1e-5)
    assert set(summary["features"]) == {"host", "untrained", "trained"}
    chosen = within_budget(model, RECIPE, (3, 32, 32), macs=0.8)
    assert summary["insertion"]["at"] == chosen.at
    assert "towards the features of" in lines[0]


def test_a_model_that_guesses_is_refused_before_it_is_trained(photos, tmp_path):
    guessing = timm.create_model("test_vit", num_classes=2, img_size=32)
    tokenlearner.save(guessing, tmp_path / "host", labels=("blue", "red"))
    with torch.no_grad():
        guessing.head.weight.zero_()
        guessing.head.bias.copy_(torch.tensor([1.0, 0.0]))
    tokenlearner.save(guessing, tmp_path / "host", labels=("blue", "red"))
    with pytest.raises(InputError, match=r"scores 50\.00% on 30 held-out images, where guessing gives 50\.00%"):
        compress(str(tmp_path / "host"), photos, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_a_model_that_always_says_the_most_frequent_class_is_refused(photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/red").symlink_to(photos / "red")
    (tmp_path / "photos/blue").mkdir()
    for name in sorted((photos / "blue").iterdir())[:4]:
        (tmp_path / "photos/blue" / name.name).symlink_to(name)
    constant = timm.create_model("test_vit", num_classes=3, img_size=32)
    with torch.no_grad():
        constant.head.weight.zero_()
        constant.head.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    tokenlearner.save(constant, tmp_path / "host", labels=("blue", "green", "red"))
    with pytest.raises(InputError, match=r"scores (8\d\.\d\d)% on \d+ held-out images, where guessing gives \1%"):
        compress(str(tmp_path / "host"), tmp_path / "photos", tmp_path / "out", RECIPE)


def test_scores_of_several_labels_are_held_against_shuffled_ones(photos):
    def refused(scored: float) -> bool:
        try:
            refuse_chance(scored, 0.31, material, "it")
        except InputError:
            return True
        return False

    material = read_material(photos, RECIPE)
    labels = tuple((label,) for label in material.data.train.labels)
    data = replace(material.data, train=replace(material.data.train, labels=labels))
    material = replace(material, data=data)
    assert material.multilabel
    assert [refused(scored) for scored in (0.2, 0.31, 0.32, 1.0)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("{host}", "is MODEL itself, which would be lost"),
        ("{photos}", "is in DATA, where the next run would read it"),
        ("{photos}/out", "is in DATA"),
        ("{here}/file", "can't be a folder, since .*/file is a file"),
        ("{here}/file/out", "can't be a folder, since .*/file is a file"),
        ("{here}/other", "has a config.json that no training wrote"),
    ],
)
def test_nothing_that_is_there_is_written_over(output, reason, photos, host, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    before = {path: path.read_bytes() for path in host.rglob("*") if path.is_file()}
    place = output.format(host=host, photos=photos, here=tmp_path)
    with pytest.raises(InputError, match=reason):
        compress(str(host), photos, place, RECIPE)
    assert {path: path.read_bytes() for path in host.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"model": "test_vit"}, "the model is MODEL, as it is: leave model out of the recipe"),
        ({"clip": ClipRecipe(frames=4, module="TokenLearner")}, r"leave clip\.frames, clip\.module out of the recipe"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 4}, r"take 1\.[0-9]+ times the multiply-adds of the model, whose layers see 5 tokens: give fewer"),
    ],
)
def test_recipes_that_are_not_for_it(changed, reason, photos, host, tmp_path):
    for unlabelled in (False, True):
        with pytest.raises(InputError, match=reason):
            compress(str(host), photos, tmp_path / "out", replace(RECIPE, **changed), unlabelled=unlabelled)
    assert not (tmp_path / "out").exists()


def test_host_is_about_a_file(photos, host, tmp_path):
    with pytest.raises(InputError, match=r"--host says whose weights a checkpoint file holds, and .* is no file"):
        compress(str(host), photos, tmp_path / "out", RECIPE, host="test_vit")


def test_there_is_no_run_to_resume(photos, host, tmp_path):
    with pytest.raises(InputError, match="there is no run to resume"):
        compress(str(host), photos, tmp_path / "out", RECIPE, resume=True)


def test_a_folder_of_timm_is_saved_as_ours_first(host, tmp_path):
    model = tokenlearner.load(host)
    timm.models.save_for_hf(model, tmp_path / "theirs", model_config={"label_names": ["blue", "red"]})
    found, folder = stand_alone(str(tmp_path / "theirs"), tmp_path / "host", None)
    assert (folder, found.label_names) == (tmp_path / "host", ("blue", "red"))
    saved = tokenlearner.load(folder)
    assert saved.label_names == ("blue", "red")
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_is_in_the_folder_already_is_not_opened_twice(host, tmp_path):
    """A run that goes on needs no hub."""
    tokenlearner.save(tokenlearner.load(host), tmp_path / "host")
    found, folder = stand_alone("no/such-model", tmp_path / "host", None, resume=True)
    assert (folder, found.label_names) == (tmp_path / "host", ("blue", "red"))


@pytest.mark.parametrize(("hits", "count", "chance"), [(0, 5, 0.5), (5, 5, 0.5), (60, 100, 0.5), (13, 10_000, 0.001)])
def test_the_tail_of_the_binomial_distribution(hits, count, chance):
    assert at_least(hits, count, chance) == pytest.approx(binom.sf(hits - 1, count, chance), rel=1e-6)


def test_a_model_with_tokens_is_refused(photos, host, tmp_path):
    model = tokenlearner.insert(tokenlearner.load(host), 2)
    tokenlearner.save(model, tmp_path / "host")
    with pytest.raises(InputError, match="already has 2 tokens"):
        compress(str(tmp_path / "host"), photos, tmp_path / "out", RECIPE)


def test_some_of_the_classes_by_other_names_will_do(photos, tmp_path):
    """A model of three, data of two of them; what is saved keeps the model's names."""
    host = timm.create_model("test_vit", num_classes=3, img_size=32)
    tokenlearner.save(host, tmp_path / "host", labels=("Red!", "green", "blue, navy"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/red").symlink_to(photos / "red")
    (tmp_path / "photos/navy").symlink_to(photos / "blue")
    train(photos, replace(RECIPE, init=str(tmp_path / "host"), tokens=0, epochs=3), tmp_path / "two")
    model = tokenlearner.load(tmp_path / "two")
    with torch.no_grad():  # blue and red, of which the three-class model then knows as much
        host.load_state_dict({**model.state_dict(), "head.weight": host.head.weight, "head.bias": host.head.bias})
        host.head.weight[:] = torch.stack([model.head.weight[1], -model.head.weight.sum(0), model.head.weight[0]])
        host.head.bias[:] = torch.tensor([float(model.head.bias[1]), -9.0, float(model.head.bias[0])])
    tokenlearner.save(host, tmp_path / "host", labels=("Red!", "green", "blue, navy"))
    summary = compress(str(tmp_path / "host"), tmp_path / "photos", tmp_path / "out", RECIPE, log=lambda line: None)
    assert summary["models"][0]["accuracy"] > 0.9
    assert tokenlearner.load(tmp_path / "out").label_names == ("Red!", "green", "blue, navy")


def test_a_stopped_run_goes_on_with_the_budget_it_had(photos, host, tmp_path, monkeypatch):
    """The layer was chosen by a clock, which may say something else the second time."""
    output = tmp_path / "out"
    recipe = replace(RECIPE, epochs=2)

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(side_by_side, "measure_speed", stopped)  # after its training
        with pytest.raises(KeyboardInterrupt):
            compress(str(host), photos, output, recipe, macs=0.8, log=lambda line: None)
    with pytest.raises(InputError, match="holds a run that has not ended"):
        compress(str(host), photos, output, recipe, log=lambda line: None)
    summary = compress(str(host), photos, output, recipe, macs=0.9, resume=True, log=lambda line: None)
    size = (3, 32, 32)
    chosen = within_budget(tokenlearner.load(host), recipe, size, macs=0.8)
    assert (summary["insertion"]["at"], summary["insertion"]["num_tokens"]) == (chosen.at, chosen.tokens)


def test_classes_the_model_does_not_know_are_refused(photos, host, tmp_path):
    (tmp_path / "data/green").mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "data/green/a.png")
    (tmp_path / "data/red").symlink_to(photos / "red")
    with pytest.raises(InputError, match="is not one of the 2 known classes: blue, red"):
        compress(str(host), tmp_path / "data", tmp_path / "out", RECIPE)
