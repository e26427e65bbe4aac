"""A saved model is loaded as it was, bit for bit, or not saved at all, or refused: never silently another model."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.layers import GluMlp, LayerNorm, LayerNormFp32, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models import build_model_with_cfg
from timm.models import vision_transformer as vit
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.testing import assert_close

import tokenlearner
from insertion.hosts import FUSERS, images, inserted, shake
from insertion.hosts import tiny as of_four_layers
from tokenlearner import InputError, Preprocessing, insert, insertion_of, learners, load, remove, save
from tokenlearner.core import KINDS
from tokenlearner.insertion.hosting import build_host, differences
from tokenlearner.models import MODULES, FrameAverageViT, X2Plus1D

CREATED = {
    "vit, overrides": ("vit_tiny_patch16_224", {"num_classes": 7, "img_size": (32, 48), "drop_path_rate": 0.1}),
    "no classes, one channel": ("vit_tiny_patch16_224", {"num_classes": 0, "in_chans": 1, "img_size": 32}),
    "activation by name": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh", "img_size": 32}),
    "activation by class": ("vit_tiny_patch16_224", {"act_layer": nn.ReLU, "img_size": 32}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "num_classes": 3}),
    "registers, LayerScale": ("vit_small_patch14_reg4_dinov2", {"img_size": (28, 42)}),
    "packed SwiGLU": ("vit_giant_patch14_dinov2", {"img_size": 28, "global_pool": "avg"}),
    "pre-norm, QuickGELU": ("vit_base_patch32_clip_quickgelu_224", {"img_size": 64}),
    "map pooling": ("vit_base_patch16_siglip_224", {"img_size": 32, "num_classes": 4}),
    "SigLIP so400m": ("vit_so400m_patch14_siglip_224", {"img_size": 28, "embed_dim": 36}),
}

BUILT = {
    "default": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "no position embedding": {"pos_embed": "none"},
    "qk_norm, scale norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "LayerScale": {"init_values": 0.1},
    "pre_norm, no final_norm": {"pre_norm": True, "final_norm": False},
    "fc_norm with token pooling": {"fc_norm": True},
    "avg pooling without fc_norm": {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": True},
    "max pooling": {"global_pool": "max"},
    "map pooling, odd ratio": {"global_pool": "map", "mlp_ratio": 2.7},
    "a ratio that rounds down": {"embed_dim": 38, "mlp_ratio": 2.8},  # int(38 · (106 / 38)) is 105
    "prr pooling": {"global_pool": "prr"},
    "no pooling, no classes": {"global_pool": "", "num_classes": 0},
    "dynamic_img_size": {"dynamic_img_size": True},
    "dynamic_img_pad": {"img_size": 30, "dynamic_img_pad": True, "pos_embed": "none"},
    "shapes": {"img_size": (32, 48), "patch_size": (8, 16), "in_chans": 4, "depth": 3},
    "one layer": {"depth": 1, "drop_path_rate": 0.1},
    "drop rates": {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.4},
    "drop_path_rate": {"drop_path_rate": 0.3, "depth": 5},
    "embed_norm_layer": {"embed_norm_layer": LayerNorm},
    "other eps": {"norm_layer": partial(LayerNorm, eps=1e-3)},
    "RmsNorm": {"norm_layer": RmsNorm},
    "LayerNormFp32": {"norm_layer": LayerNormFp32},
    "norm without weights": {"norm_layer": partial(LayerNorm, affine=False)},
    "norm without bias": {"norm_layer": partial(nn.LayerNorm, bias=False)},
    "no norm": {"norm_layer": nn.Identity},
    "ReLU": {"act_layer": nn.ReLU},
    "tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "slope": {"act_layer": partial(nn.LeakyReLU, negative_slope=0.3)},
    "QuickGELU": {"act_layer": "quick_gelu"},
    "SwiGLU": {"mlp_layer": SwiGLU},
    "SwiGLU, aligned": {"mlp_layer": partial(SwiGLU, align_to=24), "mlp_ratio": 2.7},
    "SwiGLUPacked": {"mlp_layer": SwiGLUPacked},
    "GluMlp": {"mlp_layer": GluMlp},
    "differential attention": {"attn_layer": "diff"},
    "ResPostBlock": {"block_fn": vit.ResPostBlock, "init_values": 0.1},
    "ParallelScalingBlock": {"block_fn": vit.ParallelScalingBlock, "mlp_ratio": 2.7, "qk_norm": True},
    "ParallelScalingBlock, own parameter": {"block_fn": vit.ParallelScalingBlock, "qkv_bias": False},
    "ParallelScalingBlock, fused": {"block_fn": partial(vit.ParallelScalingBlock, fuse_out_proj=True)},
    "DiffParallelScalingBlock": {"block_fn": partial(vit.DiffParallelScalingBlock, dual_lambda=True)},
    "ParallelThingsBlock": {"block_fn": partial(vit.ParallelThingsBlock, num_parallel=3), "init_values": 0.1},
    "initialisation": {"weight_init": "jax", "fix_init": True},
    "distilled": {"cls": VisionTransformerDistilled},
}


def tiny(*arguments: object, **options: object) -> nn.Module:
    """Two layers will do here."""
    return of_four_layers(*arguments, **{"depth": 2, **options})


def created(name: str, **options: object) -> nn.Module:
    """A host by timm's name, two narrow layers deep, every parameter random."""
    model = timm.create_model(name, **{"depth": 2, "embed_dim": 32, "num_heads": 2, **options}).eval()
    shake(*model.parameters())
    return model


