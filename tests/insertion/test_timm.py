"""What timm's VisionTransformers can be: image sizes, distilled heads, block classes, intermediate features."""

import copy

import pytest
import torch
from einops import rearrange
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch.testing import assert_close

from insertion.hosts import DEPTH, FUSERS, assert_naive, images, inserted, naive_features, naive_layers, shake, tiny
from tokenlearner import attention_maps, insert
from tokenlearner.insertion import inserted_parameters

BLOCKS = {
    "Block": {"block_fn": Block},
    "Block, differential attention": {"block_fn": Block, "attn_layer": "diff"},
    "ResPostBlock": {"block_fn": ResPostBlock},
    "ParallelScalingBlock": {"block_fn": ParallelScalingBlock},
    "ParallelScalingBlock, own parameter": {"block_fn": ParallelScalingBlock, "qkv_bias": False},
    "DiffParallelScalingBlock": {"block_fn": DiffParallelScalingBlock},
    "ParallelThingsBlock": {"block_fn": ParallelThingsBlock},
}


@pytest.mark.parametrize("fuser", FUSERS)
def test_distilled_host_keeps_both_its_tokens_and_heads(fuser):
    host, x = tiny(VisionTransformerDistilled), images()
    model = inserted(host, fuser=fuser)
    assert_naive(host, model, x)
    model.set_distilled_training()
    model.train()
    features = naive_features(host, model, x)
    assert_close(model(x), (host.head(features[:, 0]), host.head_dist(features[:, 1])))


