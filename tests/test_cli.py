"""The command line, in this process: exit codes, what goes to stdout and stderr, and the numbers in the files.

Codes: 0; 1 and one sentence on stderr for bad input; 2 for bad usage.
"""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import tokenlearner
from command_line import Ran, exit_code
from tokenlearner.inspection.summary import ModelResult, write_summary
from tokenlearner.training.recipe import CompressOptimizer, CompressRecipe, Recipe

RUNNING = ("demo", "train", "compress", "evaluate", "predict", "maps", "tokens", "export", "study")
COMMANDS = (*RUNNING, "shards", "cost", "bench", "paper", "data")
COLOURS = {"red": (210, 40, 40), "blue": (40, 60, 210)}
TINY = ("--model", "test_vit", "--image-size", "32", "--tokens", "2", "--batch-size", "8", "--workers", "0")


class Run(NamedTuple):
    photos: Path
    model: Path
    damaged: dict[str, str]
    code: int


def draw(path: Path, colour: tuple[int, int, int]) -> None:
    """20×20 pixels of nearly one colour; the noise depends on the name, so that no two files are alike."""
    noise = np.random.default_rng(list(path.name.encode())).integers(-25, 26, (20, 20, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of twelve pictures, and in each of them one file that is none."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for name, colour in COLOURS.items():
        for i in range(12):
            draw(folder / name / f"{i:02}.png", colour)
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(jpeg, "JPEG")
    (folder / "red" / "cut.jpg").write_bytes(jpeg.getvalue()[:400])
    (folder / "blue" / "text.png").write_text("not a picture")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Run:
    output = tmp_path_factory.mktemp("runs") / "photos"
    options = "--model vit_tiny_patch16_224 --image-size 48 --tokens 4 --at 0.5 --epochs 2 --batch-size 8 --workers 0"
    code = exit_code("train", photos, *options.split(), "--output", output)
    damaged = {str(photos / "red" / "cut.jpg"): "Truncated", str(photos / "blue" / "text.png"): "not an image"}
    return Run(photos, output, damaged, code)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory) -> Path:
    model = timm.create_model("test_vit", num_classes=2, img_size=32)
    return tokenlearner.save(model, tmp_path_factory.mktemp("runs") / "plain", labels=("blue", "red"))


def names_all(entries: list[dict], key: str, damaged: dict[str, str]) -> bool:
    reasons = {entry[key]: entry["reason"] for entry in entries}
    return len(entries) == len(damaged) and all(word in reasons[path] for path, word in damaged.items())


# ---- train


def test_train_writes_what_it_measured(trained):
    summary = json.loads((trained.model / "summary.json").read_text())
    (model,) = summary["models"]
    loaded = tokenlearner.load(trained.model)
    counted = tokenlearner.cost(loaded, (3, 48, 48))
    assert trained.code == 0
    assert (model["name"], model["accuracy"]) == ("tokenlearner", 1.0)  # red and blue are easily told apart
    assert model["tokens_per_layer"] == [10] * 6 + [5] * 6  # 9 patches or 4 tokens, and the class token
    assert (model["parameters"], model["macs"]) == (counted.parameters, counted.macs)
    assert model["images_per_second"] > 0
    assert summary["seconds"] > model["train_seconds"] > 0
    assert (summary["classes"], summary["train_images"] + summary["held_out"]) == (2, 26)
    assert summary["damaged"]["count"] == 2
    assert names_all(summary["damaged"]["files"], "file", trained.damaged)
    assert loaded.label_names == ("blue", "red")
    assert loaded.preprocessing.input_size == (3, 48, 48)


def test_train_leaves_metrics_and_which_files_were_held_out(trained):
    rows = (trained.model / "metrics.csv").read_text().splitlines()
    summary = json.loads((trained.model / "summary.json").read_text())
    held_out = json.loads((trained.model / "held_out.json").read_text())
    assert set(rows[0].split(",")) == {"epoch", "step", "train_loss", "val_loss", "val_accuracy", "lr"}
    assert {row.split(",")[0] for row in rows[1:]} == {"0", "1"}
    assert held_out["folder"] == "photos"
    assert all((trained.photos / name).is_file() for name in held_out["files"])
    # A fifth of the 13 files of either class, rounded.
    assert [sum(name.startswith(c) for name in held_out["files"]) for c in COLOURS] == [3, 3]
    assert summary["held_out"] == 6


def test_the_report_needs_nothing_but_itself(trained):
    page = (trained.model / "report.html").read_text()
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)  # a namespace is a name and is not fetched
    assert not re.search(r"https?:|//\w+\.|<script|<link|@import|url\((?!#)", outside)
    assert '<meta name="viewport" content="width=device-width' in page
    assert "color-scheme: light dark" in page
    accuracy = json.loads((trained.model / "summary.json").read_text())["models"][0]["accuracy"]
    assert re.search(f"<td[^>]*>{accuracy:.2%}</td>", page)
    assert "vit_tiny_patch16_224 on photos" in page
    assert page.count("<svg") == 2
    looks = page.count('<div class="look">')  # six were held out, of which some may be damaged
    assert 4 <= looks <= 6
    assert page.count("data:image/png;base64,") == looks * 5  # the picture and a map of each of the four tokens