def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Equal in every bit and option, and in eval mode."""
    assert differences(loaded, model) == []
    assert insertion_of(loaded) == insertion_of(model)
    assert not any(module.training for module in loaded.modules())
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert theirs[key].dtype == value.dtype
        assert torch.equal(theirs[key], value), key
    dtype = next(loaded.parameters()).dtype
    frames = (getattr(model, "num_frames", 3),) if hasattr(model, "takes_clips") else ()
    size = model.img_size if isinstance(model, X2Plus1D) else model.patch_embed.img_size
    x = torch.randn(2, model.in_chans, *frames, *size).to(dtype)
    assert torch.equal(loaded(x), model.eval()(x))


def assert_round_trip(model: nn.Module, folder: Path) -> nn.Module:
    assert save(model, folder) == folder
    loaded = load(folder)
    assert_same(loaded, model)
    return loaded


@pytest.mark.parametrize("at", [None, 1])
@pytest.mark.parametrize(("name", "options"), CREATED.values(), ids=CREATED)
def test_hosts_timm_created(tmp_path, name, options, at):
    host = created(name, **options)
    assert_round_trip(host if at is None else inserted(host, at=at), tmp_path)


@pytest.mark.parametrize("options", BUILT.values(), ids=BUILT)
def test_hosts_built_by_hand(tmp_path, options):
    assert_round_trip(inserted(tiny(**options)), tmp_path / "inserted")


@pytest.mark.parametrize("options", [{}, {"patch_drop_rate": 0.5}, {"cls": VisionTransformerDistilled}])
def test_hosts_without_insertion(tmp_path, options):
    assert_round_trip(tiny(**options), tmp_path)


@pytest.mark.parametrize("kind", ["mlp", "dense", "gate"])
@pytest.mark.parametrize("extra_layers", [0, 2])
@pytest.mark.parametrize("fuser", FUSERS)
def test_insertions(tmp_path, fuser, extra_layers, kind):
    model = inserted(tiny(img_size=(32, 48)), 3, 1, kind, fuser=fuser, extra_layers=extra_layers)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:  # gate's statistics are neither parameters nor what a new model has
                buffer.add_(0.3)
    assert_round_trip(model, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"at": 1.0},
        {"at": 0},
        {"at": 3, "extra_layers": 1},
        {"kind": "conv", "pool": "mean"},
        {"hidden_dim": 5, "dropout": 0.2},
        {"kind": "average"},
        {"kind": "grid", "num_tokens": 6},
    ],
)
def test_other_places_and_options(tmp_path, options):
    assert_round_trip(inserted(tiny(), **options), tmp_path)


def resized(model):
    model.set_input_size((48, 16))
    return model


def resized_patches(model):
    model.set_input_size((64, 64), (16, 16))
    return model


def new_classes(model):
    model.reset_classifier(7)
    return model


def other_pooling(model):
    model.reset_classifier(7, "avg")  # the norm stays before the pooling, where avg would have put it behind
    return model


def removed(model):
    return remove(model)


def frozen(model):
    return model.requires_grad_(False)


def training(model):
    return model.train()


def checkpointing(model):
    model.set_grad_checkpointing()
    return model


@pytest.mark.parametrize(
    "change", [resized, resized_patches, new_classes, other_pooling, removed, frozen, training, checkpointing]
)
@pytest.mark.parametrize("build", [tiny, partial(created, "vit_tiny_patch16_224", img_size=32, patch_size=8)])
def test_models_changed_since(tmp_path, build, change):
    loaded = assert_round_trip(change(inserted(build(), fuser="fuser")), tmp_path)
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(tmp_path, dtype):
    loaded = assert_round_trip(inserted(tiny().to(dtype), kind="gate"), tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    save(inserted(tiny()), tmp_path)
    state = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_again_over_the_same_folder(tmp_path):
    first, second = inserted(tiny()), inserted(tiny(depth=3), 3, fuser="fuser")
    assert_round_trip(first, tmp_path)
    assert_round_trip(second, tmp_path)
    assert_round_trip(load(tmp_path), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_notes_made_on_a_model_are_no_reason_to_refuse_it(tmp_path):
    model = inserted(tiny())
    model.best_epoch, model.run = 7, "morning"
    save(model, tmp_path)
    assert not hasattr(load(tmp_path), "best_epoch")


BACKBONE = {"widths": (4, 8), "depths": (1, 3), "head_width": 12, "num_classes": 5, "num_frames": 4, "img_size": 24}
TOKENS = {"num_tokens": 3, "num_weights": 2}


def backbone(module: str = "TokenLearner", **options: object) -> nn.Module:
    """An X(2+1)D of clips of 4×24×24, every number of it random, BatchNorm's statistics included."""
    own = {"key_dim": 4, "num_heads": 2, **(TOKENS if "TokenLearner" in module else {})}
    model = X2Plus1D(module, **{**BACKBONE, "swapped": 2, **own, **options})
    shake(*model.parameters())
    for name, buffer in model.named_buffers():
        buffer.add_(7 if name.endswith("tracked") else torch.rand_like(buffer))
    return model


