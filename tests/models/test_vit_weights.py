"""A plain ViT's weights in a model with a TokenLearner, and back."""

import copy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

import tokenlearner
from tokenlearner.models import load_vit_weights

TINY = {"patch_size": 16, "embed_dim": 16, "num_heads": 2, "num_classes": 5}


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def plain(img_size=64, depth=12, **options):
    return shaken(VisionTransformer(img_size=img_size, depth=depth, **{**TINY, **options}))


def gap(**options):
    return plain(class_token=False, global_pool="avg", fc_norm=False, **options)


def preset(name="b16_384_8at6", img_size=64, **options):
    return shaken(timm.create_model(f"tokenlearner_{name}", img_size=img_size, **{**TINY, **options}))


def learner_keys(model):
    return tuple(key for key in model.state_dict() if "token_learner" in key)


def test_a_vit_without_class_token_needs_no_help():
    source, target = gap(), preset("b16_384_plain")
    images = torch.randn(2, 3, 64, 64)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(images), source(images))
    source.load_state_dict(shaken(target).state_dict())
    assert torch.equal(source(images), target(images))


def test_into_a_preset_and_back():
    source, target, images = gap(), preset(), torch.randn(2, 3, 64, 64)
    learner = copy.deepcopy(target.blocks[6].token_learner)
    assert load_vit_weights(target, source.state_dict()) == (learner_keys(target), ())

    expected = tokenlearner.insert(copy.deepcopy(source), 8, 6, "conv")
    expected.blocks[6].token_learner.load_state_dict(learner.state_dict())
    assert torch.equal(target(images), expected(images))

    other = gap()
    assert load_vit_weights(other, target.state_dict()) == ((), learner_keys(target))
    assert torch.equal(other(images), source(images))


def test_a_class_token_and_another_size():
    source, target = plain(96), preset()
    left_out = load_vit_weights(target, source.state_dict())
    assert left_out.unused == ("cls_token",)
    assert left_out.kept == learner_keys(target)
    for key, value in source.state_dict().items():
        if key not in ("cls_token", "pos_embed"):
            assert torch.equal(target.state_dict()[key], value)
    expected = resample_abs_pos_embed(source.pos_embed[:, 1:], [4, 4], [6, 6], num_prefix_tokens=0)
    assert torch.equal(target.pos_embed, expected)


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_back_into_a_vit_with_class_token(no_embed_class):
    source, target = preset(), plain(96, no_embed_class=no_embed_class)
    own = copy.deepcopy(target)
    left_out = load_vit_weights(target, source.state_dict())
    assert left_out == (("cls_token",), learner_keys(source))
    assert torch.equal(target.cls_token, own.cls_token)
    entries = 0 if no_embed_class else 1
    assert torch.equal(target.pos_embed[:, :entries], own.pos_embed[:, :entries])
    expected = resample_abs_pos_embed(source.pos_embed, [6, 6], [4, 4], num_prefix_tokens=0)
    assert torch.equal(target.pos_embed[:, entries:], expected)
    assert torch.equal(target.blocks[11].mlp.fc2.weight, source.blocks[11].mlp.fc2.weight)


def test_both_ways_is_the_identity():
    source = plain()
    middle, end = preset(), plain()
    end.cls_token, end.pos_embed = copy.deepcopy(source.cls_token), copy.deepcopy(source.pos_embed)
    load_vit_weights(middle, source.state_dict())
    load_vit_weights(end, middle.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(end(images), source(images))


def test_position_embeddings_without_an_entry_for_the_class_token():
    source, target = plain(no_embed_class=True), preset()
    load_vit_weights(target, source.state_dict())
    assert torch.equal(target.pos_embed, source.pos_embed)


def test_norm_and_fc_norm_stand_for_each_other():
    source, target = plain(class_token=False, global_pool="avg"), preset()
    assert load_vit_weights(target, source.state_dict()).unused == ()
    assert torch.equal(target.norm.weight, source.fc_norm.weight)
    back = plain(class_token=False, global_pool="avg")
    load_vit_weights(back, target.state_dict())
    assert torch.equal(back.fc_norm.bias, source.fc_norm.bias)


def test_a_head_for_other_classes_is_left_out():
    target = preset(num_classes=7)
    own = target.head.weight.clone()
    left_out = load_vit_weights(target, gap().state_dict())
    assert left_out.unused == ("head.weight", "head.bias")
    assert {"head.weight", "head.bias"} < set(left_out.kept)
    assert torch.equal(target.head.weight, own)
    assert load_vit_weights(preset(num_classes=0), gap().state_dict()).unused == ("head.weight", "head.bias")


def test_extra_layers_stay_the_identity():
    source = gap(depth=24)
    target = timm.create_model("tokenlearner_l16_512_8at18_plus6", img_size=64, **TINY).eval()
    kept = load_vit_weights(target, source.state_dict()).kept
    assert {name.split(".")[1] for name in kept if "token_learner" not in name} == {str(i) for i in range(24, 30)}
    expected = tokenlearner.insert(copy.deepcopy(source), 8, 18, "conv")
    expected.blocks[18].token_learner.load_state_dict(target.blocks[18].token_learner.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(target(images), expected(images))


def test_a_grid_that_is_not_square_is_never_guessed():
    source, target = gap(img_size=(144, 256)), preset(img_size=(144, 256))  # 9×16 patches, as many as 12×12
    with pytest.raises(tokenlearner.InputError, match="144 positions can be a grid of 12×12 or of 9×16; give grid"):
        load_vit_weights(target, source.state_dict())
    load_vit_weights(target, source.state_dict(), grid=(9, 16))
    assert torch.equal(target.pos_embed, source.pos_embed)
    load_vit_weights(target, source.state_dict(), grid=(12, 12))
    assert torch.equal(target.pos_embed, resample_abs_pos_embed(source.pos_embed, [9, 16], [12, 12], 0))

    wide = gap(img_size=(32, 80))
    load_vit_weights(preset(img_size=(32, 80)), wide.state_dict())
    with pytest.raises(tokenlearner.InputError, match="10 entries, which make no square: give grid"):
        load_vit_weights(preset(), wide.state_dict())
    with pytest.raises(tokenlearner.InputError, match=r"10 entries, and grid=\(2, 4\) is not"):
        load_vit_weights(preset(), wide.state_dict(), grid=(2, 4))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"depth": 11}, r"they lack blocks.11.attn.proj.bias, .* and 9 more"),
        ({"depth": 13}, r"the model has no blocks.12.attn.proj.bias"),
        ({"init_values": 0.1}, r"the model has no blocks.0.ls1.gamma"),
        ({"reg_tokens": 2}, r"the model has no reg_token"),
        ({"patch_size": 8, "img_size": 32}, r"patch_embed.proj.weight is \(16, 3, 8, 8\) there and \(16, 3, 16, 16\)"),
        ({"embed_dim": 32}, r"is \(.*32.*\) there"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(source, message):
    target = preset()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(tokenlearner.InputError, match=message):
        load_vit_weights(target, gap(**source).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
