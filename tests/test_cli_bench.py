"""``tokenlearner bench``: what it prints, writes and refuses. tests/inspection/test_bench.py has the measuring."""

import json
import re
import sys

import pytest
import timm
import torch

import tokenlearner
from tokenlearner.inspection import speed
from tokenlearner.inspection.bench import BenchRow, bench

QUICK = ("--rounds", "2", "--seconds", "0.001", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_matmul(monkeypatch):
    monkeypatch.setitem(sys.modules[bench.__module__].MATMUL_SIDE, "cpu", 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain model, the same with 2 tokens, and one of larger images."""
    folder = tmp_path_factory.mktemp("models")
    for name, side, tokens in (("plain", 32, 0), ("few", 32, 2), ("large", 48, 0)):
        model = timm.create_model("test_vit", num_classes=2, img_size=side)
        tokenlearner.save(tokenlearner.insert(model, tokens) if tokens else model, folder / name)
    return folder


def test_saved_models_side_by_side(folders, run, tmp_path):
    names = [str(folders / "plain"), str(folders / "few")]
    output = tmp_path / "new" / "bench"
    code, out, err = run("bench", *names, "--batch-sizes", 1, 3, *QUICK, "--output", output, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    rows = [BenchRow.from_dict(row) for row in document.pop("models")]
    assert [(row.name, row.batch_size) for row in rows] == [(name, size) for size in (1, 3) for name in names]
    for row, name in zip(rows, names * 2):
        counted = tokenlearner.cost(tokenlearner.load(name), (3, 32, 32))
        assert (row.macs, row.parameters) == (counted.macs, counted.parameters)
        assert row.realised == row.speedup / row.mac_ratio
        assert row.latency > 0
        assert row.peak_memory > 4 * row.batch_size * 3 * 16 * 16  # more than what enters the first layer
    assert document == {
        "input_size": [3, 32, 32],
        "device": "cpu",
        "precision": "float32",
        "compiled": False,
        "cuda_graphs": False,
        "mode": "forward",
        "rounds": 2,
        "hardware": document["hardware"],
        "torch": torch.__version__,
    }
    assert json.loads((output / "bench.json").read_text()) == json.loads(out)
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_timm_name_with_tokens_is_timed_bare_and_with_them(run):
    options = ("--tokens", 4, "--at", 1, "--input-size", 3, 32, 32, "--batch-sizes", 2, "--mode", "train", *QUICK)
    code, out, err = run("bench", "test_vit", *options)
    assert (code, err) == (0, "")
    assert re.search(r"test_vit +│ 2 +│", out)
    assert re.search(r"│ test_vit, 4 tokens .*│ 2 +│", out)
    macs = tokenlearner.cost(timm.create_model("test_vit"), (3, 32, 32)).macs
    fewer = tokenlearner.cost(tokenlearner.insert(timm.create_model("test_vit"), 4, 1), (3, 32, 32)).macs
    assert f"{macs / fewer:.2f}×" in out
    assert "train, float32, eager, cpu, median of 2 alternated rounds" in out


def test_a_folder_stays_as_it_is_beside_names_with_tokens(folders, run):
    options = ("--tokens", 4, "--input-size", "3,32,32", "--batch-sizes", 2, *QUICK, "--json")
    code, out, _ = run("bench", folders / "few", "test_vit", *options)
    assert code == 0
    names = [str(folders / "few"), "test_vit", "test_vit, 4 tokens at 0.5"]
    assert [row["name"] for row in json.loads(out)["models"]] == names


def test_inputs_of_different_sizes_are_listed(folders, run):
    code, _, err = run("bench", folders / "large", "test_vit", *QUICK)
    sizes = f"{folders / 'large'} 3×48×48, test_vit 3×160×160"
    told = f"tokenlearner: the models take inputs of different sizes ({sizes}): give one with --input-size\n"
    assert (code, err) == (1, told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plain", "large"), "the models take inputs of different sizes"),
        (("plain", "plain"), "plain is given twice"),
        (("plain", "--tokens", "4"), "--tokens goes with timm names; what a saved model learns is already decided"),
        (("test_vit", "--fuser", "fuser"), "go with --tokens"),
        (("none",), "there is no folder .*none; give a saved model's folder or a name of timm's"),
        (("vit_bsae_patch16_224",), "timm has no model 'vit_bsae_patch16_224'; did you mean vit_base_patch16_224"),
        (("plain", "--device", "gpu"), "'gpu' is not the name of a device"),
        (("plain", "--device", "cuda:9"), "there is no device cuda:9 here"),
        (("plain", "--input-size", "3", "33", "32"), "plain: VisionTransformer can't take an input of \\(3, 33, 32\\)"),
        (("plain", "--cuda-graphs"), "CUDA graphs go with a compiled model on a GPU"),
        (("plain", "--batch-sizes", "4", "4"), "batch sizes are different numbers"),
        (("plain", "--seconds", "nan"), "at least one round of more than 0 seconds is needed, not \\d+ of nan"),
        (("plain", "--batch-sizes", "100000000000"), "there is no room for inputs of 100000000000×3×32×32 on cpu"),
        (("plain", "--output", "plain/config.json"), "is a file: give a folder for bench.json and bench.png"),
        (("plain", "plain/../plain"), "is given twice"),
    ],
)
def test_refusals_are_one_sentence(folders, run, arguments, message):
    first, *rest = arguments
    named = [str(folders / word) if word.startswith(("plain", "large", "none")) else word for word in rest]
    name = first if "vit" in first else folders / first
    code, out, err = run("bench", name, *named)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.match(f"tokenlearner: .*{message}", err)


def test_bf16_is_refused_where_a_gpu_has_none(folders, run, monkeypatch):
    for module in (speed, sys.modules[bench.__module__]):
        monkeypatch.setattr(module, "usable_device", torch.device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    code, out, err = run("bench", folders / "plain", "--device", "cuda", "--precision", "bf16")
    assert (code, out, err) == (1, "", "tokenlearner: Old GPU has no bfloat16: use float32\n")


def test_help_shows_an_example(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    assert "Example: tokenlearner bench vit_base_patch16_224 --tokens 8 --at 0.5" in " ".join(out.split())