@pytest.mark.parametrize("module", MODULES)
def test_backbones_of_clips(tmp_path, module):
    assert_round_trip(backbone(module), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_backbones_with_each_kind_of_tokens(tmp_path, kind):
    assert_round_trip(backbone(kind=kind, grid=(3, 3) if kind == "dense" else None), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 1, "img_size": (16, 24), "num_frames": 6},
        {"swapped": 0},
        {"drop_rate": 0.1, "drop_path_rate": 0.3},
        {"expansion": 1.5, "depths": (2, 2), "swapped": 1},
        {"attention": "mhsa"},
        {"num_classes": 0},
    ],
)
def test_backbones_of_other_shapes(tmp_path, options):
    assert_round_trip(backbone(**options), tmp_path)


@pytest.mark.parametrize("change", [new_classes, frozen, training, checkpointing])
def test_backbones_changed_since(tmp_path, change):
    loaded = assert_round_trip(change(backbone()), tmp_path)
    assert not loaded.grad_checkpointing
    assert_round_trip(loaded, tmp_path)


def test_a_backbone_timm_created_needs_no_name(tmp_path):
    model = timm.create_model("x2plus1d_micro_tokenlearner", num_classes=5, num_frames=4, img_size=32, kind="mlp")
    loaded = assert_round_trip(model, tmp_path)
    assert "x2plus1d_micro" not in (tmp_path / "config.json").read_text()
    assert loaded.preprocessing.input_size == (3, 32, 32)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("host", "arguments", "module"), "Conv2D + Conv1D", "has no TokenLearner to take num_"),
        (("host", "arguments", "module"), "X3D", "can't build the host X2Plus1D: no module 'X3D'"),
        (("host", "arguments", "widths"), [4, 16], r"final.0.0.weight is \(18, 8, 1, 1, 1\), not \(36, 16, 1, 1, 1\)"),
        (("host", "arguments", "rank"), 3, r"can't build the host X2Plus1D: .*'rank'"),
        (("host", "arguments", "num_frames"), 8, r"is \(12, 12\), not \(24, 24\)"),
        # None of these moves a weight or its shape.
        (("host", "arguments", "img_size"), [32, 32], r"the host was saved with img_size \[24, 24\], not \[32, 32\]$"),
        (("host", "arguments", "drop_rate"), 0.1, "the host was saved with drop_rate 0.5, not 0.1$"),
        (("insertion",), {"num_tokens": 8, "at": 1, "host_depth": 2}, "a host of 2 layers, but this one has 0"),
    ],
)
def test_an_edited_config_of_a_backbone_is_refused(tmp_path, path, value, message):
    edited(save(backbone(), tmp_path), *path, value=value)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


