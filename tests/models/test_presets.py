"""The registered models: what their names promise, what timm passes on, and that no weights are there in disguise."""

import contextlib
import re

import pytest
import timm
import torch
from timm.models import _registry as registry
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer

import tokenlearner
from tokenlearner.models import PRESETS, VIDEO_PRESETS, Preset, presets, vit
from tokenlearner.models.creating import default_cfgs_of

NAME = re.compile(
    r"tokenlearner_(?P<size>[sblh]|micro)(?P<patch>\d+)_(?P<resolution>\d+)"
    r"_(plain|(?P<tokens>\d+)at(?P<at>\d+)|pool(?P<pooling>\d+at\d+(_\d+at\d+)*))"
    r"(_of(?P<layers>\d+))?(_plus(?P<extra>\d+))?(_(?P<kind>mlp))?(_(?P<fuser>fuser|unpool|reproject))?"
)
WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16), "micro": (128, 4, 4)}

# One of each kind of name.
SHRUNKEN = [
    "tokenlearner_s32_384_plain",
    "tokenlearner_b16_384_8at6",
    "tokenlearner_b16_224_16at0",
    "tokenlearner_b16_384_16at10_of21",
    "tokenlearner_l14_504_16at18_plus11",
    "tokenlearner_b16_384_8at6_fuser",
    "tokenlearner_b16_384_16at6_unpool",
    "tokenlearner_b16_384_8at6_reproject",
    "tokenlearner_l10_510_16at18_plus11_fuser",
    "tokenlearner_l16_512_pool8at9_2at18",
]


def shrunken(name, **options):
    """The model at a sixteenth of its width on an 8×8 grid, every parameter random."""
    small = {"embed_dim": 16, "num_heads": 2, "num_classes": 3, "img_size": 8 * PRESETS[name].patch}
    model = timm.create_model(name, **{**small, **options})
    shake(model)
    return model.eval()


def shake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def images(model):
    return torch.randn(2, model.in_chans, *model.patch_embed.img_size)


def meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, weight_init="skip", **options)


# --- what the names promise


def test_the_names_are_registered_and_nothing_else():
    assert set(timm.list_models("tokenlearner_*")) == {*PRESETS, *VIDEO_PRESETS, "tokenlearner_vit"}
    assert {*timm.list_pretrained("tokenlearner_*"), *timm.list_pretrained("x2plus1d_*")} == set(presets.WEIGHTS)
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_is_what_its_name_says(name):
    said = NAME.fullmatch(name)
    model = meta(name)
    width, depth, heads = WIDTHS[said["size"]]
    depth, extra = int(said["layers"] or depth), int(said["extra"] or 0)
    side = int(said["resolution"]) // int(said["patch"])
    assert int(said["resolution"]) % int(said["patch"]) == 0
    assert (model.embed_dim, model.blocks[0].attn.num_heads, len(model.blocks)) == (width, heads, depth + extra)
    assert model.blocks[0].mlp.fc1.out_features == 4 * width
    assert model.patch_embed.grid_size == (side, side)
    assert model.pos_embed.shape == (1, side**2, width)
    assert model.cls_token is None
    assert model.global_pool == "avg"
    norm, none = (model.fc_norm, model.norm) if said["size"] == "micro" else (model.norm, model.fc_norm)
    assert (norm.eps, type(none)) == (1e-6, torch.nn.Identity)
    assert model.pretrained_cfg["input_size"] == (3, *model.patch_embed.img_size)
    spec = tokenlearner.insertion_of(model)
    if said["tokens"]:
        assert (spec.num_tokens, spec.at, spec.kind) == (int(said["tokens"]), int(said["at"]), said["kind"] or "conv")
        assert (spec.fuser, spec.extra_layers, spec.host_depth) == (said["fuser"], extra, depth)
    else:
        assert spec is None
        pools = "_".join(f"{side}at{at}" for at, side in getattr(model, "pooling", ()))
        assert pools == (said["pooling"] or "")


@pytest.mark.parametrize("name", SHRUNKEN)
def test_it_runs_trains_saves_and_loads(name, tmp_path):
    model = shrunken(name)
    x = images(model)
    model(x).square().sum().backward()
    unused = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {key for key in unused if not key.endswith("qkv.bias")} == set()

    folder = tokenlearner.save(model, tmp_path / "model")
    loaded = tokenlearner.load(folder)

    assert torch.equal(loaded(x), model(x))
    assert tokenlearner.insertion_of(loaded) == tokenlearner.insertion_of(model)
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    assert loaded.preprocessing.input_size == tuple(x.shape[1:])
    assert "tokenlearner_" not in (folder / "config.json").read_text()  # the bare host is described


