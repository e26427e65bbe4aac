"""What an inserted model goes through in its life: copies, files, other weights, other dtypes, averages of it."""

import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm.utils import ModelEmaV3
from torch.testing import assert_close

from insertion.hosts import FUSERS, TINY, assert_naive, images, inserted, naive_features, naive_layers, shake, tiny
from tokenlearner import attention_maps, insert, learners, remove
from tokenlearner.insertion import inserted_parameters

# LayerScale, and a parameter of the block's own (mlp_bias): wrappers that copy parameters compute with the old ones.
HOST = {"block_fn": ParallelScalingBlock, "qkv_bias": False, "init_values": 0.1, "reg_tokens": 1}


def through_pickle(model, fresh):
    return pickle.loads(pickle.dumps(model))


def through_state_dict(model, fresh):
    other = fresh("cpu")
    other.load_state_dict(model.state_dict())
    return other


def through_assigned_state_dict(model, fresh):
    other = fresh("cpu")
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


def through_meta_and_to_empty(model, fresh):
    other = fresh("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


def through_meta_and_assignment(model, fresh):
    other = fresh("meta")
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return other


COPIES = [
    lambda model, fresh: copy.deepcopy(model),
    through_pickle,
    through_state_dict,
    through_assigned_state_dict,
    through_meta_and_to_empty,
    through_meta_and_assignment,
]
COPY_NAMES = ["deepcopy", *(f.__name__ for f in COPIES[1:])]


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("copied", COPIES, ids=COPY_NAMES)
def test_copies_are_the_same_and_independent(copied, fuser):
    def fresh(device):
        vit = insert(VisionTransformer(**TINY, **HOST, device=device).eval(), fuser=fuser, extra_layers=1)
        assert {p.device.type for p in vit.parameters()} == {device}
        return vit

    host, x = tiny(**HOST), images()
    model = inserted(host, fuser=fuser, extra_layers=1)
    out, maps = model(x), attention_maps(model, x)[2]
    other = copied(model, fresh)
    assert torch.equal(other(x), out)
    assert list(other.state_dict()) == list(model.state_dict())

    shake(*learners(other)[2].parameters())
    assert not torch.allclose(other(x), out, atol=1e-3)
    assert not torch.allclose(attention_maps(other, x)[2], maps, atol=1e-3)
    assert_naive(host, other, x)
    shake(*other.parameters())  # the host's too: each must have one home in the copy
    assert_naive(host, other, x)
    assert_close(other.forward_intermediates(x, [0, 1])[1], spatial(naive_layers(host, other, x)[:2], host))
    assert torch.equal(model(x), out)
    assert torch.equal(attention_maps(model, x)[2], maps)

    assert list(remove(other).state_dict()) == list(host.state_dict())
    host.load_state_dict(other.state_dict())
    assert torch.equal(other(x), host(x))
    assert torch.equal(model(x), out)


def spatial(outs, host):
    return [out[:, host.num_prefix_tokens :].transpose(1, 2).unflatten(2, (4, 4)) for out in outs]


@pytest.mark.parametrize("fuser", FUSERS[:2])
@pytest.mark.parametrize("copied", COPIES[:2], ids=COPY_NAMES[:2])
def test_a_copy_keeps_its_own_grid(copied, fuser):
    model = inserted(tiny(dynamic_img_size=True), kind="conv", fuser=fuser)
    x = images(16, 64)
    out, other = model(x), copied(model, None)

    def another_image_between(module, args, output):
        other(images(64, 16))

    model.patch_embed.register_forward_hook(another_image_between)  # runs after the model has noted its own grid
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("fuser", FUSERS)
def test_functional_call_uses_the_parameters_it_is_given(fuser):
    host, x = tiny(**HOST), images()
    model = inserted(host, fuser=fuser)
    other = copy.deepcopy(model)
    shake(*other.parameters())
    out = model(x)
    called = torch.func.functional_call(model, dict(other.named_parameters()), x)
    assert torch.equal(called, other(x))
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_before_or_after_the_insertion(dtype, fuser):
    host, x = tiny(init_values=0.1), images()
    model = inserted(host, fuser=fuser, extra_layers=1)
    full = model(x)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_naive(host.to(dtype), model, x.to(dtype))
    assert_close(model(x.to(dtype)).float(), full, rtol=0.05, atol=0.05 if dtype == torch.float16 else 0.3)

    late = insert(host, fuser=fuser, extra_layers=1)
    assert {p.dtype for p in late.parameters()} == {dtype}
    late.load_state_dict(model.state_dict())
    assert torch.equal(late(x.to(dtype)), model(x.to(dtype)))
    assert attention_maps(late, x.to(dtype))[2].dtype == torch.float32


@pytest.mark.parametrize("fuser", FUSERS)
def test_autocast(fuser):
    host, x = tiny(), images()
    model = inserted(host, fuser=fuser)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, expected = model.forward_features(x), naive_features(host, model, x)
        maps = attention_maps(model, x)[2]
    assert_close(features, expected)
    assert_close(features.float(), model.forward_features(x), rtol=0.05, atol=0.3)
    assert maps.dtype == torch.float32
    assert_close(maps, attention_maps(model, x)[2], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("fuser", FUSERS)
def test_drop_path_dropout_and_layer_scale_of_the_host_are_kept(fuser):
    host, x = tiny(init_values=0.1, drop_path_rate=0.5, proj_drop_rate=0.2), images(batch=8)
    model = inserted(host, fuser=fuser, dropout=0.2).train()
    outs = []
    for forward in (model.forward_features, lambda x: naive_features(host, model, x)):
        torch.manual_seed(1)
        outs.append(forward(x))
    assert_close(*outs)
    assert not torch.allclose(model.forward_features(x), outs[0], atol=1e-2)  # another draw


@pytest.mark.parametrize("fuser", [None, "fuser", "unpool", "reproject"])
def test_ema_follows_with_buffers(fuser):
    host, x = tiny(), images(batch=8)
    model = inserted(host, kind="gate", fuser=fuser)
    start = copy.deepcopy(model)
    ema = ModelEmaV3(model, decay=0.75)
    assert torch.equal(ema(x), start(x))
    shake(*model.parameters())
    model.train()(x)  # moves the gate's BatchNorm
    ema.update(model)

    old, new = start.state_dict(), model.state_dict()
    mean = {key: 0.75 * old[key] + 0.25 * new[key] if old[key].is_floating_point() else new[key] for key in old}
    expected = insert(copy.deepcopy(host), kind="gate", fuser=fuser)
    expected.load_state_dict(mean)
    assert_close(ema(x), expected(x))
    tracked = [key for key in mean if key.endswith(("running_mean", "num_batches_tracked"))]
    assert len(tracked) == 2 * len(learners(model))
    for key in tracked:
        assert_close(ema.module.state_dict()[key], mean[key])
        assert mean[key].abs().max() > 0
    assert not torch.allclose(ema(x), start(x), atol=1e-3)


@pytest.mark.parametrize("fuser", FUSERS)
def test_training_moves_every_learner(fuser):
    """The optimiser and the model hold the same parameters, wherever the block is wrapped."""
    model, x = inserted(tiny(class_token=False, global_pool="avg"), fuser=fuser).train(), images()
    before = {name: p.clone() for name, p in inserted_parameters(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    for name, p in inserted_parameters(model).items():
        assert not torch.equal(p, before[name]) or name.endswith("alpha.fc2.bias"), name  # softmax ignores that bias
