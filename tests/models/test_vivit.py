"""ViViT: against timm's image ViT where a clip is one frame, against loops and closed forms where it is more."""

import math
import re

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import tokenlearner
from insertion.clips import clips, tiny_vivit
from insertion.hosts import TINY, images, shake, tiny
from tokenlearner.models import VIDEO_PRESETS, ViViT, presets

ONE_FRAME = {"num_frames": 1, "tubelet_size": 1}
PREFIXES = {
    "mean": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "fc_norm": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "class token": {"class_token": True, "global_pool": "token"},
    "mean beside a class token": {"class_token": True, "global_pool": "avg", "fc_norm": False},
    "registers": {"class_token": True, "global_pool": "token", "reg_tokens": 2, "no_embed_class": True},
    "no positions": {"class_token": True, "global_pool": "token", "pos_embed": "none"},
    "map": {"class_token": False, "global_pool": "map", "pre_norm": True},
}

NAME = re.compile(
    r"tokenlearner_vivit_(?P<size>[lh]|micro)(?P<patch>\d+)_(?P<resolution>\d+)_(plain|(?P<tokens>\d+)at(?P<at>\d+))"
    r"(_(?P<kind>mlp))?(_(?P<fuser>fuser))?"
)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES)
def test_a_clip_of_one_frame_is_an_image(options, dynamic):
    host = tiny(**options, dynamic_img_size=dynamic)
    model = tiny(ViViT, **{**ONE_FRAME, **options}, dynamic_img_size=dynamic)
    state = host.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    model.load_state_dict(state)
    for size in [(32, 32), (16, 40)] if dynamic else [(32, 32)]:
        x = images(*size)
        assert_close(model.forward_features(x.unsqueeze(2)), host.forward_features(x))
        assert_close(model(x.unsqueeze(2)), host(x))


def test_tubelets_are_embedded_slice_by_slice_row_by_row():
    model, x = tiny_vivit(patch_size=(8, 16)), clips()
    assert model.patch_embed.grid_size == (3, 2, 2)
    proj, expected = model.patch_embed.proj, []
    for t in range(3):
        for i in range(2):
            for j in range(2):
                tubelet = x[:, :, 2 * t : 2 * t + 2, 8 * i : 8 * i + 8, 16 * j : 16 * j + 16]
                expected.append(torch.einsum("bcthw,dcthw->bd", tubelet, proj.weight) + proj.bias)
    assert_close(model.patch_embed(x), torch.stack(expected, dim=1))


def test_every_token_has_its_position():
    model = tiny_vivit(class_token=True)
    embedded = torch.randn(2, 24, 32)
    found = model._pos_embed(embedded)
    assert torch.equal(found[:, 1:], embedded + model.pos_embed[:, 1:])
    assert torch.equal(found[:, 0], (model.cls_token + model.pos_embed[:, :1]).expand(2, -1, -1)[:, 0])


def test_pooling():
    model, x = tiny_vivit(), clips()
    features = model.forward_features(x)
    assert isinstance(model.fc_norm, torch.nn.Identity)
    assert_close(features, model.norm(model.blocks(model._pos_embed(model.patch_embed(x)))))
    assert_close(model(x), model.head(features.mean(dim=1)))
    model = tiny_vivit(class_token=True)
    assert model.global_pool == "token"
    assert_close(model(x), model.head(model.forward_features(x)[:, 0]))


def test_every_token_sees_every_slice():
    """Joint attention: the factorised forms would need several layers for it, or never."""
    model, x = tiny_vivit(depth=1), clips().requires_grad_()
    for token in (0, 23):
        (gradient,) = torch.autograd.grad(model.forward_features(x)[0, token].square().sum(), x)
        assert (gradient[0].abs().amax(dim=(0, 2, 3)) > 0).all()


# --- position embeddings of other sizes