# --- what is passed on


def test_keywords_reach_the_host_and_the_learner():
    model = shrunken(
        "tokenlearner_b16_384_8at6",
        num_classes=7,
        img_size=(32, 64),
        in_chans=1,
        drop_path_rate=0.3,
        drop_rate=0.2,
        act_layer="gelu_tanh",
        kind="mlp",
        hidden_dim=5,
        dropout=0.1,
    )
    assert model(torch.randn(2, 1, 32, 64)).shape == (2, 7)
    assert model.patch_embed.grid_size == (2, 4)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.head_drop.p == 0.2
    assert type(model.blocks[0].mlp.act).__name__ == "GELUTanh"
    learner = tokenlearner.learners(model)[6]
    assert (learner.kind, learner.alpha.fc1.out_features, learner.alpha.drop.p) == ("mlp", 5, 0.1)
    assert tokenlearner.learners(shrunken("tokenlearner_b16_384_8at6", pool="mean"))[6].pool == "mean"


def test_presets_compute_what_insert_does():
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "num_heads": 2, "depth": 12, "num_classes": 3}
    host = VisionTransformer(**options, class_token=False, global_pool="avg", fc_norm=False).eval()
    expected = tokenlearner.insert(host, 8, 6, "conv", "fuser")
    model = shrunken("tokenlearner_b16_384_8at6_fuser", img_size=32)
    expected.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(model(x), expected(x))


@pytest.mark.parametrize("name", ["tokenlearner_b16_384_plain", "tokenlearner_l16_512_pool4at12"])
def test_a_baseline_has_nothing_to_set(name):
    with pytest.raises(tokenlearner.InputError, match="has no TokenLearner, so there is nothing for kind, pool to set"):
        timm.create_model(name, kind="mlp", pool="softmax")


def test_the_generic_model_is_insert_on_any_host(tmp_path):
    options = {"num_classes": 3, "img_size": 48, "embed_dim": 16, "num_heads": 2, "depth": 4}
    model = timm.create_model(
        "tokenlearner_vit",
        host="vit_base_patch16_224",
        tokens=4,
        at=0.75,
        kind="gate",
        fuser="reproject",
        extra_layers=2,
        pool="sum",
        **options,
    )
    shake(model.eval())
    spec = tokenlearner.insertion_of(model)
    assert (spec.num_tokens, spec.at, spec.kind, spec.fuser) == (4, 3, "gate", "reproject")
    assert (spec.extra_layers, spec.pool, spec.host_depth) == (2, "sum", 4)
    host = timm.create_model("vit_base_patch16_224", **options).eval()
    expected = tokenlearner.insert(host, 4, 3, "gate", "reproject", 2, pool="sum")
    expected.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(model(x), expected(x))

    folder = tokenlearner.save(model, tmp_path / "model")
    assert '"vit_base_patch16_224"' in (folder / "config.json").read_text()
    assert torch.equal(tokenlearner.load(folder)(x), model(x))


def test_the_generic_model_takes_its_hosts_preprocessing_and_no_weights():
    cfg = meta("tokenlearner_vit", host="deit_tiny_patch16_224").pretrained_cfg
    assert cfg["mean"] == timm.get_pretrained_cfg("deit_tiny_patch16_224").mean == (0.485, 0.456, 0.406)
    assert cfg["architecture"] == "tokenlearner_vit"
    assert not {"url", "file", "hf_hub_id", "tag"} & cfg.keys()
    assert timm.get_pretrained_cfg("deit_tiny_patch16_224").hf_hub_id  # the host's own is as it was


@pytest.mark.parametrize("host", [None, "no_such_vit", "tokenlearner_b16_384_8at6", 3])
def test_the_generic_model_needs_a_host(host):
    with pytest.raises(tokenlearner.InputError, match="takes a ViT of timm as in host='vit_base_patch16_224', not"):
        timm.create_model("tokenlearner_vit", host=host)


def test_the_generic_model_refuses_other_architectures():
    with torch.device("meta"), pytest.raises(TypeError, match="ResNet is none"):
        timm.create_model("tokenlearner_vit", host="resnet10t")


def test_features_only():
    model = timm.create_model(
        "tokenlearner_b16_384_8at6", features_only=True, out_indices=(1, 4), embed_dim=16, num_heads=2, img_size=64
    )
    assert [f.shape for f in model(torch.randn(1, 3, 64, 64))] == [(1, 16, 4, 4)] * 2