# conv sees the grid's shape, so a height and width swapped or kept from the call before give other tokens.
@pytest.mark.parametrize("fuser", FUSERS[:2])
@pytest.mark.parametrize("pad", [False, True])
def test_dynamic_image_sizes_in_any_order(fuser, pad):
    host = tiny(dynamic_img_size=True, dynamic_img_pad=pad)
    model = inserted(host, kind="conv", fuser=fuser)
    sizes = [(16, 64), (64, 16), (32, 32), (32, 48), (8, 8), (16, 64)]
    for size in sizes + ([(30, 17), (17, 30)] if pad else []):
        x = images(*size)
        assert_naive(host, model, x)
        grid = tuple(-(-side // 8) for side in size)
        assert attention_maps(model, x)[2].shape[2:] == grid


def test_padding_counts_into_the_grid_of_a_fixed_size_too():
    host = tiny(img_size=(30, 45), dynamic_img_pad=True, pos_embed="none")
    model, x = inserted(host, kind="conv"), images(30, 45)
    assert_naive(host, model, x)
    assert attention_maps(model, x)[2].shape[2:] == (4, 6)


def test_set_input_size_after_insertion():
    host = tiny()
    model = inserted(host, kind="conv")
    for vit in (host, model):
        vit.set_input_size((16, 48))
    x = images(16, 48)
    assert_naive(host, model, x)


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("fuser", FUSERS[:2])
def test_every_block_class_is_called_as_before(options, fuser):
    host, x = tiny(**options), images()
    model = inserted(host, fuser=fuser)
    assert_naive(host, model, x)
    plain = {key for key in vars(host.blocks[2]) if not key.startswith("_")}
    assert all(getattr(model.blocks[2], key) == getattr(host.blocks[2], key) for key in plain)
    assert not hasattr(model.blocks[2], "num_stages")


# Not unpool: it has no factor that could start at zero.
@pytest.mark.parametrize(("fuser", "init_values"), [(None, None), (None, 0.1), ("fuser", 0.1), ("reproject", None)])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_extra_layers_start_as_the_identity_and_train(options, init_values, fuser):
    host, x = tiny(**options, init_values=init_values), images()
    plain = insert(copy.deepcopy(host), fuser=fuser)
    model = insert(copy.deepcopy(host), fuser=fuser, extra_layers=2)
    assert model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    assert len(model.blocks) == DEPTH + 2
    assert torch.equal(model.forward_features(x), plain.forward_features(x))
    assert torch.equal(model(x), plain(x))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves what scales a branch, the second what is behind it
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    tokens = torch.randn(2, 9, 32)
    for layer in model.blocks[DEPTH:]:
        layer = getattr(layer, "block", layer)
        assert not torch.equal(layer(tokens), tokens)
        behind = [p for name, p in layer.named_parameters() if "token_" not in name and p.ndim > 1]
        assert behind
        assert all(p.grad.abs().max() > 0 for p in behind)


@pytest.mark.parametrize("fuser", FUSERS)
def test_trained_extra_layers_come_after_the_hosts_own(fuser):
    host, x = tiny(), images()
    model = inserted(host, at=3, fuser=fuser, extra_layers=2)
    out = model(x)
    assert_naive(host, model, x)
    shake(*model.blocks[5].mlp.parameters())
    assert not torch.allclose(model(x), out, atol=1e-2)


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_extra_layers_are_new_ones(options):
    """They copy the structure of the host's last layer, not its weights."""
    host = tiny(**options)
    model = insert(copy.deepcopy(host), extra_layers=1)
    last = host.blocks[-1].state_dict()
    assert not any(torch.equal(value, last[key]) for key, value in model.blocks[DEPTH].state_dict().items())


def test_extra_layers_with_differential_attention_start_as_in_a_host_of_that_depth():
    model, deep = insert(tiny(attn_layer="diff"), extra_layers=2), tiny(attn_layer="diff", depth=6)
    assert [block.attn.lambda_init for block in model.blocks] == [block.attn.lambda_init for block in deep.blocks]


def test_extra_layers_of_a_frozen_host_can_train():
    model = insert(tiny().requires_grad_(False), fuser="fuser", extra_layers=1)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(inserted_parameters(model))


def test_extra_layers_appear_in_feature_info():
    model = insert(tiny(), extra_layers=2)
    assert [entry["module"] for entry in model.feature_info] == [f"blocks.{i}" for i in range(6)]


class Unknown(Block):
    """A block whose last branch ends in a module we can't know of."""

    def __init__(self, dim: int, **options: object) -> None:
        super().__init__(dim, **options)
        self.ending = torch.nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.ending(super().forward(x, attn_mask=attn_mask, is_causal=is_causal))


def test_a_block_that_cannot_start_as_the_identity_takes_no_extra_layers():
    host = tiny(block_fn=Unknown)
    with pytest.raises(ValueError, match="can't tell which layers end the residual branches of Unknown"):
        insert(host, extra_layers=1)
    assert len(host.blocks) == DEPTH
    x = images()
    model = inserted(host, fuser="fuser")
    assert_naive(host, model, x)


def spatial(out, count, grid=None):
    """A layer's grid tokens as forward_intermediates gives them: NLC, or NCHW with a grid."""
    tokens = out[:, count:]
    return tokens if grid is None else rearrange(tokens, "b (h w) d -> b d h w", h=grid[0], w=grid[1])


@pytest.mark.parametrize("indices", [[0, 1], [-4, -3], (1,)])
@pytest.mark.parametrize("stop_early", [False, True])
def test_layers_before_the_learner_are_maps(indices, stop_early):
    host, x = tiny(img_size=(32, 48), reg_tokens=2), images(32, 48)
    model = inserted(host)
    outs = naive_layers(host, model, x)
    expected = [spatial(outs[i % DEPTH], 3, (4, 6)) for i in indices]
    final, found = model.forward_intermediates(x, indices, stop_early=stop_early)
    assert_close(found, expected)
    assert_close(model.get_intermediate_layers(x, indices, reshape=True), expected)
    if not stop_early:
        assert_close(final, outs[-1])


@pytest.mark.parametrize("indices", [None, 1, 2, [2], [0, -1]])
def test_layers_after_the_learner_are_token_lists_and_refused_as_maps(indices):
    host, x = tiny(), images()
    model = inserted(host)
    outs = naive_layers(host, model, x)
    taken = {None: range(DEPTH), 1: [3], 2: [2, 3]}[indices] if not isinstance(indices, list) else indices
    expected = [outs[i % DEPTH] for i in taken]
    late = ", ".join(str(i) for i in sorted(i % DEPTH for i in taken) if i >= 2)

    for call in (
        lambda: model.forward_intermediates(x, indices),
        lambda: model.forward_intermediates(x, indices, False, False, False, "NCHW"),
        lambda: model.get_intermediate_layers(x, indices, reshape=True),
    ):
        with pytest.raises(ValueError, match=f"layers {late} run on 8 learned tokens, .* take layers before 2, use"):
            call()
    final, found = model.forward_intermediates(x, indices, False, False, False, "NLC")
    assert_close(final, outs[-1])
    assert_close(found, [spatial(out, 1) for out in expected])
    assert_close(model.get_intermediate_layers(x, indices), [spatial(out, 1) for out in expected])
    found = model.forward_intermediates(x, indices, norm=True, output_fmt="NLC", intermediates_only=True)
    assert_close(found, [spatial(host.norm(out), 1) for out in expected])


@pytest.mark.parametrize("fuser", FUSERS[1:])
def test_with_a_fuser_every_layer_is_a_map(fuser):
    host, x = tiny(img_size=(32, 48)), images(32, 48)
    model = inserted(host, at=1, fuser=fuser)
    outs = naive_layers(host, model, x)
    final, found = model.forward_intermediates(x)
    assert_close(final, outs[-1])
    assert_close(found, [spatial(out, 1, (4, 6)) for out in outs[:DEPTH]])
    found = model.forward_intermediates(x, 2, norm=True, return_prefix_tokens=True, output_dict=True)
    assert_close(found["image_intermediates"], [spatial(host.norm(out), 1, (4, 6)) for out in outs[2:DEPTH]])
    assert_close(found["image_intermediates_prefix"], [host.norm(out)[:, :1] for out in outs[2:DEPTH]])


def test_after_the_last_layer_every_layer_is_a_map_but_none_can_be_normed():
    host, x = tiny(), images()
    model = inserted(host, at=DEPTH)
    outs = naive_layers(host, model, x)
    final, found = model.forward_intermediates(x)
    assert_close(final, outs[-1])
    assert_close(found, [spatial(out, 1, (4, 4)) for out in outs[:DEPTH]])
    for call in (lambda: model.forward_intermediates(x, norm=True), lambda: model.forward_intermediates(x, 1, 0, 1)):
        with pytest.raises(ValueError, match="norm=True would learn tokens from every intermediate"):
            call()