def test_positions_over_space_as_in_timm():
    model = tiny_vivit(class_token=True)
    before = model.pos_embed.clone()
    model.set_input_size(img_size=(32, 24))
    assert model.patch_embed.grid_size == (3, 4, 3)
    assert torch.equal(model.pos_embed[:, :1], before[:, :1])
    for old, new in zip(before[:, 1:].chunk(3, dim=1), model.pos_embed[:, 1:].chunk(3, dim=1)):
        assert_close(new, resample_abs_pos_embed(old, [4, 3], [2, 4], num_prefix_tokens=0))
    assert model(clips(6, 32, 24)).isfinite().all()


def test_positions_over_time_on_a_straight_line():
    model = tiny_vivit(num_frames=4)
    first, last = (p.clone() for p in model.pos_embed.chunk(2, dim=1))
    model.set_input_size(num_frames=8)
    expected = [first, 0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last, last]  # slices have widths
    assert_close(model.pos_embed, torch.cat(expected, dim=1))
    assert (model.num_frames, model.img_size) == (8, (16, 32))


def test_positions_that_are_equal_in_all_slices_stay_so():
    model = tiny_vivit()
    with torch.no_grad():
        model.pos_embed.copy_(model.pos_embed[:, :8].repeat(1, 3, 1))
    frame = model.pos_embed[:, :8].clone()
    model.set_input_size(num_frames=10)
    assert_close(model.pos_embed, frame.repeat(1, 5, 1))


@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"reg_tokens": 1, "no_embed_class": True}])
def test_dynamic_sizes_are_those_set(options):
    dynamic, x = tiny_vivit(dynamic_img_size=True, **options), clips(4, 24, 24)
    fixed = tiny_vivit(**options)
    fixed.load_state_dict(dynamic.state_dict())
    assert torch.equal(dynamic(clips().zero_()), fixed(clips().zero_()))
    fixed.set_input_size((24, 24), num_frames=4)
    assert_close(dynamic(x), fixed(x))


def test_a_size_set_is_one_that_trains_and_saves(tmp_path):
    model = tiny_vivit()
    model.pos_embed.requires_grad_(False)
    model.set_input_size(img_size=24, num_frames=2)
    assert (model.pos_embed.requires_grad, model.pos_embed.is_leaf) == (False, True)
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path))
    assert loaded.patch_embed.grid_size == (1, 3, 3)
    x = clips(2, 24, 24)
    assert torch.equal(loaded(x), model(x))


# --- what training, cost and saving use


def test_groups_and_layer_decay_are_those_of_an_image_vit():
    image, video = (
        tokenlearner.insert(tiny(kind, class_token=False, global_pool="avg", fc_norm=False), 8, 2)
        for kind in (VisionTransformer, ViViT)
    )
    groups = [
        {
            name: (group["lr_scale"], group["weight_decay"])
            for group in tokenlearner.param_groups(model, layer_decay=0.5)
            for name in group["param_names"]
        }
        for model in (image, video)
    ]
    assert groups[0] == groups[1]
    assert groups[1]["blocks.2.token_learner.alpha.fc1.weight"] == (1.0, 0.05)
    assert groups[1]["patch_embed.proj.weight"] == (0.5**5, 0.05)
    assert groups[1]["pos_embed"] == (0.5**5, 0.0)


def test_a_new_head():
    model, x = tiny_vivit(), clips()
    model.reset_classifier(7)
    assert (model.num_classes, model(x).shape) == (7, (2, 7))
    model.reset_classifier(0)
    assert_close(model(x), model.forward_features(x).mean(dim=1))


def test_intermediates():
    model, x = tiny_vivit(class_token=True), clips()
    outs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outs.append(out))
    last, found = model.forward_intermediates(x, [0, 2], return_prefix_tokens=True)
    assert_close(last, model.norm(outs[3]))
    for i, (grid, prefix) in zip((0, 2), found):
        assert_close(grid, outs[i][:, 1:].transpose(1, 2).unflatten(2, (3, 2, 4)))
        assert_close(prefix, outs[i][:, :1])
    outs.clear()
    (flat,) = model.forward_intermediates(x, [1], norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True)
    assert len(outs) == 2
    assert_close(flat, model.norm(outs[1])[:, 1:])
    assert_close(model.get_intermediate_layers(x, [1], norm=True)[0], flat)
    model.set_grad_checkpointing()
    assert_close(model.train().forward_intermediates(x, 1)[0], last)


