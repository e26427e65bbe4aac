"""Table 5's pooled ViT against the same layers run by hand, and under everything a host has to survive."""

import copy
import pickle

import pytest
import timm
import torch
from einops import reduce
from timm.models.vision_transformer import VisionTransformer
from torch.export import Dim, export

import tokenlearner
from tokenlearner.models import PooledViT

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5, "img_size": 32}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def pooled(pooling=((1, 4), (3, 2)), **options):
    model = PooledViT(pooling=pooling, **{**TINY, **GAP, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def by_hand(model, images, windows):
    """The layers one by one; ``windows`` gives the cell size before a layer. Prefix tokens are put aside."""
    plain = VisionTransformer(**{**TINY, **GAP, "class_token": model.has_class_token, "global_pool": model.global_pool})
    plain.load_state_dict(model.state_dict())
    plain.eval()
    h, w = (side // 4 for side in images.shape[-2:])
    x = plain._pos_embed(plain.patch_embed(images))
    count = plain.num_prefix_tokens
    for i, block in enumerate(plain.blocks):
        if i in windows:
            (a, c), grid = windows[i], x[:, count:].unflatten(1, (h, w))
            cells = reduce(grid, "b (h a) (w c) d -> b (h w) d", "mean", a=a, c=c)
            x, h, w = torch.cat([x[:, :count], cells], dim=1), h // a, w // c
        x = block(x)
    return plain.forward_head(plain.norm(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"class_token": True}, {"class_token": True, "global_pool": "token"}],
    ids=["gap", "prefix", "token"],
)
def test_it_computes_what_the_layers_do_by_hand(options):
    model, images = pooled(**options), torch.randn(2, 3, 32, 32)
    expected = by_hand(model, images, {1: (2, 2), 3: (2, 2)})
    torch.testing.assert_close(model(images), expected)


def test_its_keys_and_parameters_are_the_plain_vits():
    plain = VisionTransformer(**{**TINY, **GAP})
    assert list(pooled().state_dict()) == list(plain.state_dict())
    assert tokenlearner.cost(pooled(), (3, 32, 32)).parameters == tokenlearner.cost(plain, (3, 32, 32)).parameters


def test_cost_shows_the_tokens_of_each_layer():
    assert tokenlearner.cost(pooled(), (3, 32, 32)).tokens == (64, 16, 16, 4)
    assert tokenlearner.cost(pooled(((0, 2),), class_token=True), (3, 32, 32)).tokens == (5, 5, 5, 5)


def test_images_that_are_not_square():
    model = pooled(((2, 2),), dynamic_img_size=True)
    images = torch.randn(1, 3, 16, 48)  # 4×12 patches → cells of 2×6
    seen = []
    model.blocks[2].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    grid = []
    model.blocks[1].register_forward_hook(lambda module, args, out: grid.append(out))
    model(images)
    cells = reduce(grid[0].unflatten(1, (4, 12)), "b (h a) (w c) d -> b (h w) d", "mean", a=2, c=6)
    torch.testing.assert_close(seen[0], model.blocks[2].norm1(cells))


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_the_same_and_their_own(clone):
    model, images = pooled(), torch.randn(2, 3, 32, 32)
    expected = model(images)
    other = clone(model)
    assert torch.equal(other(images), expected)
    model(torch.randn(1, 3, 32, 32))
    other.blocks[1].grid_pool.side = 2
    assert torch.equal(model(images), expected)


def test_export_with_a_dynamic_batch(without_shape_checks):
    model, images = pooled(), torch.randn(2, 3, 32, 32)
    program = export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1, max=8)},))
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(more), model(more))


def test_gradients_under_checkpointing():
    model, images = pooled().train(), torch.randn(2, 3, 32, 32)
    model(images).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_save_and_load(tmp_path):
    model, images = pooled(class_token=True, global_pool="token"), torch.randn(2, 3, 32, 32)
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path / "model"))
    assert type(loaded) is PooledViT
    assert loaded.pooling == ((1, 4), (3, 2))
    assert torch.equal(loaded(images), model(images))


def test_intermediates():
    model, images = pooled(), torch.randn(2, 3, 32, 32)
    layers = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert [layer.shape[1] for layer in layers] == [64, 16, 16, 4]
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(images)


@pytest.mark.parametrize("pooling", [(), ((2, 4), (1, 2)), ((1, 4), (1, 2)), ((4, 2),), ((-1, 2),)])
def test_layers_that_do_not_fit(pooling):
    with pytest.raises(tokenlearner.InputError, match="ascending layers from 0 to 3"):
        PooledViT(pooling=pooling, **TINY)


def test_a_grid_that_is_too_small():
    with pytest.raises(ValueError, match="2×2 can't be pooled to 4×4"):
        pooled(((1, 2), (2, 4)))(torch.randn(1, 3, 32, 32))


def test_masks_are_refused():
    with pytest.raises(ValueError, match="mask"):
        pooled().forward_features(torch.randn(1, 3, 32, 32), attn_mask=torch.ones(64, 64))


def test_the_registered_ones_have_the_papers_grids():
    for name, tokens in [
        ("tokenlearner_l16_512_pool8at9_2at18", [1024] * 9 + [64] * 9 + [4] * 6),
        ("tokenlearner_l16_512_pool8at12_2at18", [1024] * 12 + [64] * 6 + [4] * 6),
        ("tokenlearner_l16_512_pool4at12", [1024] * 12 + [16] * 12),
    ]:
        with torch.device("meta"):
            model = timm.create_model(name, weight_init="skip", embed_dim=16, num_heads=2)
        assert list(tokenlearner.cost(model, (3, 512, 512)).tokens) == tokens
