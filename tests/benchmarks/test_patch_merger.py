"""PatchMerger against its formula with loops, and in a host."""

import copy

import pytest
import torch

import tokenlearner

from peers import PatchMerger, merge_patches
from plain_hosts import HOSTS, SIZE, host, softmax


def by_hand(merger, x):
    """softmax(W Xᵀ) X of one image, one token at a time."""
    normed = [(v - v.mean()) / (v.var(correction=0) + 1e-6).sqrt() * merger.norm.weight + merger.norm.bias for v in x]
    tokens = []
    for query in merger.queries:
        weights = softmax([query @ v for v in normed])
        tokens.append(sum(w * v for w, v in zip(weights, normed)))
    return torch.stack(tokens)


def random_(module):
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    return module


def test_it_is_the_papers_formula():
    merger, x = random_(PatchMerger(8, 3)), torch.randn(2, 10, 8)
    torch.testing.assert_close(merger(x), torch.stack([by_hand(merger, image) for image in x]))


@pytest.mark.parametrize("name", HOSTS)
def test_the_later_layers_run_on_its_tokens(name):
    model, images = host(name), torch.randn(2, *SIZE)
    merging = merge_patches(model, 4, at=1)
    merger, prefix = random_(merging.blocks[1].patch_merger), model.num_prefix_tokens
    x = model.blocks[0](model._pos_embed(model.patch_embed(images)))
    x = torch.cat([x[:, :prefix], torch.stack([by_hand(merger, image) for image in x[:, prefix:]])], dim=1)
    expected = model.forward_head(model.norm(model.blocks[2](model.blocks[1](x))))
    torch.testing.assert_close(merging(images), expected, rtol=1e-4, atol=1e-5)
    assert tokenlearner.cost(merging, SIZE).tokens == (prefix + 16, prefix + 4, prefix + 4)


def test_gradients_reach_everything():
    merging = merge_patches(host(), 4).train()
    merging(torch.randn(2, *SIZE)).square().sum().backward()
    assert [name for name, p in merging.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_host_keeps_its_keys_and_copies_are_their_own():
    model, images = host(), torch.randn(2, *SIZE)
    merging = merge_patches(model)
    added = [f"blocks.1.patch_merger.{name}" for name in ("queries", "norm.weight", "norm.bias")]
    assert set(merging.state_dict()) - set(model.state_dict()) == set(added)
    expected, other = merging(images), copy.deepcopy(merging)
    other.blocks[1].patch_merger.norm.weight.data.zero_()
    assert torch.equal(merging(images), expected)
    assert not torch.equal(other(images), expected)


def test_layers_and_numbers_that_do_not_fit():
    with pytest.raises(tokenlearner.InputError, match="no layer 3"):
        merge_patches(host(), at=3)
    with pytest.raises(tokenlearner.InputError, match="1 or more, not 0"):
        merge_patches(host(), 0)