SAVED = {
    "default": {},
    "class token": {"class_token": True, "fc_norm": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "dynamic_img_size": True},
    "shapes": {"patch_size": (8, 16), "num_frames": 9, "tubelet_size": 3, "in_chans": 1, "mlp_ratio": 2.7},
    "LayerScale, norm of the embedding": {"init_values": 0.1, "pre_norm": True, "embed_norm_layer": torch.nn.LayerNorm},
}


@pytest.mark.parametrize("options", SAVED.values(), ids=SAVED)
def test_saved_and_loaded(options, tmp_path):
    model = tiny_vivit(**options)
    x = torch.randn(2, model.in_chans, model.num_frames, *model.img_size)
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)


# --- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"img_size": 36}, "clips of 6×36×36 .* don't divide into tubelets of 2×8×8"),
        ({"num_frames": 5}, "clips of 5×16×32 .* don't divide into tubelets of 2×8×8"),
        ({"num_frames": 0}, "clips of 0×16×32"),
        ({"tubelet_size": 0}, r"a tubelet of 0×8×8 \(frames, height, width\) is none"),
        ({"global_pool": "token"}, "global_pool='token' needs class_token=True"),
        ({"dynamic_img_pad": True}, "clips are not padded"),
        ({"embed_layer": torch.nn.Conv3d}, "no embed_layer to choose"),
    ],
)
def test_models_that_cannot_be(options, sentence):
    with pytest.raises(tokenlearner.InputError, match=sentence):
        tiny_vivit(**options)


@pytest.mark.parametrize(
    ("dynamic", "shape", "sentence"),
    [
        (False, (2, 3, 16, 32), r"takes clips as \(b, c, t, h, w\), and got shape \(2, 3, 16, 32\)"),
        (False, (2, 6, 3, 16, 32), r"takes 3 channels, and got shape \(2, 6, 3, 16, 32\)"),
        (False, (2, 3, 4, 16, 32), r"takes clips of 6×16×32 .*, and got 4×16×32; set_input_size\(\) or dynamic"),
        (True, (2, 3, 5, 16, 32), "clips of 5×16×32 .* don't divide into tubelets of 2×8×8"),
        (True, (2, 3, 6, 16, 30), "clips of 6×16×30"),
    ],
)
def test_clips_that_do_not_fit(dynamic, shape, sentence):
    with pytest.raises(tokenlearner.InputError, match=sentence) as caught:
        tiny_vivit(dynamic_img_size=dynamic)(torch.randn(shape))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_set_changes_nothing():
    model, x = tiny_vivit(), clips()
    before = model(x)
    with pytest.raises(tokenlearner.InputError, match="patch_size stays 8×8"):
        model.set_input_size(patch_size=(4, 4))
    with pytest.raises(tokenlearner.InputError, match="clips of 7×16×32"):
        model.set_input_size(num_frames=7)
    model.set_input_size(patch_size=(8, 8))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "options", [{"output_fmt": "NHWC"}, {"output_dict": True}, {"is_causal": True}, {"attn_mask": torch.ones(1)}]
)
def test_intermediates_that_are_not_there(options):
    with pytest.raises(tokenlearner.InputError, match="output_"):
        tiny_vivit().forward_intermediates(clips(), **{"output_fmt": "NLC", **options})


# --- presets


def shrunken(name, **options):
    """The model at a sixteenth of its width on 2 slices of 3×3 tubelets, every parameter random."""
    size = {"img_size": 3 * VIDEO_PRESETS[name].patch, "num_frames": 4}
    model = timm.create_model(name, **{"embed_dim": 32, "num_heads": 2, "num_classes": 3, **size, **options})
    shake(*model.parameters())
    return model.eval()


def of(model):
    return torch.randn(2, 3, model.num_frames, *model.img_size)


