"""insert() and remove(): where the learner goes, what then comes out, and what stays of the host."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from insertion.hosts import (
    DEPTH,
    FUSERS,
    PLACES,
    assert_naive,
    images,
    inserted,
    naive_features,
    naive_layers,
    shake,
    tiny,
)
from tokenlearner import attention_maps, insert, insertion_of, learners, remove
from tokenlearner.core import KINDS, NeighbourTokenLearner, TokenLearner, WindowTokenLearner
from tokenlearner.insertion import inserted_parameters
from tokenlearner.insertion.spec import resolve_at
from tokenlearner.models.x2plus1d import X2Plus1D

HOSTS = {
    "cls": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "clip": {"pre_norm": True, "global_pool": "map"},
    "16:9": {"img_size": (32, 48)},
}


def hooks_of(model):
    """Every module's hooks, and what torch notes beside them."""
    kinds = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    found = {(name, kind): dict(getattr(m, kind)) for name, m in model.named_modules() for kind in kinds}
    return {place: hooks for place, hooks in found.items() if hooks}


@pytest.mark.parametrize("options", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize(("fuser", "at"), PLACES)
def test_output_and_input_gradient_are_those_of_the_forward_written_by_hand(options, fuser, at):
    host = tiny(**options)
    model = inserted(host, num_tokens=6, at=at, fuser=fuser)
    x = images(*host.patch_embed.img_size).requires_grad_()
    assert_naive(host, model, x)
    features, expected = model.forward_features(x), naive_features(host, model, x)
    weights = torch.randn_like(features)
    (gradient,), (wanted,) = (torch.autograd.grad(y, x, weights) for y in (features, expected))
    assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    shake(*inserted_parameters(model).values())
    assert not torch.allclose(model.forward_features(x), features, atol=1e-2)


@pytest.mark.parametrize("fuser", [None, "fuser", "reproject"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_learner_can_be_inserted(kind, fuser):
    host = tiny(img_size=(32, 48))
    model = inserted(host, kind=kind, fuser=fuser)
    x = images(32, 48)
    assert_naive(host, model, x)


def test_options_reach_the_learner_and_the_fuser():
    model = tiny()
    assert insert(model, 3, 1, "mlp", "fuser", 1, hidden_dim=24, dropout=0.25) is model
    assert list(learners(model)) == [1, 2, 3, 4]
    for i, learner in learners(model).items():
        fuser = model.blocks[i].token_fuser
        assert (learner.num_tokens, learner.alpha.fc1.out_features, learner.alpha.drop.p) == (3, 24, 0.25)
        assert (fuser.num_tokens, fuser.beta.fc1.out_features, fuser.beta.drop.p) == (3, 24, 0.25)
    assert learners(insert(tiny(), kind="conv", pool="mean"))[2].pool == "mean"
    assert insert(tiny(num_heads=4), fuser="reproject").blocks[2].token_fuser.num_heads == 4


@pytest.mark.parametrize(
    ("at", "layer"),
    [(0, 0), (1, 1), (3, 3), (4, 4), (0.0, 0), (0.24, 0), (0.25, 1), (0.3, 1), (0.5, 2), (0.99, 3), (1.0, 4)],
)
def test_at_is_a_layer_or_a_share_of_the_depth_rounded_down(at, layer):
    host = tiny()
    model = inserted(host, at=at)
    assert list(learners(model)) == [layer]
    assert insertion_of(model).at == layer
    x = images()
    assert_naive(host, model, x)


def test_a_share_of_the_depth_leaves_extra_layers_out_and_an_index_may_reach_them():
    assert list(learners(insert(tiny(), at=1.0, extra_layers=2))) == [4]
    assert list(learners(insert(tiny(), at=6, extra_layers=2))) == [6]
    assert list(learners(insert(tiny(), at=0.5, extra_layers=2, fuser="fuser"))) == [2, 3, 4, 5]


def test_shares_that_floating_point_puts_just_below_a_layer_still_reach_it():
    assert all(
        resolve_at(layer / depth, depth, depth) == layer for depth in range(1, 101) for layer in range(depth + 1)
    )
    assert resolve_at(0.29, 100, 100) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        (True, "layer index"),
        ("half", "layer index"),
        (None, "layer index"),
        (-1, "outside the host's 4 layers; give 0 to 4"),
        (5, "outside the host's 4 layers; give 0 to 4"),
        (6.0, "for layer 6 give the int 6"),
        (1.01, r"share of the depth in \[0, 1\]"),
        (-0.5, r"share of the depth in \[0, 1\]"),
        (float("nan"), r"share of the depth in \[0, 1\]"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")  # beartype would refuse None before we do
def test_an_at_that_means_nothing_is_refused(at, sentence):
    with pytest.raises(ValueError, match=sentence):
        insert(tiny(), at=at)


@pytest.mark.parametrize(("fuser", "at"), PLACES)
def test_insert_keeps_the_hosts_keys_and_remove_brings_the_host_back(fuser, at):
    host = tiny()
    before, x = copy.deepcopy(host), images()
    insert(host, at=at, fuser=fuser, extra_layers=2)
    keys = set(before.state_dict())
    assert [key for key in host.state_dict() if key in keys] == list(before.state_dict())
    assert all(torch.equal(host.state_dict()[key], value) for key, value in before.state_dict().items())
    if not fuser:
        assert all(isinstance(host.get_submodule(name), type(m)) for name, m in before.named_modules())

    assert remove(host) is host
    assert [type(m) for m in host.modules()] == [type(m) for m in before.modules()]
    assert list(host.state_dict()) == list(before.state_dict())
    assert torch.equal(host(x), before(x))
    assert repr(host) == repr(before)
    assert hooks_of(host) == {}
    assert host.feature_info == before.feature_info
    assert host.__dict__.keys() == before.__dict__.keys()
    assert [m.training for m in host.modules()] == [m.training for m in before.modules()]
    with pytest.raises(ValueError, match="no TokenLearner to remove"):
        remove(host)


@pytest.mark.parametrize("fuser", FUSERS)
def test_remove_keeps_what_was_trained_and_insert_works_again(fuser):
    host, x = tiny(), images()
    model = inserted(host, fuser=fuser, extra_layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    remove(model).eval()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    assert all(not torch.equal(value, host.state_dict()[key]) for key, value in model.state_dict().items())
    host.load_state_dict(model.state_dict())
    assert torch.equal(model(x), host(x))

    insert(model, 5, 1, fuser=fuser)
    shake(*inserted_parameters(model).values())
    assert list(learners(model)) == ([1, 2, 3] if fuser else [1])
    assert_naive(host, model, x)


def test_modules_of_the_insertion_take_the_mode_of_the_host():
    for mode in (True, False):
        for fuser in FUSERS:
            model = insert(tiny().train(mode), fuser=fuser, extra_layers=1)
            assert {m.training for m in model.modules()} == {mode}


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("extra_layers", [0, 2])
def test_inserted_parameters_are_all_that_the_host_did_not_have(fuser, extra_layers):
    host = tiny()
    assert inserted_parameters(host) == {}
    model = insert(copy.deepcopy(host), fuser=fuser, extra_layers=extra_layers)
    known = dict(model.named_parameters())
    found = inserted_parameters(model)
    assert found.keys() == known.keys() - dict(host.named_parameters()).keys()
    assert all(found[name] is known[name] for name in found)


@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_attention_maps_are_those_of_the_tokens_that_reach_each_learner(kind, fuser):
    host, x = tiny(img_size=(32, 48), reg_tokens=2), images(32, 48)
    if fuser == "unpool" and kind == "conv":
        fuser = "fuser"  # by hand, unpool is written for the softmax form only
    model = inserted(host, num_tokens=6, at=1, kind=kind, fuser=fuser)
    seen = {}
    naive_layers(host, model, x, seen)
    maps = attention_maps(model, x)
    assert list(maps) == list(seen) == ([1, 2, 3] if fuser else [1])
    for i, learner in learners(model).items():
        assert maps[i].dtype == torch.float32
        assert not maps[i].requires_grad
        assert_close(maps[i], learner.maps(seen[i], (4, 6)).detach())
    assert_close(attention_maps(inserted(host, at=DEPTH), x)[DEPTH].sum(dim=(2, 3)), torch.ones(2, 8))


@pytest.mark.parametrize("fuser", FUSERS)
def test_attention_maps_run_in_eval_mode_and_leave_the_model_as_it_was(fuser):
    host, x = tiny(proj_drop_rate=0.5), images()
    model = inserted(host, fuser=fuser, dropout=0.5).train()
    model.blocks[1].mlp.eval()  # a module its user keeps frozen
    model.blocks[3].eval()
    modes, hooks = [m.training for m in model.modules()], hooks_of(model)
    inner = [getattr(block, "block", block).training for block in model.blocks]
    maps = attention_maps(model, x)
    assert [m.training for m in model.modules()] == modes
    assert [getattr(block, "block", block).training for block in model.blocks] == inner
    assert hooks_of(model) == hooks
    for i, expected in attention_maps(model.eval(), x).items():
        assert torch.equal(maps[i], expected)


def test_attention_maps_refuse_what_has_none():
    with pytest.raises(ValueError, match=r"has no TokenLearner; insert\(model\) one first"):
        attention_maps(tiny(), images())
    with pytest.raises(ValueError, match="kind 'average' has no attention maps"):
        attention_maps(insert(tiny(), kind="average"), images())


class OwnLearners(nn.Module):
    """A network with learners of its own: one on whole maps, one on the frames of a clip, one that never runs."""

    def __init__(self, kind="mlp"):
        super().__init__()
        self.idle = TokenLearner(8, 2)
        self.frames = TokenLearner(8, 3, kind)
        self.maps = TokenLearner(8, 4, dropout=0.5)

    def forward(self, x):  # (b, d, t, h, w)
        X = x.movedim(1, -1)
        tokens = self.maps(X.mean(dim=1))
        return tokens.mean(), self.frames(X.flatten(0, 1).flatten(1, 2), grid=tuple(X.shape[2:4]))


def test_learners_a_model_was_built_with_are_looked_at():
    model, x = OwnLearners().train(), torch.randn(2, 8, 5, 2, 3)
    assert learners(model) == {0: model.idle, 1: model.frames, 2: model.maps}
    found = attention_maps(model, x)
    assert list(found) == [1, 2]
    X = x.movedim(1, -1)
    assert_close(found[1], torch.stack([model.frames.maps(X[:, t]) for t in range(5)], dim=1).detach())
    assert_close(found[2], model.maps.eval().maps(X.mean(dim=1)).detach())
    assert model.training
    assert hooks_of(model) == {}
    assert attention_maps(model, x[:, :, :1])[1].shape == (2, 3, 2, 3)  # one frame each is no clip


def test_maps_of_own_learners_over_time_are_laid_out_by_slice():
    x = torch.randn(2, 4, 2, 3, 8)
    for cls in (NeighbourTokenLearner, WindowTokenLearner):
        learner = cls(8, 3)
        (maps,) = attention_maps(nn.Sequential(learner), x).values()
        whole = learner.maps(x).detach()
        assert_close(maps, whole if cls is NeighbourTokenLearner else whole.movedim(3, 2).flatten(1, 2))


def test_maps_of_a_video_model_with_token_transformers():
    size = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 3), "expansion": 2.0, "head_width": 16}
    model = X2Plus1D("TokenLearner", 5, num_frames=4, swapped=2, num_tokens=3, num_weights=4, **size).eval()
    seen = []
    own = learners(model)
    own[1].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    found = attention_maps(model, torch.randn(2, 3, 4, 64, 96))
    assert list(found) == list(own) == [0, 1]
    assert found[0].shape == found[1].shape == (2, 4, 3, 2, 3)
    assert torch.equal(found[1].flatten(0, 1), own[1].maps(seen[0]).detach())


def test_own_learners_without_maps_are_refused_and_no_hook_stays():
    model = OwnLearners("average")
    with pytest.raises(ValueError, match="kind 'average' has no attention maps"):
        attention_maps(model, torch.randn(2, 8, 5, 2, 3))
    assert hooks_of(model) == {}