def losses(folder: Path) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["train_loss"] for row in csv.DictReader(file)]


def test_a_seed_fixes_the_run_and_options_win_over_the_recipe_file(photos, tmp_path, run):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: test_vit\nimage_size: 32\ntokens: 2\nbatch_size: 8\nworkers: 0\n"
        "epochs: 9\nseed: 3\noptimizer: {lr: 1e-3}\n"
    )
    once, again, other = (tmp_path / name for name in ("once", "again", "other"))
    first = run("train", photos, *TINY, "--epochs", 1, "--seed", 7, "--optimizer.lr", 0.001, "--output", once, "--json")
    second = run("train", photos, "--recipe", recipe, "--epochs", 1, "--seed=7", "--output", again, "--json")
    assert (first.code, second.code) == (0, 0)
    assert json.loads((again / "recipe.json").read_text()) == json.loads((once / "recipe.json").read_text())
    assert losses(once) == losses(again)
    weights = [tokenlearner.load(folder).state_dict() for folder in (once, again)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert first.json == json.loads((once / "summary.json").read_text())
    assert run("train", photos, f"--recipe={recipe}", "--epochs", 1, "--output", other, "--json").code == 0
    assert json.loads((other / "recipe.json").read_text())["seed"] == 3
    assert losses(once) != losses(other)


@pytest.mark.parametrize(("command", "maps"), [("train", "clusters"), ("compress", "random")])
def test_a_field_in_a_file_may_be_called_as_a_command_is(photos, tmp_path, run, monkeypatch, command, maps):
    given = []

    def stop(*arguments, **options):
        given.extend(argument for argument in arguments if isinstance(argument, Recipe))
        raise tokenlearner.InputError("far enough")

    monkeypatch.setattr(f"tokenlearner.training.{command}.{command}", stop)
    (tmp_path / "recipe.yaml").write_text(f"tokens: 3\nmaps: {maps}\n")
    before = ("train",) if command == "train" else ("compress", "host")
    result = run(*before, photos, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert result.err == "tokenlearner: far enough\n"
    assert {"tokens", "maps"} == set(COMMANDS) & set(asdict(given[0]))
    assert (given[0].tokens, given[0].maps) == (3, maps)


# ---- evaluate


def test_evaluate_scores_what_training_held_out(trained, run):
    held_out = json.loads((trained.model / "held_out.json").read_text())["files"]
    decodable = [name for name in held_out if str(trained.photos / name) not in trained.damaged]
    result = run("evaluate", trained.model, trained.photos, "--workers", 0, "--json")
    assert result.code == 0
    assert (result.json["images"], result.json["top1"]) == (len(decodable), 1.0)
    assert result.json["which"] == "the 6 images held out in training (of 26)"
    assert result.json["damaged"]["count"] == len(held_out) - len(decodable)


def test_evaluate_all(trained, run):
    result = run("evaluate", trained.model, trained.photos, "--images", "all", "--workers", 0, "--json")
    assert (result.json["images"], result.json["which"], result.json["top5"]) == (24, "all images", None)
    assert result.json["per_class"] == {"blue": 1.0, "red": 1.0}
    assert names_all(result.json["damaged"]["files"], "file", trained.damaged)
    table = run("evaluate", trained.model, trained.photos, "--images", "all", "--workers", 0)
    assert table.code == 0
    assert re.search(r"top-1 +│ 100\.00%", table.out)
    assert table.err.startswith("2 damaged files skipped:\n")
    assert all(path in table.err for path in trained.damaged)


def test_evaluate_by_few_shots(trained, run):
    result = run(
        "evaluate", trained.model, trained.photos, "--protocol", "fewshot", "--shots", 3, "--workers", 0, "--json"
    )
    document = result.json
    assert (result.code, document["protocol"], document["shots"]) == (0, "fewshot", 3)
    assert document["top1"] == pytest.approx(sum(document["top1_of_draws"]) / 3)
    assert document["images"] + document["damaged"]["count"] >= 12  # half of 24 pictures and two damaged files
    assert document["top1"] > 0.9  # red and blue squares


def test_few_shots_stop_at_a_damaged_file_if_told_to(trained, run):
    options = ("--protocol", "fewshot", "--workers", 0, "--on-error", "raise")
    result = run("evaluate", trained.model, trained.photos, *options)
    assert result.code == 1
    assert any(path in result.err for path in trained.damaged)


def test_evaluate_by_real_labels(trained, tmp_path, run):
    labels = tmp_path / "real.json"
    labels.write_text("[[0, 1], []]")
    for i in (1, 2):
        shutil.copy(trained.photos / "red" / "00.png", tmp_path / f"ILSVRC2012_val_{i:08}.png")
    result = run("evaluate", trained.model, tmp_path, "--protocol", "real", "--real-labels", labels, "--json")
    assert (result.code, result.json["top1"], result.json["images"], result.json["unlabelled"]) == (0, 1.0, 1, 1)
    without = run("evaluate", trained.model, tmp_path, "--protocol", "real")
    assert without.code == 1
    assert "--real-labels" in without.err


def test_evaluate_by_mean_average_precision(trained, tmp_path, run):
    files = [(file, name) for name in COLOURS for file in sorted((trained.photos / name).iterdir())]
    (tmp_path / "list.csv").write_text("file,label\n" + "".join(f"{file},{name};\n" for file, name in files))
    arguments = ("evaluate", trained.model, tmp_path / "list.csv", "--workers", 0, "--device", "cpu")
    result = run(*arguments, "--protocol", "map", "--json")
    assert (result.code, result.json["protocol"], result.json["images"]) == (0, "map", 24)
    assert result.json["average_precision"] == {"blue": 1.0, "red": 1.0}  # easily told apart
    assert names_all(result.json["damaged"]["files"], "file", trained.damaged)
    assert re.search(r"mean average precision +│ 100\.00%", run(*arguments, "--protocol", "map").out)
    assert "score with --protocol map" in run(*arguments).sentence


def test_evaluate_takes_the_val_folder(trained, tmp_path, run):
    """Its red pictures lie in blue's folder, so that the score tells which files were read."""
    for part, (red, blue) in {"train": ("red", "blue"), "val": ("blue", "red")}.items():
        for source, target in ((red, "red"), (blue, "blue")):
            (tmp_path / part / target).mkdir(parents=True)
            for i in range(2 if target == "red" else 3):
                shutil.copy(trained.photos / source / f"{i:02}.png", tmp_path / part / target)
    result = run("evaluate", trained.model, tmp_path, "--workers", 0, "--json")
    assert (result.json["top1"], result.json["images"], result.json["which"]) == (0.0, 5, "the images in val/")
    assert run("evaluate", trained.model, tmp_path / "train", "--workers", 0, "--json").json["top1"] == 1.0


# ---- predict


def test_predict_labels_files_in_order(trained, run):
    photos, cut = trained.photos, trained.photos / "red" / "cut.jpg"
    files = [photos / "red" / "00.png", cut, photos / "blue" / "03.png", photos / "red" / "05.png"]
    result = run("predict", trained.model, *files, "--json")
    rows = result.json["predictions"]
    assert (result.code, result.json["damaged"]["count"]) == (0, 1)
    assert names_all(result.json["damaged"]["files"], "file", {str(cut): "Truncated"})
    assert [row["file"] for row in rows] == [str(file) for file in files if file != cut]
    assert [row["predictions"][0]["label"] for row in rows] == ["red", "blue", "red"]
    for row in rows:
        likely, unlikely = (entry["probability"] for entry in row["predictions"])
        assert likely > unlikely
        assert likely + unlikely == pytest.approx(1, abs=1e-6)
    best = run("predict", trained.model, *files, "--top", 1, "--json").json["predictions"]
    assert [len(row["predictions"]) for row in best] == [1, 1, 1]
    assert best[2]["predictions"] == rows[2]["predictions"][:1]


def test_predict_counts_the_damaged_of_a_folder(trained, run):
    result = run("predict", trained.model, trained.photos)
    assert result.code == 0
    assert len(re.findall(r"│ \S+png +│ (red|blue) [\d.]+%  (red|blue) [\d.]+% +│", result.out)) == 24
    assert result.err.startswith("2 damaged files skipped:\n")


def test_a_file_name_is_shown_as_it_is(trained, tmp_path, run):
    """Rich would take [red] for a colour and :star: for a picture, and cut what is longer than the table."""
    path = tmp_path / "[red]" / f":star:{'x' * 200}.png"
    path.parent.mkdir()
    shutil.copy(trained.photos / "red" / "00.png", path)
    shown = run("predict", trained.model, path).out
    assert str(path) in "".join(re.findall(r"^│ (.*?) +│", shown, re.MULTILINE))


def test_nothing_but_damaged_files_is_bad_input(trained, run):
    result = run("predict", trained.model, *trained.damaged, "--json")
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith("tokenlearner: none of the 2 files could be read\n")
    assert all(path in result.err for path in trained.damaged)


# ---- cost


def test_cost_of_a_saved_model(trained, run):
    counted = tokenlearner.cost(tokenlearner.load(trained.model), (3, 48, 48))
    assert run("cost", trained.model, "--json").json == counted.to_dict()
    assert run("cost", trained.model).out.splitlines()[-1] == str(counted)


def test_cost_of_a_timm_name(run):
    host = timm.create_model("test_vit")
    assert run("cost", "test_vit", "--json").json == tokenlearner.cost(host, (3, 160, 160)).to_dict()
    tokenlearner.insert(host, 4, 2, "conv", "fuser", 1)
    options = "--tokens 4 --at 2 --kind conv --fuser fuser --extra-layers 1 --json"
    assert run("cost", "test_vit", *options.split()).json == tokenlearner.cost(host, (3, 160, 160)).to_dict()


@pytest.mark.parametrize(("at", "tokens"), [("1", [101] + [5] * 5), ("1.0", [101] * 6), ("0.5", [101] * 3 + [5] * 3)])
def test_cost_tells_a_layer_from_a_share(run, at, tokens):
    assert run("cost", "test_vit", "--tokens", 4, "--at", at, "--json").json["tokens"] == tokens


def test_cost_at_another_input_size(run):
    options = ("--input-size", 3, 224, 224, "--json")
    assert run("cost", "resnet18", *options).json["macs"] == 1_814_073_344  # 1.8 GMACs, as published
    refused = run("cost", "test_vit", "--input-size", 3, 100, 100).sentence
    assert "can't take an input of (3, 100, 100)" in refused


# ---- maps


def test_maps_draws_a_row_for_each_token(trained, tmp_path, run):
    files = [trained.photos / "red" / "00.png", trained.photos / "blue" / "00.png", *trained.damaged]
    result = run("maps", trained.model, *files, "--output", tmp_path / "sheets", "--json")
    (sheet,) = result.json["sheets"]
    assert result.code == 0
    assert sheet == {"path": str(tmp_path / "sheets" / "maps.png"), "files": [str(file) for file in files[:2]]}
    assert names_all(result.json["damaged"]["files"], "file", trained.damaged)
    pixels = np.asarray(Image.open(sheet["path"]).convert("RGB")).astype(int)
    for row, half in ((0, slice(None, pixels.shape[1] // 2)), (2, slice(pixels.shape[1] // 2, None))):
        others = [channel for channel in (0, 1, 2) if channel != row]
        shown = (pixels[..., row] - pixels[..., others].max(-1) > 80) & (pixels[..., row] > 150)
        assert shown[: pixels.shape[0] // 5, half].sum() > 3000  # red on the left, blue on the right
    # Under either picture, down the middle of its column: four maps with white between them.
    for x in (pixels.shape[1] * 3 // 10, pixels.shape[1] * 8 // 10):
        ink = (pixels[:, x] < 250).any(-1)
        tall = [len(band) for band in "".join("x" if dark else " " for dark in ink).split() if len(band) > 40]
        assert len(tall) == 1 + 4


def test_maps_spreads_pictures_over_sheets(trained, tmp_path, run):
    files = [trained.photos / "blue" / f"{i:02}.png" for i in range(5)]
    result = run("maps", trained.model, *files, "--columns", 2, "--output", tmp_path)
    assert result.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps-1.png", "maps-2.png", "maps-3.png"]
    assert re.search(r"maps-2\.png +│ 02\.png, 03\.png", result.out)
    assert re.search(r"maps-3\.png +│ 04\.png +│", result.out)


def test_maps_of_one_layer(trained, tmp_path, run):
    picture = trained.photos / "red" / "00.png"
    assert run("maps", trained.model, picture, "--layer", 6, "--output", tmp_path).code == 0
    assert "no TokenLearner at layer 5; there is one at 6" in run("maps", trained.model, picture, "--layer", 5).sentence


# ---- what is wrong is said, with the right exit code


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "maps"])
def test_on_error_raise_stops_and_names_the_file(trained, tmp_path, run, command):
    arguments = {
        "train": ("train", trained.photos, *TINY, "--epochs", 1, "--output", tmp_path / "new"),
        "evaluate": ("evaluate", trained.model, trained.photos, "--images", "all", "--workers", 0),
        "predict": ("predict", trained.model, trained.photos),
        "maps": ("maps", trained.model, trained.photos, "--output", tmp_path),
    }[command]
    sentence = run(*arguments, "--on-error", "raise").sentence
    assert any(f"{path}: " in sentence for path in trained.damaged)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("trian photos --output o", 'Did you mean "train"?'),
        ("train photos --outpt o", "Did you mean --output"),
        ("train photos", "--output requires an argument"),
        ("train photos --output o --optimizer.lrr 1", "Did you mean --optimizer.lr?"),
        ("train photos --output o --kind mpl", 'Choose from: "conv", "mlp"'),
        ("train photos --output o --fuser fusr", 'Did you mean "fuser"?'),
        ("train photos --output o --epochs many", '"many"'),
        ("train photos --output o --at half", "at is a layer, such as 6, or a share of the depth, such as 0.5"),
        ("train photos --output o --recipe", "--recipe requires an argument"),
        ("evaluate model photos --images held", 'Choose from: "auto", "all", "held-out"'),
        ("evaluate model", "--data requires an argument"),
        ("predict", "MODEL"),
        ("cost vit_tiny_patch16_224 --input-size 224 224", "requires 3"),
        ("maps model photo.jpg --colums 3", "Did you mean --columns?"),
    ],
)
def test_bad_usage(run, line, wanted):
    result = run(*line.split())
    assert (result.code, result.out) == (2, "")
    assert wanted in " ".join(re.sub("[╭╮╰╯─│]", " ", result.err).split())


def test_bad_recipe_files(photos, tmp_path, run):
    path = tmp_path / "recipe.yaml"
    arguments = ("train", photos, "--output", tmp_path / "new", "--recipe", path)
    assert f"there is no recipe file {path}" in run(*arguments).sentence
    path.write_text("tokens: [")
    assert f"{path} is not readable" in run(*arguments).sentence
    path.write_text("token: 4")
    assert run(*arguments).code == 2
    path.write_text("tokens: 0\nepochs: 0")
    assert "epochs must be at least 1" in run(*arguments).sentence
    assert not (tmp_path / "new").exists()


def bad_inputs() -> list:
    gone, new = "{tmp}/gone", "--output {tmp}/new"
    tiny = " ".join(TINY)
    return [
        (f"train {gone} {new}", "{tmp}/gone can't be listed"),
        (f"train {{tmp}}/empty {new}", "{tmp}/empty holds no class folder"),
        (f"train {{tmp}}/hollow {new}", "{tmp}/hollow/a holds no image"),
        (f"train {{tmp}}/lost {new} {tiny}", "none of the training images could be decoded"),
        (f"train {{photos}} {new} --model vit_tinyy_patch16_224", "did you mean vit_tiny_patch16_224"),
        (f"train {{photos}} {new} --model resnet18", "ResNet is none"),
        (f"train {{photos}} {new} {tiny} --at 99", "at=99"),
        (f"train {{photos}} {new} {tiny} --at 2.0", "at=2.0"),
        (f"train {{photos}} {new} {tiny} --held-out 2", "held_out is 2.0"),
        (f"train {{photos}} {new} {tiny} --epochs 0", "epochs must be at least 1, not 0"),
        (f"train {{photos}} {new} --batch-size 0", "batch_size must be at least 1, not 0"),
        (f"train {{photos}} {new} --workers -1", "workers must be at least 0, not -1"),
        (f"train {{photos}} {new} {tiny} --seed -1", "seed must be at least 0, not -1"),
        (f"train {{photos}} {new} {tiny} --ema 1.5", "ema must be at least 0 and below 1, not 1.5"),
        (f"train {{photos}} {new} {tiny} --optimizer.name adm", "optimizer does not fit: Optimizer adm not found"),
        (f"train {{photos}} {new} {tiny} --optimizer.betas 2 3", "optimizer does not fit"),
        (f"train {{photos}} {new} {tiny} --augment.auto-augment x", "augment does not fit: Unknown AA policy x"),
        (f"evaluate {gone} {{photos}}", "there is no folder {tmp}/gone, and no model of that name"),
        ("evaluate {tmp}/empty {photos}", "{tmp}/empty is not a saved model: it has no config.json"),
        ("evaluate {model} {tmp}/gone", "{tmp}/gone can't be listed"),
        ("evaluate {model} {tmp}/green", "{tmp}/green/green is not one of the 2 known classes: blue, red"),
        ("evaluate {model} {tmp}/lost", "is not one of the 2 known classes"),
        ("evaluate {model} {tmp}/lost/a --images held-out", "holds no class folder"),
        (
            "evaluate {plain} {photos} --images held-out",
            "names no file of {photos}; score everything with --images all",
        ),
        ("evaluate {model} {photos} --batch-size 0", "batch_size must be at least 1"),
        ("evaluate {model} {photos} --protocol map", "exactly one class here: score with --protocol top1"),
        ("evaluate {model} {photos} --device cuda:99", "there is no device cuda:99 here"),
        ("evaluate {model} {photos} --device gpu", "'gpu' is not the name of a device: give auto, cpu, cuda"),
        ("predict {tmp}/empty {photos}", "it has no config.json"),
        ("predict {model} {tmp}/gone", "{tmp}/gone does not exist"),
        ("predict {model} {tmp}/empty", "{tmp}/empty holds no image"),
        ("predict {model} {photos}/red/00.png --top 0", "top must be at least 1, not 0"),
        ("cost vit_tinyy_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("cost {model} --tokens 8", "{model} is a saved model, so --tokens and what goes with it"),
        ("cost test_vit --tokens -8", "num_tokens must be a positive whole number"),
        ("cost {tmp}/empty", "it has no config.json"),
        ("maps {plain} {photos}/red/00.png", "no TokenLearner"),
        ("maps {model} {tmp}/lost", "none of the 12 files could be read; the first: {tmp}/lost/a/0.png"),
        ("maps {model} {photos}/red/00.png --columns 0", "columns must be at least 1"),
    ]


@pytest.mark.parametrize(("line", "wanted"), bad_inputs(), ids=[line for line, _ in bad_inputs()])
def test_bad_input(trained, plain_model, tmp_path, run, line, wanted):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    (tmp_path / "hollow" / "b").mkdir()
    draw(tmp_path / "green" / "green" / "1.png", (0, 200, 0))
    for i in range(12):
        (tmp_path / "lost" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "lost" / "ab"[i % 2] / f"{i}.png").write_text("lost")
    places = {"tmp": tmp_path, "photos": trained.photos, "model": trained.model, "plain": plain_model}
    sentence = run(*(word.format(**places) for word in line.split())).sentence
    assert wanted.format(**places) in sentence
    if "could be decoded" not in wanted:  # all else is found out before anything is written
        assert not (tmp_path / "new").exists()


def test_ctrl_c_says_so(photos, tmp_path, run, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenlearner.training.train.train", interrupted)
    assert run("train", photos, "--output", tmp_path) == Ran(130, "", "tokenlearner: stopped\n")


# ---- the rest


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(run, command):
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"Example: tokenlearner {command}" in " ".join(result.out.split())


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.code == 0
    assert re.findall(r"^│ (\w+) ", result.out, re.MULTILINE) == sorted(COMMANDS)


def test_version(run):
    assert run("--version").out.strip() == tokenlearner.__version__


def test_compress_is_called_as_told_with_defaults_of_its_own(tmp_path, run, monkeypatch):
    """tests/training/test_compress.py runs it."""
    asked = []

    def compress(model, data, output, recipe, *, log, **options):
        log("halfway")
        asked.append((model, data, output, recipe, options))
        return {"models": [], "seconds": 1.0}

    monkeypatch.setattr("tokenlearner.training.compress.compress", compress)
    monkeypatch.setattr("tokenlearner.cli.training.print_models", lambda summary, last: print(last))
    result = run(
        "compress", "a.pt", "photos", "--output", tmp_path, "--host", "test_vit", "--macs", "0.4", "--tokens", "4",
        "--optimizer.weight-decay", "0.1",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == ["halfway", f"model and report: {tmp_path}"]
    ((model, data, output, recipe, options),) = asked
    assert (model, data, output) == ("a.pt", Path("photos"), tmp_path)
    assert (options["host"], options["macs"], options["latency"], options["resume"]) == ("test_vit", 0.4, None, False)
    given = CompressRecipe(tokens=4, optimizer=CompressOptimizer(weight_decay=0.1))
    assert type(recipe) is Recipe
    assert asdict(recipe) == asdict(given)
    assert run("compress", "a", "b", "--output", tmp_path, "--json").json == {"models": [], "seconds": 1.0}


@pytest.mark.parametrize("option", ["--image-size", "--init", "--distill.teacher"])
def test_compress_sets_the_model_itself(option, run, tmp_path):
    result = run("compress", "a", "b", option, "x", "--output", tmp_path)
    assert result.code == 2
    assert "Unknown option" in result.err


def test_demo_is_called_as_told_and_keeps_its_log_out_of_the_json(tmp_path, run, monkeypatch):
    """tests/training/test_demo.py runs it."""
    asked = []

    def demo(output: Path, *, epochs: int | None, seed: int, log: Callable[[str], object]) -> dict:
        asked.append((output, epochs, seed))
        log("a line of its log")
        results = [
            ModelResult("plain", 0.5, 10, 4000, 100.0, (36, 36)),
            ModelResult("few", 0.75, 12, 1000, 300.0, (36, 8), 0.0, 3.0),
        ]
        return write_summary(output / "summary.json", 12.3, results)

    monkeypatch.setattr("tokenlearner.training.demo.demo", demo)
    result = run("demo", "--output", tmp_path, "--epochs", 3, "--seed", 4, "--json")
    assert (result.code, result.err) == (0, "a line of its log\n")
    assert result.json == json.loads((tmp_path / "summary.json").read_text())
    table = run("demo", "--output", tmp_path)
    assert asked == [(tmp_path, 3, 4), (tmp_path, None, 0)]
    assert re.search(r"few +│ 75\.00% +│ 12 +│ 1 k \(0\.25×\) +│ 300 \(3\.00×\) +│ 36×1 \+ 8×1 +│", table.out)
    assert table.out.splitlines()[-1] == f"12 s in all; report: {tmp_path / 'report.html'}"


def test_as_a_module_in_a_process_of_its_own(tmp_path):
    """Warnings and logs of the libraries go to stderr, if anywhere: stdout is the JSON document."""

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tokenlearner", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    counted = python("cost", "test_vit", "--tokens", "4", "--json")
    assert counted.returncode == 0, counted.stderr
    assert json.loads(counted.stdout)["tokens"] == [101] * 3 + [5] * 3
    refused = python("costs", "test_vit")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert 'Did you mean "cost"?' in refused.stderr