class OwnBackbone(X2Plus1D):
    """Nothing in a config could build it."""


def test_a_backbone_changed_by_hand_is_not_saved(tmp_path):
    model = backbone()
    model.stages[1][2].middle[0][0].learner.pool = "softmax"
    with pytest.raises(InputError, match=r"can't describe this X2Plus1D .*learner\.pool is 'softmax' in one"):
        save(model, tmp_path / "model")
    model = backbone()
    model.head = nn.Linear(12, 9)
    with pytest.raises(InputError, match=r"can't describe this X2Plus1D .*head\.out_features is 9 in one and 5"):
        save(model, tmp_path / "model")
    with pytest.raises(InputError, match=r"and OwnBackbone is none$"):
        save(OwnBackbone(**BACKBONE, swapped=0), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_baseline_without_time(tmp_path):
    model = tiny(FrameAverageViT, fc_norm=False, global_pool="avg")
    assert_round_trip(model, tmp_path)
    assert_round_trip(insert(model, 3, 1), tmp_path)


PREPARATION = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), "bilinear", 0.95, "squash")
LABELS = ["hen", "owl", "jay", "tit", "été"]


def test_preprocessing_and_labels_travel_along(tmp_path):
    save(inserted(tiny()), tmp_path / "given", preprocessing=PREPARATION, labels=LABELS)
    loaded = load(tmp_path / "given")
    assert loaded.preprocessing == PREPARATION
    assert loaded.label_names == tuple(LABELS)

    again = load(save(loaded, tmp_path / "carried"))
    assert (again.preprocessing, again.label_names) == (PREPARATION, tuple(LABELS))

    bare = load(save(tiny(), tmp_path / "none"))
    assert (bare.preprocessing, bare.label_names) == (None, None)


