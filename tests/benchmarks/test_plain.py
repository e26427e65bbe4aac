"""A smaller ViT, a lower resolution and fewer layers, against the same done by hand."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import tokenlearner
from tokenlearner.insertion.saving import Preprocessing

from peers import lower_resolution, shorten, smaller_vit
from plain_hosts import HOSTS, SIZE, TINY, host


@pytest.mark.parametrize("name", HOSTS)
def test_a_shortened_host_is_its_first_layers_and_its_head(name):
    model, images = host(name), torch.randn(2, *SIZE)
    x = model._pos_embed(model.patch_embed(images))
    expected = model.forward_head(model.norm(model.blocks[1](model.blocks[0](x))))
    short = shorten(model, 2)
    assert torch.equal(short(images), expected)
    assert len(short.blocks) == len(short.feature_info) == 2
    assert torch.equal(shorten(model, 3)(images), model(images))
    assert len(model.blocks) == 3


def halved(images):
    """Weights of a triangle two samples wide on either side, those within the image summing to one, along each side."""
    for dim in (2, 3):
        n = images.shape[dim]
        W = torch.zeros(n // 2, n)
        for i in range(n // 2):
            for j in range(n):
                W[i, j] = max(0.0, 1 - abs((j + 0.5) - (2 * i + 1)) / 2)
        images = torch.tensordot(images, W / W.sum(1, keepdim=True), dims=([dim], [1])).movedim(-1, dim)
    return images


@pytest.mark.parametrize("name", HOSTS)
def test_a_lower_resolution_is_the_host_on_smaller_images(name):
    model, images = host(name, img_size=32), torch.randn(2, 3, 32, 32)
    model.preprocessing, model.label_names = Preprocessing((3, 32, 32)), list("abcde")
    lower = lower_resolution(model, (4, 4))
    plain = host(name)
    state = model.state_dict()
    own = plain.num_prefix_tokens
    prefix, grid = state["pos_embed"][:, :own], state["pos_embed"][:, own:].unflatten(1, (8, 8)).movedim(3, 1)
    grid = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True)
    plain.load_state_dict({**state, "pos_embed": torch.cat([prefix, grid.flatten(2).mT], dim=1)})
    torch.testing.assert_close(lower(images), plain(halved(images)), rtol=1e-4, atol=1e-5)
    assert tokenlearner.cost(lower, (3, 32, 32)).tokens == (16 + own,) * 3
    assert Preprocessing.of(lower) == Preprocessing.of(model)  # it is fed the host's images
    assert lower.label_names == model.label_names
    assert torch.equal(copy.deepcopy(lower)(images), lower(images))
    assert model.patch_embed.img_size == (32, 32)


def test_the_hosts_own_resolution_is_the_host():
    model, images = host(), torch.randn(2, *SIZE)
    assert torch.equal(lower_resolution(model, (4, 4))(images), model(images))


def test_gradients_reach_everything():
    for model in (lower_resolution(host(), (2, 3)), shorten(host(), 1), smaller_vit(host(), 2, 1)):
        model.train()(torch.randn(2, *SIZE)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name", HOSTS)
def test_a_smaller_vit_is_the_one_built_by_hand(name):
    model = host(name, drop_path_rate=0.1)
    model.preprocessing, model.label_names = Preprocessing(SIZE), list("abcde")
    small = smaller_vit(model, 2, 1)
    built = VisionTransformer(
        **{**TINY, **HOSTS[name], "embed_dim": 8, "depth": 2, "num_heads": 1, "drop_path_rate": 0.1}
    )
    small.load_state_dict(built.state_dict())
    images = torch.randn(2, *SIZE)
    assert torch.equal(small.eval()(images), built.eval()(images))
    assert small.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert (small.label_names, small.preprocessing) == (model.label_names, model.preprocessing)


def test_a_smaller_vit_of_a_name_of_timms():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64)
    small = smaller_vit(model, 3, 2)
    assert (small.embed_dim, len(small.blocks), small.blocks[0].attn.head_dim, small.num_classes) == (128, 3, 64, 7)
    assert Preprocessing.of(small) == Preprocessing.of(model)


def test_sizes_that_do_not_fit():
    with pytest.raises(tokenlearner.InputError, match="1 to 3, the host's layers, not 4"):
        shorten(host(), 4)
    with pytest.raises(tokenlearner.InputError, match="which is 4×4, not"):
        lower_resolution(host(), (4, 5))
    with pytest.raises(tokenlearner.InputError, match="one layer and one head"):
        smaller_vit(host(), 0, 1)