# --- weights


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if not any(w.startswith(f"{name}.") for w in presets.WEIGHTS)]
)
def test_weights_nobody_has_are_refused(name):
    with pytest.raises(tokenlearner.InputError, match=f"nobody has published weights for {name}: "):
        timm.create_model(name, pretrained=True)


def test_the_hosts_weights_are_not_taken_for_the_models():
    with pytest.raises(tokenlearner.InputError, match="nobody has published weights for tokenlearner_vit: "):
        timm.create_model("tokenlearner_vit", pretrained=True, host="vit_tiny_patch16_224.augreg_in21k_ft_in1k")


@contextlib.contextmanager
def registered(name, preset, weights):
    """Adds a preset as ``presets.py`` would, and takes it away again."""
    vit.default_cfgs.update(default_cfgs_of({name: vit.preset_cfg(preset)}, weights))
    registry.register_model(vit.preset_entry(preset))
    try:
        yield
    finally:
        registry._clear_model_entries(name)
        del registry._model_entrypoints[name], vit.default_cfgs[name]
        vit.__all__.remove(name)


@pytest.fixture
def with_weights(tmp_path, monkeypatch):
    """A tiny model whose weights are a file with the tag ``.cifar10``; gives its name and the trained model."""
    from safetensors.torch import save_file

    monkeypatch.setitem(presets.SIZES, "t", presets.Size(width=16, layers=4, heads=2))
    preset = Preset("t", 8, 32, tokens=4, at=2, kind="mlp")
    assert preset.name == "tokenlearner_t8_32_4at2_mlp"
    path = tmp_path / "weights.safetensors"
    entry = {"file": str(path), "num_classes": 3, "label_names": ("cat", "dog", "car"), "mean": (0.49, 0.48, 0.44)}
    with registered(preset.name, preset, {f"{preset.name}.cifar10": entry}):
        trained = timm.create_model(preset.name)
        shake(trained.half().float().eval())
        save_file({key: value.half() for key, value in trained.state_dict().items()}, path)
        trained.load_state_dict({key: value.half() for key, value in trained.state_dict().items()})
        yield preset.name, trained


def test_weights_of_a_local_file(with_weights):
    name, trained = with_weights
    x = images(trained)
    assert timm.list_pretrained("tokenlearner_t*") == [f"{name}.cifar10"]
    for given in (name, f"{name}.cifar10"):
        model = timm.create_model(given, pretrained=True).eval()
        assert torch.equal(model(x), trained(x))
        assert model.label_names == ("cat", "dog", "car")
        assert tokenlearner.Preprocessing.of(model).mean == (0.49, 0.48, 0.44)
        assert model.pretrained_cfg["tag"] == "cifar10"


def test_weights_of_a_local_file_with_a_new_head_and_another_size(with_weights):
    name, trained = with_weights
    model = timm.create_model(name, pretrained=True, num_classes=5, img_size=(32, 48))
    assert model.head.out_features == 5
    assert not hasattr(model, "label_names")
    for key, value in model.state_dict().items():
        if key not in ("pos_embed", "head.weight", "head.bias"):
            assert torch.equal(value, trained.state_dict()[key])
    expected = timm.layers.resample_abs_pos_embed(trained.pos_embed.half(), [4, 6], [4, 4], num_prefix_tokens=0).float()
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize(
    "options", [{"kind": "conv"}, {"kind": "conv", "num_classes": 5}, {"depth": 5, "num_classes": 5}]
)
def test_weights_of_another_model_are_refused(options, with_weights):
    with pytest.raises(
        tokenlearner.InputError, match="the weights are of another model: only one of the two has blocks"
    ):
        timm.create_model(with_weights[0], pretrained=True, **options)


def test_a_file_that_is_gone_is_named(with_weights, tmp_path):
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(tokenlearner.InputError, match=r"not where they should be, at .*weights\.safetensors"):
        timm.create_model(with_weights[0], pretrained=True)


def test_a_wrong_tag_is_refused(with_weights):
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model(f"{with_weights[0]}.imagenet")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("tokenlearner_b16_384_8at6.in1k", pretrained=True)


def test_timms_own_folders_give_the_model_back(tmp_path):
    """timm's export records the name and its arguments, so with ours registered the insertion is not lost."""
    model = shrunken("tokenlearner_b16_384_8at6", kind="mlp")
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(model)
    assert tokenlearner.insertion_of(loaded) == tokenlearner.insertion_of(model)
    assert torch.equal(loaded(x), model(x))