def test_preprocessing_defaults_to_the_hosts_at_its_own_size(tmp_path):
    host = created("vit_base_patch16_siglip_224", img_size=(32, 48))
    loaded = load(save(inserted(host), tmp_path))
    assert loaded.preprocessing == Preprocessing((3, 32, 48), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    loaded.set_input_size((48, 16))
    assert load(save(loaded, tmp_path)).preprocessing.input_size == (3, 48, 16)


def test_the_transform_crops_and_normalises():
    colours = (26, 51, 204)
    left, right = Image.new("RGB", (40, 40), (255, 0, 0)), Image.new("RGB", (40, 40), colours)
    picture = Image.new("RGB", (120, 40), (255, 0, 0))
    picture.paste(left, (0, 0))
    picture.paste(right, (40, 0))
    x = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), crop_pct=1.0).transform()(picture)
    expected = (np.array(colours) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert_close(x[:, :, 2:-2], torch.tensor(expected, dtype=torch.float32).reshape(3, 1, 1).expand(3, 32, 28))


def test_the_config_is_readable_and_complete(tmp_path):
    save(inserted(tiny(act_layer=nn.ReLU), 3, fuser="unpool"), tmp_path, preprocessing=PREPARATION, labels=LABELS)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert list(config) == ["format", "versions", "host", "insertion", "preprocessing", "labels"]
    assert config["format"] == 1
    assert config["versions"] == {
        "tokenlearner": tokenlearner.__version__,
        "timm": timm.__version__,
        "torch": torch.__version__,
    }
    arguments = config["host"].pop("arguments")
    assert config["host"] == {"library": "timm", "architecture": None, "class": "VisionTransformer"}
    assert arguments.items() >= {"img_size": [32, 32], "depth": 2, "num_heads": 2, "num_classes": 5}.items()
    assert arguments["act_layer"] == {"type": "torch.nn.modules.activation.ReLU", "inplace": False}
    assert config["insertion"] == {
        "num_tokens": 3,
        "at": 1,
        "host_depth": 2,
        "kind": "mlp",
        "fuser": "unpool",
        "extra_layers": 0,
        "pool": None,
        "hidden_dim": 64,
        "dropout": 0.0,
        "mix": "slice",
        "over": "slice",
        "window": None,
        "elastic": False,
        "used_tokens": None,
    }
    assert config["preprocessing"] == {
        "input_size": [3, 32, 32],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
        "interpolation": "bilinear",
        "crop_pct": 0.95,
        "crop_mode": "squash",
        "frames": None,
        "fps": None,
    }
    assert config["labels"] == LABELS


def test_a_host_timm_created_is_saved_by_its_name(tmp_path):
    save(created("vit_tiny_patch16_224", num_classes=7, img_size=32), tmp_path)
    assert load(tmp_path).pretrained_cfg["architecture"] == "vit_tiny_patch16_224"  # timm's functions read it
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["insertion"] is None
    assert config["host"]["architecture"] == "vit_tiny_patch16_224"
    assert config["host"]["arguments"].items() >= {"num_classes": 7, "img_size": [32, 32], "depth": 2}.items()


def test_a_host_other_code_registered_is_saved_by_its_arguments(tmp_path, monkeypatch):
    """A process that only loads it need not know the name."""

    def own_vit(pretrained=False, **options):
        return build_model_with_cfg(vit.VisionTransformer, "own_vit", pretrained, **options)

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "own_vit", own_vit)
    assert_round_trip(inserted(created("own_vit", img_size=32)), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["host"]["architecture"] is None


def edited(folder, *path, value=...):
    """Changes one entry of the folder's config.json, or takes it out."""
    file = folder / "config.json"
    config = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    file.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved once, to be copied and spoilt."""
    torch.manual_seed(0)
    return save(inserted(tiny()), tmp_path_factory.mktemp("saved"), preprocessing=PREPARATION, labels=LABELS)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_the_copy_that_others_spoil_is_good(folder):
    assert load(folder).label_names == tuple(LABELS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("insertion",), None, "weights also have .*token_learner.* so the insertion differs"),
        (("insertion",), ..., "has no entry 'insertion'"),
        (("insertion",), [8, 2], "has no entry 'insertion' as this version writes it"),
        (("insertion", "num_tokens"), 4, r"token_learner.alpha.fc2.bias is \(8,\), not \(4,\)"),
        (("insertion", "num_tokens"), 0, "does not fit the host: num_tokens"),
        (("insertion", "num_tokens"), "8", "the insertion is not understood|does not fit"),
        (("insertion", "kind"), "conv", "weights lack .*alpha.convs.* so the insertion differs"),
        (("insertion", "kind"), "rowwise", "the insertion is not understood|does not fit"),
        (("insertion", "at"), 0, "weights lack blocks.0.token_learner.* so the insertion differs"),
        (("insertion", "at"), 9, "does not fit the host: at=9 is outside"),
        (("insertion", "host_depth"), 12, "made on a host of 12 layers, but this one has 2"),
        (("insertion", "rank"), 3, "is not understood: .*'rank'"),
        # None of these moves a weight or its shape.
        (("insertion", "dropout"), 0.5, "the insertion was saved with dropout 0.0, not 0.5$"),
        (("host", "arguments", "num_heads"), 4, "the host was saved with num_heads 2, not 4$"),
        (("host", "arguments", "global_pool"), "avg", "the host was saved with global_pool 'token', not 'avg'$"),
        (("host", "arguments", "depth"), 3, "made on a host of 2 layers, but this one has 3"),
        (("host", "arguments", "embed_dim"), 48, r"blocks.0.attn.proj.bias is \(32,\), not \(48,\)"),
        (("host", "arguments", "embed_dim"), 33, "can't build the host VisionTransformer"),
        (("host", "arguments", "checkpoint_path"), "a.pth", "VisionTransformer has no checkpoint_path"),
        (("host", "arguments"), None, "the host's arguments are None, and have to be a dict"),
        (("host", "class"), "ResNet", "host class 'ResNet' is not known; this version knows VisionTransformer"),
        (("host", "architecture"), "vit_colossal", "timm .* has no model 'vit_colossal'"),
        (("host", "architecture"), 3, "timm .* has no model 3"),
        (("host", "library"), "transformers", "host library 'transformers' is not known"),
        (("host",), "vit", "has no entry 'host' as"),
        (("format",), 2, "has format 2; this version of tokenlearner reads format 1"),
        (("format",), ..., "has format None"),
        (("labels",), ["a", "b"], "the model has 5 outputs, but 2 labels were given"),
        (("labels",), ..., "has no entry 'labels'"),
        (("preprocessing",), ..., "has no entry 'preprocessing'"),
        (("preprocessing", "colour"), "grey", "preprocessing has no colour; it has crop_mode, "),
    ],
)
def test_an_edited_config_is_refused(folder, path, value, message):
    edited(folder, *path, value=value)
    with pytest.raises(InputError, match=message):
        load(folder)


def test_a_fuser_taken_out_of_the_config_is_noticed(tmp_path):
    """In a model's last layer Unpool has no weights to miss."""
    save(inserted(tiny(), at=1, fuser="unpool"), tmp_path)
    edited(tmp_path, "insertion", "fuser", value=None)
    with pytest.raises(InputError, match="the insertion was saved with fuser 'unpool', not None"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "evil.Act",
        "timmy.Act",
        "torch.nnx.Act",
        "torch.nn.utils.clip_grad_norm_",  # a function
        "timm.models._helpers.load_checkpoint",
        "torch.nn.functional.torch",  # a module
        "torch.nn.modules.activation.Nope",
        "timm.nope.Act",
    ],
)
def test_a_config_can_name_no_other_code(folder, tmp_path, monkeypatch, name):
    (tmp_path / "evil.py").write_text("class Act: pass")
    monkeypatch.syspath_prepend(tmp_path)
    edited(folder, "host", "arguments", "act_layer", value={"type": name})
    with pytest.raises(InputError, match=f"the host has (the class )?{name}"):
        load(folder)
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[]", "has format None"),
        (b"null", "has format None"),
        (None, "is not a saved model: it has no config.json"),
    ],
)
def test_a_damaged_config_is_refused(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load(folder)


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"\x80\x02}q\x00."])
def test_garbage_for_weights_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        load(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere is not a saved model: it has no config\.json"):
        load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors; a saved model is a folder with config\.json and"):
        load(folder)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny(), "weights lack blocks.1.token_learner.* so the insertion differs"),
        (lambda: inserted(tiny(), 4), r"is \(4,\), not \(8,\)"),
        (lambda: inserted(tiny(num_classes=3)), r"head.bias is \(3,\), not \(5,\)"),
        (lambda: inserted(tiny(depth=3), at=1), "weights also have blocks.2.* and 9 more"),
        (lambda: inserted(tiny(num_heads=4)), "the host was saved with num_heads 4, not 2"),
    ],
)
def test_weights_of_another_model_are_refused(folder, tmp_path, other, message):
    save(other(), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load(folder)


def test_weights_another_program_wrote_are_welcome(folder):
    """They lack our metadata, and their names and shapes must do."""
    other = inserted(tiny())
    safetensors.torch.save_file(other.state_dict(), folder / "model.safetensors")
    assert_same(load(folder), other)


def swapped_activation(model):
    model.blocks[1].mlp.act = nn.ReLU()


def swapped_head(model):
    model.head = nn.Linear(32, 9)


def swapped_eps(model):
    model.blocks[1].norm1.eps = 1e-2


def swapped_heads(model):
    model.blocks[1].attn.num_heads = 4


def patched_method(model):
    model.blocks[0].attn.forward = lambda x, **masks: x


def lost_layer(model):
    del model.blocks[1]


def shared_layer(model):
    model.blocks[1] = model.blocks[0]


def tied_weights(model):
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight


def gated_attention(model):
    model.blocks[1].attn.gate = nn.Linear(32, 32)


def custom_activation(model):
    model.blocks[1].mlp.act = type("Act", (nn.GELU,), {})()


def swapped_pool(model):
    learners(model)[1].pool = "sum"


def swapped_alpha(model):
    learners(model)[1].alpha.fc1 = nn.Linear(32, 16)


def lost_residual(model):
    model.blocks[1].token_fuser.residual = False


EDITS = {
    swapped_activation: "blocks.1.mlp.act is ReLU in one and GELU",
    swapped_head: r"head.out_features is 9 in one and 5",
    swapped_eps: "blocks.1.norm1.eps is 0.01 in one",
    swapped_heads: "blocks.1.attn.num_heads is 4 in one and 2",
    patched_method: "blocks.0.attn.forward is 'replaced'",
    lost_layer: "made on a host of 2 layers, but this one has 1",
    shared_layer: "only one of them has blocks.1",
    tied_weights: "blocks.1.mlp.fc1.weight is tied",
    gated_attention: "only one of them has blocks.1.attn.gate",
    custom_activation: "blocks.1.mlp.act is Act in one and GELU",
    swapped_pool: "token_learner.pool is 'sum' in one and 'softmax'",
    swapped_alpha: "token_learner.alpha.fc1.out_features is 16 in one and 64",
    lost_residual: "token_fuser.residual is False in one and True",
}


@pytest.mark.parametrize(("edit", "difference"), EDITS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_a_model_changed_by_hand_is_not_saved(tmp_path, edit, difference):
    model = inserted(tiny(), fuser="fuser")
    edit(model)
    with pytest.raises(InputError, match=f"can't describe this VisionTransformer .*not saved: .*{difference}"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


class OwnViT(vit.VisionTransformer):
    """A host of somebody's own: nothing in a config could build it."""


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm.create_model("resnet10t"), "a plain ViT of timm can be saved, and ResNet is none$"),
        (lambda: nn.DataParallel(inserted(tiny())), "and DataParallel is none; save the model that it wraps"),
        (
            lambda: torch.compile(inserted(tiny()), backend="eager"),
            "and OptimizedModule is none; save the model that it wraps",
        ),
        (lambda: inserted(tiny(OwnViT)), "OwnViT .*: it is neither timm's own class nor made by timm.create_model"),
        (lambda: inserted(tiny(act_layer=type("Act", (nn.ReLU,), {}))), "has the class .*Act, which is not one of"),
        (lambda: insert(tiny()).to("meta"), "on the meta device, so it has no weights to save"),
    ],
)
def test_what_cannot_be_built_again_is_not_saved(tmp_path, build, message):
    with pytest.raises(InputError, match=message):
        save(build(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("labels", [["a"], ["a"] * 6])
def test_a_wrong_number_of_labels_is_refused(tmp_path, labels):
    with pytest.raises(InputError, match=f"the model has 5 outputs, but {len(labels)} labels were given"):
        save(inserted(tiny()), tmp_path / "model", labels=labels)
    assert not (tmp_path / "model").exists()


def test_no_classes_may_have_no_labels(tmp_path):
    with pytest.raises(InputError, match="the model has 0 outputs, but 2 labels"):
        save(tiny(num_classes=0), tmp_path, labels=["a", "b"])


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (os, "fdopen")])
@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_save_leaves_the_old_files(tmp_path, monkeypatch, owner, name, call):
    old, new = inserted(tiny()), inserted(tiny(), 4)
    save(old, tmp_path, labels=LABELS)
    original, calls = getattr(owner, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError("no space left on device")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(OSError, match="no space left"):
            save(new, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    if (name, call) == ("replace", 2):  # one file is in place already: a folder that is neither model is refused
        with pytest.raises(InputError, match=r"does not fit config\.json"):
            load(tmp_path)
    else:
        assert_same(load(tmp_path), old)
        assert load(tmp_path).label_names == tuple(LABELS)
    assert_round_trip(new, tmp_path)


def test_descriptions_are_proven_with_values():
    """Two hosts that differ in what no name and no shape shows must not count as the same."""
    one, other = tiny(qk_norm=True), tiny(qk_norm=True, norm_layer=partial(LayerNorm, eps=1e-2))
    assert len(differences(one, other)) == 9  # 4 norms in each layer, and the last
    assert not torch.allclose(one(images()), other(images()))
    with pytest.raises(InputError, match="host library None is not known"):
        build_host({})


def test_a_grey_model_is_fed_grey_pictures():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, depth=1)
    preprocessing = Preprocessing.of(model)
    x = preprocessing.transform()(Image.new("RGB", (40, 40), (255, 0, 0)))
    grey = round(0.299 * 255) / 255  # ITU-R 601's luma of pure red
    assert x.shape == (1, 32, 32)
    assert torch.allclose(x, torch.tensor((grey - 0.5) / 0.5), atol=1e-6)


def test_pictures_have_one_or_three_channels():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=4, depth=1)
    with pytest.raises(InputError, match="1 or 3 channels, and the model takes 4"):
        Preprocessing.of(model).transform()
