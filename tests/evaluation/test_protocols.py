"""Protocols by name: what each refuses, which images it takes, and the device all of them compute on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from by_colour import PREPROCESSING, SIDE, by_colour, draw
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner.data.images import scan_class_folders
from tokenlearner.errors import InputError
from tokenlearner.evaluation.fewshot import few_shot
from tokenlearner.evaluation.protocols import score
from tokenlearner.inspection.speed import usable_device

NAMES = ("walrus", "ant", "zebra")
PROTOCOLS = ("top1", "map", "real", "fewshot")


@pytest.fixture
def data(tmp_path) -> Path:
    """Three right pictures of every class, and a note that the first of each was held out."""
    for position, name in enumerate(NAMES):
        for i in range(3):
            draw(tmp_path / "data" / name / f"{i}.png", position)
    (tmp_path / "model").mkdir()
    held_out = {"folder": "data", "files": [f"{name}/0.png" for name in NAMES]}
    (tmp_path / "model" / "held_out.json").write_text(json.dumps(held_out))
    return tmp_path / "data"


@pytest.fixture
def list_of_several(data) -> Path:
    """A CSV of the same pictures, where every zebra is an ant too."""
    labels = {"walrus": "walrus", "ant": "ant", "zebra": "ant;zebra"}
    lines = [f"{name}/{i}.png,{labels[name]}" for name in NAMES for i in range(3)]
    (data / "list.csv").write_text("\n".join(["file,label", *lines]))
    return data / "list.csv"


@pytest.mark.parametrize(("images", "count"), [("auto", 3), ("held-out", 3), ("all", 9)])
def test_map_takes_the_images_that_top1_takes(list_of_several, tmp_path, images, count):
    """Brighter pictures score higher for zebra and for ant; for walrus, whose own brightness is 0, all tie."""
    result = score(by_colour(NAMES), tmp_path / "model", list_of_several, protocol="map", images=images, workers=0)
    assert result == {
        "protocol": "map",
        "mean_average_precision": pytest.approx((1 / 3 + 1 + 1) / 3),
        "average_precision": pytest.approx({"walrus": 1 / 3, "ant": 1.0, "zebra": 1.0}),
        "images": count,
        "which": "all images" if images == "all" else "the 3 images held out in training (of 9)",
        "damaged": {"count": 0, "files": []},
    }


@pytest.mark.parametrize("protocol", ["top1", "fewshot"])
def test_images_of_several_classes_are_for_map(list_of_several, tmp_path, protocol):
    with pytest.raises(InputError, match="several classes here, so there is no top-1: score with --protocol map"):
        score(by_colour(NAMES), tmp_path / "model", list_of_several, protocol=protocol, shots=1, workers=0)


def test_images_of_one_class_each_are_not(data, tmp_path):
    with pytest.raises(InputError, match="exactly one class here: score with --protocol top1"):
        score(by_colour(NAMES), tmp_path / "model", data, protocol="map", workers=0)


@pytest.mark.parametrize("which", ["train", "test"])
def test_few_shots_are_of_one_class_each(data, which):
    images = scan_class_folders(data)
    several = replace(images, labels=tuple((label,) for label in images.labels))
    with pytest.raises(InputError, match="score with --protocol map"):
        few_shot(by_colour(NAMES), **({"train": images, "test": images} | {which: several}), shots=1, workers=0)


# ---- devices


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)


@pytest.mark.usefixtures("no_gpu")
def test_devices_without_a_gpu():
    assert usable_device("auto") == usable_device("cpu") == usable_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("cuda", "cuda:1", "mps", "meta"):
        with pytest.raises(InputError, match=f"there is no device {name} here: torch sees 0 of type {name[:4]}"):
            usable_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_devices_with_two_gpus():
    assert usable_device("auto") == usable_device("cuda") == torch.device("cuda")
    assert usable_device("cuda:1") == usable_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="there is no device cuda:2 here: torch sees 2 of type cuda"):
        usable_device("cuda:2")
    with pytest.raises(InputError, match="there is no device mps here: torch sees 0 of type mps"):
        usable_device("mps")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "1"])
def test_what_is_no_name_of_a_device(name):
    with pytest.raises(InputError, match=f"'{name}' is not the name of a device: give auto, cpu, cuda or, say, cuda:1"):
        usable_device(name)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_protocol_refuses_a_device_that_is_not_there(data, tmp_path, protocol):
    with pytest.raises(InputError, match="there is no device cuda:1 here"):
        score(by_colour(NAMES), tmp_path / "model", data, protocol=protocol, device="cuda:1", workers=0)


@pytest.fixture
def moved(monkeypatch) -> list[object]:
    """What is moved to cuda:1, without moving it."""
    calls: list[object] = []

    def recording(plain: Callable) -> Callable:
        def to(self: object, *args: object, **kwargs: object) -> object:
            if args != (torch.device("cuda:1"),):
                return plain(self, *args, **kwargs)
            calls.append(self)
            return self

        return to

    monkeypatch.setattr(nn.Module, "to", recording(nn.Module.to))
    monkeypatch.setattr(torch.Tensor, "to", recording(torch.Tensor.to))
    return calls


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_model_and_images_are_moved_to_the_device(data, tmp_path, protocol, request):
    model: nn.Module = by_colour(NAMES)
    options: dict[str, object] = {}
    if protocol == "map":
        data = request.getfixturevalue("list_of_several")
    if protocol == "fewshot":
        model = VisionTransformer(img_size=SIDE, patch_size=4, num_classes=3, embed_dim=12, depth=1, num_heads=2)
        model.preprocessing, options = PREPROCESSING, {"shots": 1}
    if protocol == "real":
        for i, file in enumerate(sorted(data.rglob("*.png")), 1):
            file.rename(file.with_name(f"ILSVRC2012_val_{i:08}.png"))
        (tmp_path / "real.json").write_text(json.dumps([[0]] * 10))
        options = {"real_labels": tmp_path / "real.json"}
    seen: list[torch.Tensor] = []
    first = model.patch_embed if protocol == "fewshot" else model
    first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    arguments = {"protocol": protocol, "images": "all", "batch_size": 2, "workers": 0, **options}
    on_cpu = score(model, tmp_path / "model", data, **arguments)
    seen.clear()
    moved = request.getfixturevalue("moved")
    assert score(model, tmp_path / "model", data, device="cuda:1", **arguments) == on_cpu  # where it really is
    assert seen
    assert {id(model), *map(id, seen)} <= set(map(id, moved))
