"""Checkpoints of other programs: where the weights are, whose they are, and what is refused."""

import argparse

import pytest
import safetensors.torch
import timm
import torch

from tokenlearner.errors import InputError
from tokenlearner.training.foreign import model_of_checkpoint, read_checkpoint


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
    read = read_checkpoint(tmp_path / "a.pt").own
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


def state_of(classes: int = 2) -> dict[str, torch.Tensor]:
    return timm.create_model("test_vit", num_classes=classes).state_dict()


def same(found, state) -> bool:
    return found.keys() == state.keys() and all(torch.equal(value, found[key]) for key, value in state.items())


@pytest.mark.parametrize("first", ["raw", "averaged"])
def test_the_averaged_weights_of_a_lightning_module_are_taken_in_any_order(first, tmp_path):
    raw, averaged = state_of(), state_of()
    parts = {"raw": {f"model.{k}": v for k, v in raw.items()}}
    parts["averaged"] = {f"ema_model.module.{k}": v for k, v in averaged.items()}
    parts["averaged"]["ema_model.n_averaged"] = torch.tensor(3)
    order = sorted(parts, key=lambda name: name != first)
    torch.save({"state_dict": {k: v for name in order for k, v in parts[name].items()}}, tmp_path / "a.ckpt")
    assert same(model_of_checkpoint(tmp_path / "a.ckpt", "test_vit").state_dict(), averaged)


def test_what_stands_beside_the_model_is_left_out(tmp_path):
    state = state_of()
    beside = {"criterion.weight": torch.ones(2), **{f"teacher.{k}": v for k, v in state_of(5).items()}}
    torch.save({"state_dict": {**beside, **{f"model.{k}": v for k, v in state.items()}}}, tmp_path / "a.ckpt")
    assert same(model_of_checkpoint(tmp_path / "a.ckpt", "test_vit").state_dict(), state)
    torch.save({**beside, **state}, tmp_path / "bare.pt")  # nothing says which of these is the model
    with pytest.raises(InputError, match=r"it also has criterion\.weight"):
        model_of_checkpoint(tmp_path / "bare.pt", "test_vit")


def test_a_head_beside_a_wrapped_backbone_is_its_head(tmp_path):
    state = state_of(5)
    wrapped = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in state.items()}
    torch.save(wrapped, tmp_path / "a.pt")
    assert same(model_of_checkpoint(tmp_path / "a.pt", "test_vit").state_dict(), state)


def test_two_models_in_one_are_refused(tmp_path):
    wrapped = [{f"{name}.{k}": v for k, v in state_of().items()} for name in ("model", "net")]
    torch.save({**wrapped[0], **wrapped[1]}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds several models, in model\. and net\.: save one's state dict"):
        read_checkpoint(tmp_path / "a.pt")


def test_places_without_weights_are_passed_over(tmp_path):
    state = state_of()
    torch.save({"ema": {"decay": 0.9, "shadow_params": [torch.ones(2)]}, "model": state}, tmp_path / "a.pt")
    assert same(read_checkpoint(tmp_path / "a.pt").own, state)
    torch.save({"module": state, "epoch": 2}, tmp_path / "deepspeed.pt")
    assert same(read_checkpoint(tmp_path / "deepspeed.pt").own, state)


def test_the_arguments_in_timms_checkpoints_are_no_obstacle(tmp_path):
    state = state_of()
    torch.save(
        {"epoch": 1, "state_dict": state, "args": argparse.Namespace(lr=0.1, model="test_vit")}, tmp_path / "a.pt"
    )
    assert same(read_checkpoint(tmp_path / "a.pt").own, state)


class Anything:
    """Something that a pickle can hold."""


def test_pickles_are_not_run(tmp_path):
    torch.save({"state_dict": state_of(), "callback": Anything()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds more than weights \(.*Anything\), which could run code") as raised:
        read_checkpoint(tmp_path / "a.pt")
    assert "weights_only" not in str(raised.value)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(InputError, match=r"empty\.pt can't be read as weights: \w+"):
        read_checkpoint(tmp_path / "empty.pt")


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("test_vit.no_such_tag", r"timm can't build test_vit\.no_such_tag"),
        ("google/vit-base", "timm has no model 'google/vit-base'.*give the folder that save_pretrained wrote"),
    ],
)
def test_hosts_that_are_none(host, reason, tmp_path):
    torch.save(state_of(), tmp_path / "a.pt")
    with pytest.raises(InputError, match=reason):
        model_of_checkpoint(tmp_path / "a.pt", host)
