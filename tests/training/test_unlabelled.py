"""Backbones made cheaper with any folder of pictures: what is learned, what is left alone, and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from noisy_photos import draw_photos
from PIL import Image
from whole_runs import brief_timing, stopped_at_first_checkpoint

import tokenlearner
from tokenlearner.data.images import ImageFiles
from tokenlearner.errors import InputError
from tokenlearner.evaluation.features import features_of
from tokenlearner.models.opening import open_trained
from tokenlearner.models.vivit import ViViT
from tokenlearner.training import unlabelled
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.unlabelled import compress_unlabelled, feature_distance, fit_features, read_pictures

RECIPE = Recipe(
    tokens=2,
    epochs=2,
    batch_size=8,
    workers=0,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=0),
    augment=AugmentRecipe(auto_augment=None, color_jitter=0.0),
)


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch) -> None:
    brief_timing(monkeypatch)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """40 pictures of coarse noise in folders of folders, and a file that is none."""
    folder, numbers = tmp_path_factory.mktemp("data") / "pictures", np.random.default_rng(0)
    for i in range(40):
        place = folder / ("", "holidays", "holidays/lake")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(numbers.integers(0, 256, (4, 4, 3)).astype(np.uint8))
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(place / f"{i:02}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """In a folder a class."""
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 20)


def backbone(**options) -> torch.nn.Module:
    """Random weights, but a picture's features depend on what is in it."""
    torch.manual_seed(3)
    model = timm.create_model("test_vit", img_size=32, **{"num_classes": 0, **options})
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(20)
            block.mlp.fc2.weight.mul_(20)
    return model.eval()


