"""Video models by timm's names: what each name promises, what is passed on, and that none has weights in disguise."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import tokenlearner
from insertion.hosts import shake
from tokenlearner.models import VIDEO_HOSTS, VIDEO_PRESETS, ViViT, X2Plus1D, presets
from tokenlearner.models.x2plus1d import MODELS

NAME = re.compile(
    r"vivit_(?P<size>micro|tiny|small|base|large|huge)_patch(?P<patch>\d+)x(?P<tubelet>\d+)_(?P<resolution>\d+)"
)
SIZES = {
    "micro": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
FEW = {"num_classes": 3, "num_frames": 4, "img_size": 32}
NARROW = {"widths": (4, 8), "depths": (1, 4), "head_width": 8}


def meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_the_names_are_registered():
    assert set(timm.list_models("vivit_*")) == set(VIDEO_HOSTS)
    assert {name.rpartition("_patch")[0] for name in VIDEO_HOSTS} == {f"vivit_{size}" for size in SIZES}
    assert "vivit_large_patch14x2_224" in VIDEO_HOSTS
    assert timm.list_models("x2plus1d*") == sorted(MODELS)


@pytest.mark.parametrize("name", VIDEO_HOSTS)
def test_a_vivit_is_what_its_name_says(name):
    said, model = NAME.fullmatch(name), meta(name, weight_init="skip")
    patch, tubelet, side = (int(said[key]) for key in ("patch", "tubelet", "resolution"))
    micro = said["size"] == "micro"
    assert (type(model), tokenlearner.insertion_of(model)) == (ViViT, None)
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == SIZES[said["size"]]
    assert (*model.patch_embed.tubelet, *model.img_size) == (tubelet, patch, patch, side, side)
    assert (model.num_frames, model.num_classes) == (16 if micro else 32, 400)
    assert isinstance(model.norm, torch.nn.Identity) == micro
    assert model.pretrained_cfg["input_size"] == (3, side, side)
    assert model.pretrained_cfg["architecture"] == name


@pytest.mark.parametrize("name", ["vivit_micro_patch8x2_64", "tokenlearner_vivit_micro8_64_8at2_mlp"])
def test_micro_models_take_pixels_alike(name):
    images = timm.get_pretrained_cfg("tokenlearner_micro4_32_plain")
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.mean, cfg.std, cfg.crop_pct) == (images.mean, images.std, images.crop_pct)
    assert cfg.mean != (0.5, 0.5, 0.5)


def test_the_micro_preset_is_the_micro_vivit_with_tokens():
    host = timm.create_model("vivit_micro_patch8x2_64", **FEW)
    expected = tokenlearner.insert(host, 8, 2, "mlp").eval()
    model = timm.create_model("tokenlearner_vivit_micro8_64_8at2_mlp", **FEW)
    shake(*model.eval().parameters())
    expected.load_state_dict(model.state_dict())
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    x = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(model(x), expected(x))


def test_keywords_reach_the_vivit():
    options = {**FEW, "in_chans": 1, "tubelet_size": 4, "drop_path_rate": 0.3}
    model = timm.create_model("vivit_micro_patch8x2_64", **options)
    assert model(torch.randn(2, 1, 4, 32, 32)).shape == (2, 3)
    assert model.patch_embed.grid_size == (1, 4, 4)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(tokenlearner.InputError, match="patch8x2_64 has no TokenLearner, so there is nothing for kind"):
        timm.create_model("vivit_micro_patch8x2_64", kind="mlp")


def test_the_generic_model_takes_a_vivit_for_host(tmp_path):
    model = timm.create_model("tokenlearner_vit", host="vivit_micro_patch8x2_64", tokens=4, at=2, **FEW).eval()
    x = torch.randn(2, 3, 4, 32, 32)
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path))
    assert tokenlearner.insertion_of(loaded).num_tokens == 4
    assert torch.equal(loaded(x), model(x))


# --- X(2+1)D


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("x2plus1d_m", {}, (64, 224, 224)),
        ("x2plus1d_m_tokenlearner", {"module": "TokenLearner"}, (64, 224, 224)),
        ("x2plus1d_micro", {}, (8, 64, 64)),
        ("x2plus1d_micro_tokenlearner", {"module": "TokenLearner"}, (8, 64, 64)),
    ],
)
def test_an_x2plus1d_is_what_its_name_says(name, arguments, size):
    model, classes = meta(name), 400
    if "micro" in name:  # ours, with the classes of the weights it comes with
        narrow = {"widths": (16, 32, 64), "depths": (1, 2, 4), "head_width": 128, "num_frames": 8, "drop_rate": 0.2}
        arguments, classes = {**arguments, **narrow, "num_classes": 6}, 6
    with torch.device("meta"):
        expected = X2Plus1D(**arguments)
    assert str(model) == str(expected)
    assert (model.num_frames, *model.img_size) == size
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["num_classes"]) == ((3, *size[1:]), classes)
    assert cfg["mean"] == cfg["std"] == (0.5, 0.5, 0.5)
    assert model.get_submodule(cfg["first_conv"]).weight.shape[1] == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


def test_the_micro_models_last_stage_sees_four_by_four():
    model, seen = meta("x2plus1d_micro_tokenlearner"), []
    for block in model.stages[-1][-3:]:
        block.middle.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    with torch.device("meta"):
        model(torch.empty(2, 3, 8, 64, 64))
    assert seen == [(2, 144, 8, 4, 4)] * 3


def test_keywords_reach_the_backbone_and_its_module():
    model = timm.create_model(
        "x2plus1d_micro_tokenlearner",
        **{**FEW, **NARROW, "img_size": (32, 48)},
        in_chans=1,
        drop_rate=0.3,
        drop_path_rate=0.4,
        num_tokens=5,
        kind="mlp",
        attention="mhsa",
        key_dim=6,
        num_heads=2,
    )
    assert model(torch.randn(2, 1, 4, 32, 48)).shape == (2, 3)
    module = model.stages[-1][-1].middle[0][0]
    assert (module.learner.num_tokens, module.learner.kind, module.attention.q.out_features) == (5, "mlp", 6)
    assert (model.head_drop.p, model.stages[-1][-1].drop_path.drop_prob) == (0.3, pytest.approx(0.4))
    assert (model.num_frames, model.img_size) == (4, (32, 48))
    assert model.pretrained_cfg["input_size"] == model.default_cfg["input_size"] == (1, 32, 48)
    assert timm.get_pretrained_cfg("x2plus1d_micro").input_size == (3, 64, 64)  # the name's own is as it was


def test_the_frame_size_makes_no_other_backbone():
    model = timm.create_model("x2plus1d_micro", **{**FEW, "img_size": 64}, **NARROW)
    assert str(model) == str(timm.create_model("x2plus1d_micro", **FEW, **NARROW))


def test_backbones_give_no_features_only():
    with pytest.raises(tokenlearner.InputError, match="x2plus1d_micro has no features_only; its forward_features"):
        timm.create_model("x2plus1d_micro", features_only=True)


# --- weights, and what all have in common


def without_weights(names):
    return [name for name in names if not any(weights.startswith(f"{name}.") for weights in presets.WEIGHTS)]


@pytest.mark.parametrize(
    ("names", "instead"),
    [(VIDEO_HOSTS, r", or put a plain ViT's weights in with tokenlearner\.models\.inflate\("), (MODELS, "$")],
)
def test_weights_nobody_has_are_refused(names, instead):
    for name in without_weights(names):
        message = f"nobody has published weights for {name}: use pretrained=False and train it{instead}"
        with pytest.raises(tokenlearner.InputError, match=message):
            timm.create_model(name, pretrained=True)


def test_weights_of_a_local_file(tmp_path):
    options = {**NARROW, "num_frames": 4, "key_dim": 8, "num_weights": 2}
    trained = timm.create_model("x2plus1d_micro_tokenlearner", num_classes=3, **options)
    shake(*trained.eval().parameters())
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "num_classes": 3, "label_names": ("a", "b", "c")}
    options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("x2plus1d_micro_tokenlearner", **options).eval()
    x = torch.randn(2, 3, 4, 32, 32)
    assert torch.equal(model(x), trained(x))
    assert model.label_names == ("a", "b", "c")
    other = timm.create_model("x2plus1d_micro_tokenlearner", num_classes=5, **options).eval()
    assert torch.equal(other.forward_features(x), trained.forward_features(x))
    with pytest.raises(tokenlearner.InputError, match="of another model: only one of the two has stages"):
        timm.create_model("x2plus1d_micro", pretrained=True, pretrained_cfg_overlay=overlay, **NARROW)


def test_models_of_clips_say_so():
    for name in [*VIDEO_HOSTS, *VIDEO_PRESETS, *MODELS]:
        model = meta(name)
        assert model.takes_clips, name
        assert model.num_frames > 1, name
    assert not hasattr(meta("tokenlearner_micro4_32_plain"), "takes_clips")
