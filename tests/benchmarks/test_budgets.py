"""Settings at a share of the host's cost, against trying all of them."""

from itertools import pairwise

import pytest
import torch

import tokenlearner
from tokenlearner.insertion.hosting import bare_on_meta
from tokenlearner.inspection.speed import Speed

import peers.budgets
from peers import PEERS, at_latency, at_macs
from plain_hosts import host

SIZE = (3, 24, 24)


def vit(name="mean", side=24):
    return host(name, img_size=side, patch_size=4, depth=4, embed_dim=32, num_heads=4)


def macs(model, size=SIZE):
    return tokenlearner.cost(model, size).macs


@pytest.fixture(scope="module")
def shares():
    """Of every setting of every peer, in order, for a host of 16 patches."""
    model = bare_on_meta(vit(side=16))
    whole = macs(model, (3, 16, 16))
    with torch.device("meta"):
        return {
            name: [macs(peer.build(model, setting), (3, 16, 16)) / whole for setting in peer.settings(model)]
            for name, peer in PEERS.items()
        }


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_share_is_the_nearest_there_is(shares, name, share):
    model, size = vit(side=16), (3, 16, 16)
    choice = at_macs(name, model, share, size)
    assert choice.share == macs(PEERS[name].build(model, choice.setting), size) / macs(model, size)
    # A setting or two may lie nearer where its place in the order does not follow its cost to the last MAC.
    assert abs(choice.share - share) <= min(abs(one - share) for one in shares[name]) + 0.005


@pytest.mark.parametrize("name", ["tome", "top-k", "evit", "patch merger"])
@pytest.mark.parametrize("share", [0.35, 0.6])
def test_methods_with_fine_steps_come_within_five_percent(name, share):
    assert at_macs(name, vit("class token, mean"), share, SIZE).share == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize("name", PEERS)
def test_settings_grow_dearer_up_to_the_host(shares, name):
    rising = shares[name]
    assert all(later > earlier - 0.01 for earlier, later in pairwise(rising))
    assert rising[0] < 0.35
    assert 0.9 < rising[-1] < 1.1


@pytest.mark.parametrize("name", PEERS)
def test_what_is_built_runs(name):
    model, peer = vit(), PEERS[name]
    settings = peer.settings(model)
    logits = peer.build(model, settings[len(settings) // 2])(torch.randn(2, *SIZE))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


def test_a_fixed_number_of_tokens_goes_where_a_tokenlearner_of_that_cost_has_them():
    model = vit()
    with torch.device("meta"):
        share = macs(tokenlearner.insert(bare_on_meta(model), 8, 0.5, kind="grid")) / macs(model)
    for name in ("patch merger", "average pooling"):
        assert at_macs(name, model, share, SIZE).setting == (2, 8)


def test_pruning_that_would_leave_too_little_starts_earlier():
    assert min(at_macs("top-k", vit(), 0.75, SIZE).setting) == 1
    early = at_macs("top-k", vit(), 0.3, SIZE).setting
    assert min(early) == 0
    assert list(early.values()) == sorted(early.values(), reverse=True)


@pytest.mark.parametrize("name", ["tome", "average pooling", "smaller"])
def test_latency_is_met_like_macs_where_time_is_macs(monkeypatch, name):
    def in_proportion(models, images, *, rounds, seconds_per_round):
        first, *_ = counted = [macs(model) for model in models.values()]
        return [Speed(label, 1.0, 0.0, first / one, rounds, len(images)) for label, one in zip(models, counted)]

    monkeypatch.setattr(peers.budgets, "measure_speed", in_proportion)
    model = vit()
    expected = at_macs(name, model, 0.5, SIZE)
    found = at_latency(name, model, 0.5, torch.randn(2, *SIZE))
    assert found.setting == expected.setting
    assert found.share == pytest.approx(expected.share)


def test_latency_is_measured():
    choice = at_latency("shortened", vit(), 0.05, torch.randn(16, *SIZE), rounds=5, seconds_per_round=0.05)
    assert choice.setting == 1
    assert 0 < choice.share < 1


def test_what_can_not_be_asked_for():
    with pytest.raises(tokenlearner.InputError, match="there are tome, top-k"):
        at_macs("tofu", vit(), 0.5, SIZE)
    with pytest.raises(tokenlearner.InputError, match="above 0 and at most 1, not 50"):
        at_macs("tome", vit(), 50.0, SIZE)
    with pytest.raises(tokenlearner.InputError, match="has a TokenLearner"):
        at_macs("tome", tokenlearner.insert(vit(), 4), 0.5, SIZE)