@pytest.mark.parametrize("name", VIDEO_PRESETS)
def test_a_model_is_what_its_name_says(name):
    said = NAME.fullmatch(name)
    with torch.device("meta"):
        model = timm.create_model(name, weight_init="skip")
    width, depth, heads = {"l": (1024, 24, 16), "h": (1280, 32, 16), "micro": (128, 4, 4)}[said["size"]]
    frames, norm, none = (32, model.norm, model.fc_norm)
    if said["size"] == "micro":
        frames, norm, none = (16, model.fc_norm, model.norm)
    assert VIDEO_PRESETS[name].name == name
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (width, depth, heads)
    assert model.blocks[0].mlp.fc1.out_features == 4 * width
    patch, side = int(said["patch"]), int(said["resolution"])
    assert side % patch == 0
    assert model.patch_embed.proj.weight.shape == (width, 3, 2, patch, patch)
    assert model.patch_embed.grid_size == (frames // 2, side // patch, side // patch)
    assert model.pos_embed.shape == (1, frames // 2 * (side // patch) ** 2, width)
    assert (model.num_frames, model.num_classes, model.global_pool) == (frames, 400, "avg")
    assert model.cls_token is None
    assert (norm.eps, type(none)) == (1e-6, torch.nn.Identity)
    spec = tokenlearner.insertion_of(model)
    if said["tokens"]:
        assert (spec.num_tokens, spec.at) == (int(said["tokens"]), int(said["at"]))
        assert (spec.fuser, spec.kind, spec.mix) == (said["fuser"], said["kind"] or "conv", "slice")
    else:
        assert spec is None


@pytest.mark.parametrize("name", ["l16_320_plain", "l16_224_8at18", "l10_220_16at18_fuser"])
def test_it_runs_trains_saves_and_loads(name, tmp_path):
    model = shrunken(f"tokenlearner_vivit_{name}")
    x = of(model)
    model(x).square().sum().backward()
    unused = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {key for key in unused if not key.endswith("qkv.bias")} == set()
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    assert loaded.preprocessing.input_size == (3, *model.img_size)


def test_keywords_reach_the_host_the_learner_and_the_fuser():
    model = shrunken("tokenlearner_vivit_l10_220_16at18_fuser", num_frames=6, tubelet_size=3, kind="mlp", mix="clip")
    assert model.patch_embed.grid_size == (2, 3, 3)
    assert tokenlearner.learners(model)[18].kind == "mlp"
    assert model.blocks[18].token_fuser.num_frames == 2
    assert model(of(model)).isfinite().all()
    with pytest.raises(tokenlearner.InputError, match="has no TokenLearner, so there is nothing for mix to set"):
        shrunken("tokenlearner_vivit_l16_224_plain", mix="clip")


def test_features_only():
    name = "tokenlearner_vivit_l16_224_8at18"
    model = timm.create_model(
        name, features_only=True, out_indices=(1, 4), embed_dim=16, num_heads=2, img_size=32, num_frames=4
    )
    assert [f.shape for f in model(torch.randn(1, 3, 4, 32, 32))] == [(1, 16, 2, 2, 2)] * 2


@pytest.mark.parametrize(
    "name", [name for name in VIDEO_PRESETS if not any(w.startswith(f"{name}.") for w in presets.WEIGHTS)]
)
def test_weights_nobody_has_are_refused(name):
    with pytest.raises(tokenlearner.InputError, match=rf"weights for {name}: .* put .*models\.inflate\(model"):
        timm.create_model(name, pretrained=True)


def test_starting_weights_are_drawn_for_the_tubelets_too():
    """An embedding nobody draws would be what memory held; PyTorch's convolutions start between ±1/√fan-in."""
    model = ViViT(**{**TINY, "num_frames": 4})
    bound = 1 / math.sqrt(3 * 2 * 8 * 8)
    weight = model.patch_embed.proj.weight.detach()
    assert bound * 0.9 < weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert model.pos_embed.detach().std() == pytest.approx(0.02, rel=0.1)