def state_of(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def transform_of(model):
    return tokenlearner.Preprocessing.of(model).transform()


def sets(pictures: Path, model, label: int | tuple[int, ...] = 0):
    """Training and held-out set, every picture of the class (or classes) ``label``."""
    read, prepare = read_pictures(pictures, 0.25, 0), transform_of(model)
    parts = (read.material.data.train, read.material.data.val)
    return [
        ImageFiles(replace(part, labels=(label,) * len(part), classes=tuple("abcdefghij")), prepare) for part in parts
    ]


# ---- learning


def test_the_distance_by_hand():
    taught = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    seen = torch.tensor([[6.0, 8.0], [2.0, 0.0]])  # twice as long; at a right angle
    assert feature_distance(seen, taught) == pytest.approx(((0 + 25 / 25) + (1 + 8 / 4)) / 2)
    assert feature_distance(taught, taught) == pytest.approx(0.0, abs=1e-6)


def test_a_compressed_backbone_comes_nearer_to_its_host(pictures, tmp_path):
    """One that has been trained, on pictures of another kind; from 15 steps of batches of 10 on 30 pictures."""
    host, lines = open_trained("tokenlearner_micro4_32_plain", num_classes=0), []
    before = state_of(host)
    recipe = replace(RECIPE, epochs=5, batch_size=10, held_out=0.25, augment=replace(RECIPE.augment, scale=(0.7, 1.0)))
    summary = compress_unlabelled(host, pictures, tmp_path / "out", recipe, name="mine", log=lines.append)
    assert same(before, state_of(host))
    features = summary["features"]
    assert features["host"]["cosine"] == pytest.approx(1.0)
    assert features["host"]["neighbours"] == 1.0
    untrained, trained = features["untrained"], features["trained"]
    assert 1 - trained["cosine"] < 0.5 * (1 - untrained["cosine"]), (untrained, trained)
    assert trained["neighbours"] > untrained["neighbours"]
    assert (trained["knn_accuracy"], trained["class_agreement"]) == (None, None)
    assert (trained["pictures"], trained["references"], summary["held_out"]) == (10, 30, 10)
    student = tokenlearner.load(tmp_path / "out")
    assert tokenlearner.insertion_of(student).num_tokens == 2
    files = read_pictures(pictures, 0.25, 0).val.files
    x = torch.stack([host.preprocessing.transform()(Image.open(file)) for file in files])
    with torch.inference_mode():
        cosines = torch.cosine_similarity(student(x), host(x))
    assert trained["cosine"] == pytest.approx(float(cosines.mean()), abs=1e-5)
    history = [row["val_cosine"] for row in metrics(tmp_path / "out")]
    assert history[-1] == pytest.approx(trained["cosine"], abs=1e-5)
    assert lines[-1].startswith(f"trained: cosine {trained['cosine']:.4f} to the host")


def metrics(output: Path) -> list[dict[str, float]]:
    title, *rows = (output / "metrics.csv").read_text().splitlines()
    return [dict(zip(title.split(","), map(float, row.split(",")), strict=True)) for row in rows]


@pytest.mark.parametrize(("outputs", "width"), [(0, 64), (7, 7)], ids=["of the features", "behind CLIP's projection"])
def test_both_stand_side_by_side_and_the_host_is_kept(photos, tmp_path, outputs, width):
    host, texts = backbone(num_classes=outputs), torch.randn(5, width)
    summary = compress_unlabelled(host, photos, tmp_path / "out", RECIPE, class_embeddings=texts, log=str)
    assert summary == json.loads((tmp_path / "out/summary.json").read_text())
    before, after = summary["models"]
    assert (before["name"], after["name"], before["metric"]) == ("host", "tokenlearner", "cosine")
    assert after["accuracy"] == summary["features"]["trained"]["cosine"]
    assert after["macs"] < before["macs"]
    assert after["train_seconds"] > 0
    assert summary["features"]["host"]["class_agreement"] == 1.0
    both = [tokenlearner.load(tmp_path / name) for name in ("out", "out/host")]
    x = torch.stack([sample[0] for sample in ImageFiles(read_pictures(photos, 0.2, 0).val, transform_of(host))])
    with torch.inference_mode():
        picks = [torch.cosine_similarity(model(x)[:, None], texts, dim=-1).argmax(-1) for model in both]
    assert summary["features"]["trained"]["class_agreement"] == float((picks[0] == picks[1]).double().mean())
    assert summary["features"]["host"]["knn_accuracy"] == 1.0  # red and blue
    page = (tmp_path / "out/report.html").read_text()
    assert "towards the features of the model as it was, without labels" in page
    assert same(state_of(host), state_of(tokenlearner.load(tmp_path / "out/host")))
    recipe = json.loads((tmp_path / "out/recipe.json").read_text())
    assert recipe["init"] == str(tmp_path / "out/host")
    held_out = json.loads((tmp_path / "out/held_out.json").read_text())
    assert len(held_out["files"]) == summary["held_out"] == 8


@pytest.mark.parametrize("label", [9, (1, 4)], ids=["one class", "several classes"])
def test_labels_are_not_read(pictures, tmp_path, label):
    recipe = replace(RECIPE, augment=replace(RECIPE.augment, mixup=0.8, cutmix=1.0), batch_size=5)
    weights = []
    for name, each in (("none", 0), ("some", label)):
        student = tokenlearner.insert(backbone(), 2)
        fit_features(student, backbone(), *sets(pictures, student, each), recipe, tmp_path / name)
        weights.append(state_of(student))
    assert same(*weights)
    assert not same(weights[0], state_of(tokenlearner.insert(backbone(), 2)))


def test_a_head_stays_as_it_is(pictures, tmp_path):
    """A host with a classifier, or CLIP with its projection, is taught before that."""
    host = backbone(num_classes=3)
    student = tokenlearner.insert(backbone(num_classes=3), 2)
    student.head.bias.requires_grad_(False)
    recipe = replace(RECIPE, ema=0.5, optimizer=replace(RECIPE.optimizer, weight_decay=0.5))
    fitted = fit_features(student, host, *sets(pictures, student), recipe, tmp_path)
    assert torch.equal(student.head.weight, host.head.weight)
    assert not torch.equal(student.blocks[0].attn.qkv.weight, host.blocks[0].attn.qkv.weight)
    assert (student.head.weight.requires_grad, student.head.bias.requires_grad) == (True, False)
    assert (fitted.metric, fitted.accuracy) == ("cosine", fitted.history[-1]["val_cosine"])
    _, held_out = sets(pictures, student)
    x = torch.stack([held_out[i][0] for i in range(len(held_out))])
    with torch.inference_mode():
        seen, taught = features_of(student, x), features_of(host, x)
    assert fitted.accuracy == pytest.approx(float(torch.cosine_similarity(seen, taught).mean()), abs=1e-5)
    assert fitted.history[-1]["val_loss"] == pytest.approx(float(feature_distance(seen, taught)), rel=1e-4)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(pictures, tmp_path, monkeypatch):
    recipe = replace(RECIPE, ema=0.9, accumulate=2, augment=AugmentRecipe(mixup=0.8, cutmix=1.0))
    one = compress_unlabelled(backbone(), pictures, tmp_path / "one", recipe, log=str)
    with stopped_at_first_checkpoint(monkeypatch):
        compress_unlabelled(backbone(), pictures, tmp_path / "two", recipe, log=str)
    with pytest.raises(InputError, match="holds a run that has not ended"):
        compress_unlabelled(backbone(), pictures, tmp_path / "two", recipe, log=str)
    two = compress_unlabelled(backbone(), pictures, tmp_path / "two", recipe, resume=True, log=str)
    assert one["features"] == two["features"]
    assert same(*(state_of(tokenlearner.load(tmp_path / name)) for name in ("one", "two")))
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


def test_elastic_tokens_are_learned_like_this_too(pictures, tmp_path):
    recipe = replace(RECIPE, tokens=4, elastic=True, epochs=1)
    compress_unlabelled(backbone(), pictures, tmp_path / "out", recipe, log=str)
    model = tokenlearner.load(tmp_path / "out")
    spec = tokenlearner.insertion_of(model)
    assert (spec.elastic, spec.num_tokens, spec.used_tokens) == (True, 4, None)


def test_models_of_transformers_learn_from_theirs(pictures, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    host = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    with torch.no_grad():
        for layer in host.encoder.layer:
            layer.attention.o_proj.weight.mul_(40)
    student = tokenlearner.insert(copy.deepcopy(host), 2, at=1)
    before, (train_set, val_set) = state_of(host), sets(pictures, backbone())
    x = torch.stack([val_set[i][0] for i in range(len(val_set))])
    with torch.inference_mode():
        far = 1 - float(torch.cosine_similarity(features_of(student, x), features_of(host, x)).mean())
    recipe = replace(RECIPE, epochs=6, optimizer=replace(RECIPE.optimizer, lr=3e-3))
    fitted = fit_features(student, host, train_set, val_set, recipe, tmp_path)
    assert same(before, state_of(host))
    assert 1 - fitted.accuracy < 0.7 * far, (far, fitted.history)


@pytest.mark.slow
def test_compiled_it_learns_the_same(pictures, tmp_path, monkeypatch, without_shape_checks):
    """Without the compiler's last part, which writes and compiles C++ for a minute."""
    compiled, compiles = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *a, **k: compiled.append(a[0]) or compiles(*a, **{**k, "backend": "aot_eager"})
    )
    histories = []
    for compile_it in (False, True):
        student = tokenlearner.insert(backbone(), 2)
        recipe = replace(RECIPE, epochs=1, compile=compile_it)
        fitted = fit_features(student, backbone(), *sets(pictures, student), recipe, tmp_path / str(compile_it))
        histories.append(fitted.history[0])
    assert features_of in compiled
    assert histories[1] == pytest.approx(histories[0], rel=1e-3)


def test_damaged_pictures_are_named(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, file in enumerate(sorted(pictures.rglob("*.png"))):
        (folder / f"{i:02}.png").write_bytes(b"no picture" if i == 7 else file.read_bytes())
    summary = compress_unlabelled(backbone(), folder, tmp_path / "out", replace(RECIPE, epochs=1), log=str)
    assert [Path(entry["file"]).name for entry in summary["damaged"]["files"]] == ["07.png"]
    assert sum(summary["features"]["trained"][part] for part in ("pictures", "references")) == 39


# ---- the pictures


def test_any_folder_is_split_by_its_seed(pictures):
    read, again, other = (read_pictures(pictures, 0.2, seed) for seed in (0, 0, 1))
    assert (len(read.train), len(read.val)) == (32, 8)
    assert sorted([*read.train.files, *read.val.files]) == sorted(pictures.rglob("*.png"))
    assert read.val.files == again.val.files != other.val.files
    assert not read.in_classes  # some lie in no folder


def test_class_folders_are_for_the_score_alone(photos):
    read = read_pictures(photos, 0.2, 0)
    assert read.in_classes
    assert read.val.classes == ("blue", "red")
    for file, label in zip(read.val.files, read.val.labels, strict=True):
        assert read.val.classes[label] == file.parent.name
    assert [read.val.labels.count(i) for i in range(2)] == [4, 4]
    for part in (read.material.data.train, read.material.data.val):
        assert part.labels == (0,) * len(part)


def test_folders_of_one_picture_each_are_no_classes(tmp_path):
    draw_photos(tmp_path, 1, {str(i): (i, 0, 0) for i in range(10)})
    read = read_pictures(tmp_path, 0.2, 0)
    assert (len(read.train), len(read.val), read.in_classes) == (8, 2, False)


@pytest.mark.parametrize(
    ("in_val", "in_classes"), [(["red"], True), (["red", "green"], False)], ids=["known", "unknown"]
)
def test_a_folder_held_out_by_the_user(tmp_path, in_val, in_classes):
    draw_photos(tmp_path / "train", 4)
    draw_photos(tmp_path / "val", 2, dict.fromkeys(in_val, (9, 9, 9)))
    read = read_pictures(tmp_path, 0.2, 0)
    assert {file.parts[-3] for file in read.val.files} == {"val"}
    assert (len(read.train), len(read.val)) == (8, 2 * len(in_val))
    assert read.in_classes is in_classes
    assert set(read.val.labels) == ({1} if in_classes else {0})
    assert read.material.data.held_out_of is None


def test_neighbours_are_looked_for_among_so_many(pictures, monkeypatch):
    read = read_pictures(pictures, 0.2, 0)
    assert read.references(0).files == read.train.files
    monkeypatch.setattr(unlabelled, "REFERENCES", 10)
    few = read.references(0)
    assert len(few) == 10
    assert set(few.files) < set(read.train.files)
    assert few == read.references(0) != read.references(1)


# ---- what is refused


def test_folders_that_are_none_of_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "films").mkdir()
    (tmp_path / "films/a.mp4").write_bytes(b"")
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one/a.png")
    for name, reason in (
        ("gone", "is no folder: give a folder of pictures"),
        ("one/a.png", "is no folder: give a folder of pictures"),
        ("empty", "holds no image"),
        ("films", "holds videos, and features are learned from pictures only"),
        ("one", "holds a single picture"),
    ):
        with pytest.raises(InputError, match=reason):
            compress_unlabelled(backbone(), tmp_path / name, tmp_path / "out", RECIPE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tokenlearner.insert(backbone(), 2), "mine already has 2 tokens"),
        (lambda: backbone(global_pool=""), "gives no features, one vector a picture"),
        (lambda: torch.nn.Flatten(), "Flatten"),
        (
            lambda: ViViT(img_size=32, patch_size=16, num_frames=2, tubelet_size=2, embed_dim=8, depth=1, num_heads=1),
            "ViViT takes clips, and features are learned from pictures only",
        ),
    ],
    ids=["tokens", "unpooled", "no ViT", "clips"],
)
def test_models_that_have_no_features_to_learn(pictures, tmp_path, model, reason):
    with pytest.raises(InputError, match=reason):
        compress_unlabelled(model(), pictures, tmp_path / "out", RECIPE, name="mine")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"class_embeddings": torch.zeros(3, 5)}, "class_embeddings have 5 numbers a class"),
        ({"recipe": replace(RECIPE, tokens=0)}, "num_tokens"),
        ({"recipe": replace(RECIPE, at=99)}, "at=99"),
        ({"recipe": replace(RECIPE, kind="grid", elastic=True)}, "the tokens of kind 'grid' are cells"),
        ({"recipe": replace(RECIPE, held_out=1.5)}, "held_out is 1.5"),
        ({"recipe": replace(RECIPE, optimizer=OptimizerRecipe("nosuch"))}, "the recipe's optimizer does not fit"),
    ],
    ids=["embeddings", "tokens", "at", "elastic", "held_out", "optimizer"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(pictures, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason):
        compress_unlabelled(backbone(), pictures, tmp_path / "out", **{"recipe": RECIPE, **options})
    assert not (tmp_path / "out").exists()
