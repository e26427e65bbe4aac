"""A trained model made cheaper: from every way to give one, by a budget, and what is refused."""

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from noisy_photos import draw_photos
from PIL import Image
from scipy.stats import binom
from whole_runs import brief_timing

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.training import compress as compressing
from tokenlearner.training import side_by_side
from tokenlearner.training.class_names import published_labels, read_as, renamed
from tokenlearner.training.compress import at_least, compress, stand_alone, within_budget
from tokenlearner.training.foreign import model_of_checkpoint, read_checkpoint
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
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
    folder = stand_alone(str(path), tmp_path / "host", "test_vit")
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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}, "optimizer": {}},
        lambda state: {
            "state_dict": {key: torch.zeros_like(value) for key, value in state.items()},
            "state_dict_ema": {f"module.{key}": value for key, value in state.items()},
        },
    ],
    ids=["bare", "lightning", "compiled and wrapped", "averaged"],
)
def test_wrappers_are_taken_off(wrap, tmp_path):
    state = timm.create_model("test_vit", num_classes=2).state_dict()
    torch.save(wrap(state), tmp_path / "a.pt")
    read = read_checkpoint(tmp_path / "a.pt")
    assert read.keys() == state.keys()
    assert all(torch.equal(value, read[key]) for key, value in state.items())


def test_safetensors_are_read_too(tmp_path):
    model = timm.create_model("test_vit", num_classes=7)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    found = model_of_checkpoint(tmp_path / "a.safetensors", "test_vit")
    assert torch.equal(found.head.weight, model.head.weight)
    assert not found.training


def test_checkpoints_that_are_none(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    torch.save({"head.weight": torch.zeros(2, 64)}, tmp_path / "other.pt")
    for name, reason in (
        ("gone.pt", "there is no checkpoint"),
        ("text.pt", "can't be read as weights"),
        ("empty.pt", "holds no weights: expected a state dict"),
    ):
        with pytest.raises(InputError, match=reason):
            read_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match=r"other\.pt is not of test_vit: it lacks blocks"):
        model_of_checkpoint(tmp_path / "other.pt", "test_vit")
    with pytest.raises(InputError, match="timm has no model 'test_vti'"):
        model_of_checkpoint(tmp_path / "other.pt", "test_vti")


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


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["a", "b"], ["b"], ["a", "b"]),
        (["Golden Retriever", "cat"], ["golden_retriever"], ["golden_retriever", "cat"]),
        (["tench, Tinca tinca", "cat"], ["CAT", "tinca-tinca"], ["tinca-tinca", "CAT"]),
    ],
)
def test_names_that_mean_a_label(labels, names, expected):
    assert renamed(labels, names) == expected


def test_names_of_imagenets_classes():
    labels = published_labels(1000)
    classes = renamed(labels, ["tench", "daisy"])
    assert classes[0] == "tench"
    assert classes[985] == "daisy"
    assert classes[1:985] == labels[1:985]
    with pytest.raises(InputError, match="the class crane could be n02012849 or n03126707: name it as one"):
        renamed(labels, ["crane"])


def test_names_that_mean_no_label_or_the_same():
    with pytest.raises(InputError, match="the class dog is not one of the 2 known classes: cat, cow"):
        renamed(["cat", "cow"], ["dog"])
    with pytest.raises(InputError, match="the classes Cat and CAT both mean cat: put them into one"):
        renamed(["cat", "cow"], ["Cat", "CAT"])


def test_an_error_that_is_not_about_classes_is_passed_on():
    def read(classes):
        raise InputError("no such folder")

    with pytest.raises(InputError, match="no such folder"):
        read_as(["a"], read, lambda it: it)


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
    (tmp_path / "green").mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "green/a.png")
    (tmp_path / "red").symlink_to(photos / "red")
    with pytest.raises(InputError, match="is not one of the 2 known classes: blue, red"):
        compress(str(host), tmp_path, tmp_path / "out", RECIPE)


# ---- budgets


def of_36_patches():
    return timm.create_model("test_vit", img_size=96)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 0.9])
def test_a_budget_of_macs_takes_the_last_layer_and_then_the_most_tokens(budget):
    model = of_36_patches()
    whole = tokenlearner.cost(model, (3, 96, 96)).macs
    recipe = within_budget(model, RECIPE, (3, 96, 96), macs=budget)

    def share(at: int, tokens: int) -> float:
        return tokenlearner.cost(tokenlearner.insert(of_36_patches(), tokens, at), (3, 96, 96)).macs / whole

    fits = [at for at in range(len(model.blocks) + 1) if share(at, 2) <= budget]
    assert recipe.at == max(fits)
    assert recipe.tokens == max(tokens for tokens in (2, 4, 8, 16, 32) if share(recipe.at, tokens) <= budget)
    assert tokenlearner.insertion_of(model) is None


def test_a_budget_of_time_is_measured(monkeypatch):
    """By a clock that says each layer takes as long as any other, and each token a hundredth of a layer."""
    model, asked = of_36_patches(), []

    def timed(models, inputs, **options):
        spec = models["it"].token_learner_insertion
        asked.append(spec)
        share = 0.1 + 0.9 * (spec.at + 0.01 * spec.num_tokens) / len(models["it"].blocks)
        return [None, type("Speed", (), {"ratio": 1 / share})]

    monkeypatch.setattr(compressing, "measure_speed", timed)
    recipe = within_budget(model, RECIPE, (3, 96, 96), latency=0.57)
    assert recipe.at == int((0.57 - 0.1) / 0.9 * len(model.blocks))
    assert recipe.tokens == 8
    assert len(asked) <= 9


def test_budgets_that_make_no_sense(photos, host, tmp_path):
    model = of_36_patches()
    with pytest.raises(InputError, match="a budget is a share of the model's own cost"):
        within_budget(model, RECIPE, (3, 96, 96), macs=1.5)
    with pytest.raises(InputError, match="2 tokens from the first layer on still take 0"):
        within_budget(model, RECIPE, (3, 96, 96), macs=0.01)
    with pytest.raises(InputError, match="--macs and --latency both choose the layer"):
        compress(str(host), photos, tmp_path / "out", RECIPE, macs=0.5, latency=0.5)


def test_imagenets_labels_are_known_by_their_number():
    labels = published_labels(1000)
    assert (len(labels), labels[0]) == (1000, "n01440764")
    assert published_labels(10) is None
