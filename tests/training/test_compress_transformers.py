"""A classifier of transformers made cheaper, from the folder save_pretrained wrote or a name of the hub."""

from dataclasses import replace

import pytest
import torch
from noisy_photos import draw_photos
from whole_runs import brief_timing

import tokenlearner
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.insertion.huggingface_folder import TransformersModel
from tokenlearner.models import open_trained
from tokenlearner.training.compress import compress
from tokenlearner.training.fit import fit
from tokenlearner.training.material import read_material
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

RECIPE = Recipe(
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
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 30)


@pytest.fixture(scope="module")
def host(photos, tmp_path_factory):
    """A tiny ViT of transformers that tells the photos apart, with its processor."""
    folder = tmp_path_factory.mktemp("runs")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label={0: "Blue", 1: "Red"},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(folder / "new")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "new")
    opened = tokenlearner.load(folder / "new")
    material = read_material(photos, RECIPE)
    sets = material.datasets(RECIPE, opened.preprocessing, "raise")
    fit(opened, *sets, replace(RECIPE, epochs=6), folder / "fit", num_classes=2)
    return tokenlearner.save(opened, folder / "trained")


def test_it_is_a_model_like_any_other(host, photos):
    model = open_trained(host)
    assert isinstance(model, TransformersModel)
    assert (model.num_classes, model.label_names) == (2, ("Blue", "Red"))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(images), model.model(images).logits)
    assert evaluate(model, read_material(photos, RECIPE).data.val, views=(1, 1)).top1 == 1.0
    assert tokenlearner.insertion_of(model) is None
    tokenlearner.insert(model, 2, 0.5)
    assert tokenlearner.insertion_of(model) is tokenlearner.insertion_of(model.model)
    maps = tokenlearner.attention_maps(model, images)
    assert {index: tuple(A.shape) for index, A in maps.items()} == {2: (3, 2, 4, 4)}
    assert tokenlearner.cost(model, (3, 32, 32)).tokens == (17, 17, 3, 3)
    tokenlearner.remove(model)
    assert tokenlearner.insertion_of(model) is None


@pytest.mark.parametrize("by_name", [False, True])
def test_it_is_made_cheaper_and_saved_as_transformers_do(host, photos, tmp_path, monkeypatch, by_name):
    source = str(host)
    if by_name:
        fetched = []
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download", lambda name, **options: fetched.append(name) or str(host)
        )
        source = "somebody/vit"
    output = tmp_path / "out"
    summary = compress(source, photos, output, RECIPE, macs=0.8, log=lambda line: None)
    before, after = summary["models"]
    assert before["accuracy"] == 1.0
    assert after["accuracy"] >= 0.5
    assert after["macs"] <= 0.8 * before["macs"]
    again = transformers.AutoModelForImageClassification.from_pretrained(output).eval()
    ours = tokenlearner.load(output)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images).logits, ours(images))
    assert (ours.label_names, ours.preprocessing) == (("Blue", "Red"), tokenlearner.load(host).preprocessing)
    assert "What each token looks at" in (output / "report.html").read_text()
    if by_name:
        assert fetched == ["somebody/vit"]


def test_features_of_one_without_a_head(host, photos, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "host")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "host")
    summary = compress(str(tmp_path / "host"), photos, tmp_path / "out", RECIPE, log=lambda line: None)
    assert summary["models"][1]["metric"] == "cosine"
    assert tokenlearner.insertion_of(tokenlearner.load(tmp_path / "out")).num_tokens == 2
