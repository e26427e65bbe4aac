"""Image weights in a ViViT: a still clip must be to it what the frame is to the image model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch.testing import assert_close

import tokenlearner
from insertion.clips import clips, tiny_vivit
from insertion.hosts import images, tiny
from tokenlearner.models import inflate, load_vit_weights

MODES = ["central", "average"]


def image_vit(img_size=(16, 32), **options):
    return tiny(**{"img_size": img_size, "class_token": False, "global_pool": "avg", "fc_norm": False, **options})


def still(x, frames=6):
    return x.unsqueeze(2).repeat(1, 1, frames, 1, 1)


@pytest.mark.parametrize("tubelet", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_tubelets_of_equal_frames_are_embedded_as_the_frame(mode, tubelet):
    source, target, x = image_vit(), tiny_vivit(tubelet_size=tubelet), images(16, 32)
    assert inflate(target, source.state_dict(), mode) == ((), ())
    found, expected = target.patch_embed(still(x)), source.patch_embed(x)
    assert_close(found, expected.repeat(1, 6 // tubelet, 1))


@pytest.mark.parametrize("mode", MODES)
def test_larger_patches_of_the_same_picture_are_embedded_alike(mode):
    """Every patch enlarged by itself, as the kernel is: FlexiViT's rule, exact when a patch grows."""
    source, target, x = image_vit(), tiny_vivit(img_size=(32, 64), patch_size=16, tubelet_size=2), images(16, 32)
    inflate(target, source.state_dict(), mode)
    patches = F.unfold(x, 8, stride=8)  # (b, c·8·8, n)
    b, _, n = patches.shape
    small = patches.transpose(1, 2).reshape(b * n, 3, 8, 8)
    large = F.interpolate(small, size=(16, 16), mode="bicubic", antialias=True).reshape(b, n, -1).transpose(1, 2)
    found = target.patch_embed(still(F.fold(large, (32, 64), 16, stride=16)))
    assert_close(found, source.patch_embed(x).repeat(1, 3, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_tubelets_of_other_frames(mode):
    """The middle one of three, or their mean."""
    source, target, x = image_vit(), tiny_vivit(tubelet_size=3), clips()
    inflate(target, source.state_dict(), mode)
    for t, found in enumerate(target.patch_embed(x).chunk(2, dim=1)):
        frames = x[:, :, 3 * t : 3 * t + 3]
        frame = frames[:, :, 1] if mode == "central" else frames.mean(dim=2)
        assert_close(found, source.patch_embed(frame), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [None, 0, 2])
def test_a_still_clip_gives_what_the_frame_gives(at, mode):
    """Attention over several copies of the same tokens is attention over one, so the two models agree throughout."""
    source, target, x = image_vit(), tiny_vivit(), images(16, 32)
    if at is not None:
        for model in (source, target):
            tokenlearner.insert(model, 5, at, fuser="fuser" if at else None)
    assert inflate(target, source.state_dict(), mode) == ((), ())
    assert_close(target(still(x)), source(x))
    x = clips()
    assert not torch.allclose(target(x), target(still(x[:, :, 0])), atol=1e-2)


def test_central_is_the_default():
    source, one, other = image_vit(), tiny_vivit(), tiny_vivit()
    inflate(one, source.state_dict())
    inflate(other, source.state_dict(), "central")
    assert torch.equal(one.patch_embed.proj.weight, other.patch_embed.proj.weight)
    assert torch.equal(one.patch_embed.proj.weight[:, :, 1], source.patch_embed.proj.weight)
    assert not one.patch_embed.proj.weight[:, :, 0].any()


@pytest.mark.parametrize("frames", [2, 10])
def test_positions_are_repeated_over_time_and_interpolated_over_space(frames):
    source, target = image_vit((32, 32)), tiny_vivit(img_size=(48, 24), num_frames=frames)
    inflate(target, source.state_dict())
    expected = resample_abs_pos_embed(source.pos_embed, [6, 3], [4, 4], num_prefix_tokens=0)
    assert_close(target.pos_embed, expected.repeat(1, frames // 2, 1))


def test_a_class_token_of_the_image_model_alone():
    source, target = image_vit(class_token=True), tiny_vivit()
    assert inflate(target, source.state_dict()).unused == ("cls_token",)
    assert torch.equal(target.pos_embed, source.pos_embed[:, 1:].repeat(1, 3, 1))


def test_a_class_token_of_the_video_model_alone():
    source, target = image_vit(), tiny_vivit(class_token=True)
    own = copy.deepcopy(target)
    assert inflate(target, source.state_dict()).kept == ("cls_token",)
    assert torch.equal(target.cls_token, own.cls_token)
    assert torch.equal(target.pos_embed[:, :1], own.pos_embed[:, :1])
    assert torch.equal(target.pos_embed[:, 1:], source.pos_embed.repeat(1, 3, 1))


@pytest.mark.parametrize("no_embed_class", [False, True])
def test_a_class_token_of_both(no_embed_class):
    source = image_vit(class_token=True, global_pool="token", no_embed_class=no_embed_class)
    target = tiny_vivit(class_token=True, no_embed_class=no_embed_class)
    assert inflate(target, source.state_dict()) == ((), ())
    assert torch.equal(target.cls_token, source.cls_token)
    entries = 0 if no_embed_class else 1
    assert torch.equal(target.pos_embed[:, :entries], source.pos_embed[:, :entries])
    assert torch.equal(target.pos_embed[:, entries:], source.pos_embed[:, entries:].repeat(1, 3, 1))


def test_registers():
    options = {"reg_tokens": 2, "class_token": True, "global_pool": "token"}
    source, target = image_vit(**options), tiny_vivit(**options)
    assert inflate(target, source.state_dict()) == ((), ())
    assert torch.equal(target.pos_embed[:, :3], source.pos_embed[:, :3])
    assert torch.equal(target.pos_embed[:, 3:], source.pos_embed[:, 3:].repeat(1, 3, 1))


def test_a_head_for_other_classes_and_what_was_inserted_are_left_as_they_are():
    source, target = image_vit(num_classes=9), tokenlearner.insert(tiny_vivit(), 3)
    own = copy.deepcopy(target.state_dict())
    left_out = inflate(target, source.state_dict())
    assert left_out.unused == ("head.weight", "head.bias")
    assert set(left_out.kept) == {key for key in own if key.startswith("head.") or "token_learner" in key}
    assert all(torch.equal(target.state_dict()[key], own[key]) for key in left_out.kept)
    x = images(16, 32)
    tokenlearner.remove(target).reset_classifier(0)
    source.reset_classifier(0)
    assert_close(target(still(x)), source(x))


def test_a_grid_that_is_not_square_is_never_guessed():
    source, target = image_vit((8, 128)), tiny_vivit(img_size=(8, 128))  # 1×16 patches, as many as 4×4
    with pytest.raises(tokenlearner.InputError, match="16 positions can be a grid of 4×4 or of 1×16; give grid"):
        inflate(target, source.state_dict())
    inflate(target, source.state_dict(), grid=(1, 16))
    assert torch.equal(target.pos_embed, source.pos_embed.repeat(1, 3, 1))


@pytest.mark.parametrize(
    ("target", "source", "options", "message"),
    [
        (tiny_vivit, image_vit, {"mode": "first"}, "mode is 'central' or 'average', not 'first'"),
        (image_vit, image_vit, {}, "inflate takes a ViViT, and VisionTransformer is none"),
        (tiny_vivit, tiny_vivit, {}, "not an image ViT's weights"),
        (tiny_vivit, lambda: image_vit(depth=3), {}, "they lack blocks.3"),
        (tiny_vivit, lambda: image_vit(in_chans=1), {}, r"proj.weight is \(32, 1, 2, 8, 8\) there and"),
        (tiny_vivit, lambda: image_vit(embed_dim=16), {}, "don't fit"),
        (tiny_vivit, image_vit, {"grid": (2, 2)}, r"8 entries, and grid=\(2, 2\) is not their \(h, w\)"),
        (tiny_vivit, lambda: image_vit((32, 80)), {}, r"40 entries, which make no square: give grid=\(h, w\)"),
    ],
)
def test_what_does_not_fit_is_said_and_changes_nothing(target, source, options, message):
    model = target()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tokenlearner.InputError, match=message):
        inflate(model, source().state_dict(), **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- a ViViT's weights in a ViViT


def test_between_two_vivits():
    source, target, x = tiny_vivit(), tokenlearner.insert(tiny_vivit(class_token=True), 4), clips()
    left_out = load_vit_weights(target, source.state_dict())
    assert set(left_out.kept) == {"cls_token"} | {key for key in target.state_dict() if "token_learner" in key}
    back = tiny_vivit()
    assert load_vit_weights(back, target.state_dict()).unused[0] == "cls_token"
    assert torch.equal(back(x), source(x))


def test_between_vivits_of_other_sizes():
    source, target, x = tiny_vivit(), tiny_vivit(img_size=24, num_frames=10), clips(10, 24, 24)
    with pytest.raises(
        tokenlearner.InputError, match=r"24 entries, which are not the model's 5×3×3: give grid=\(slices, h, w\)"
    ):
        load_vit_weights(target, source.state_dict())
    with pytest.raises(tokenlearner.InputError, match=r"24 entries, and grid=\(2, 4\) is not their \(slices, h, w\)"):
        load_vit_weights(target, source.state_dict(), grid=(2, 4))
    load_vit_weights(target, source.state_dict(), grid=(3, 2, 4))
    source.set_input_size(24, num_frames=10)
    assert torch.equal(target(x), source(x))


def test_images_and_clips_are_not_mixed_up():
    with pytest.raises(tokenlearner.InputError, match=r"an image model's weights.*: use inflate\(model, state_dict\)"):
        load_vit_weights(tiny_vivit(), image_vit().state_dict())
    with pytest.raises(tokenlearner.InputError, match="a video model's weights, and the model takes images"):
        load_vit_weights(image_vit(), tiny_vivit().state_dict())


def test_weights_of_a_plain_vit_with_a_norm_after_the_mean():
    source = tiny(VisionTransformer, img_size=(16, 32), class_token=False, global_pool="avg")
    target = tiny_vivit()
    assert inflate(target, source.state_dict()) == ((), ())
    assert torch.equal(target.norm.weight, source.fc_norm.weight)
