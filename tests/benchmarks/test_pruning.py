"""Pruning by attention against section 3 of EViT, transcribed with loops and lists."""

import copy

import pytest
import torch

import tokenlearner

from peers import prune
from plain_hosts import HOSTS, SIZE, attention_of, host, logits_of, tokens_of, with_mlp


def by_hand(model, image, keep, fuse):
    tokens, prefix = tokens_of(model, image), model.num_prefix_tokens
    for i, block in enumerate(model.blocks):
        added, _, weights = attention_of(block, tokens, [1] * len(tokens))
        queries = [0] if model.has_class_token else range(len(tokens))
        received = {
            key: sum(rows[query][key] for rows in weights for query in queries) / (len(weights) * len(queries))
            for key in range(prefix, len(tokens))
        }
        tokens = [token + more for token, more in zip(tokens, added)]
        if i in keep and len(received) > keep[i]:
            best = sorted(received, key=lambda key: received[key].item(), reverse=True)[: keep[i]]
            rest = [key for key in received if key not in best]
            fused = [sum(received[key] * tokens[key] for key in rest)] if fuse else []
            tokens = tokens[:prefix] + [tokens[key] for key in sorted(best)] + fused
        tokens = with_mlp(block, tokens)
    return logits_of(model, tokens, [1] * len(tokens))


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("fuse", [False, True], ids=["dropped", "fused"])
@pytest.mark.parametrize("fused_attn", [False, True], ids=["plain kernel", "fused kernel"])
def test_it_is_the_papers_rule(name, fuse, fused_attn):
    model, images, keep = host(name), torch.randn(2, *SIZE), {0: 9, 2: 4}
    for block in model.blocks:
        block.attn.fused_attn = fused_attn
    expected = torch.stack([by_hand(model, image, keep, fuse) for image in images])
    pruned = prune(model, keep, fuse=fuse)
    torch.testing.assert_close(pruned(images), expected, rtol=1e-4, atol=1e-5)
    prefix = model.num_prefix_tokens
    assert tokenlearner.cost(pruned, SIZE).tokens == (prefix + 16, prefix + 9 + fuse, prefix + 9 + fuse)


@pytest.mark.parametrize("name", HOSTS)
def test_keeping_all_is_the_host(name):
    model, images = host(name), torch.randn(2, *SIZE)
    for count in (16, 100):
        assert torch.equal(prune(model, {0: count, 1: count}, fuse=True)(images), model(images))


def test_prefix_tokens_are_kept_and_the_order_too():
    """The MLP does nothing here, so what comes out is found among what the attention left."""
    model = host("class token, registers")
    for parameter in model.blocks[0].mlp.parameters():
        parameter.data.zero_()
    x = torch.randn(2, 19, 16)
    full, left = model.blocks[0](x), prune(model, {0: 5}).blocks[0](x)
    for before, after in zip(full, left):
        places = [int((before - token).abs().sum(dim=1).argmin()) for token in after]
        torch.testing.assert_close(before[places], after)
        assert places[:3] == [0, 1, 2]
        assert places == sorted(set(places))
        assert len(places) == 3 + 5


@pytest.mark.parametrize("fuse", [False, True], ids=["dropped", "fused"])
def test_gradients_are_those_of_the_rule(fuse):
    model, image = host("class token, mean"), torch.randn(*SIZE)
    pruned = prune(model, {1: 6}, fuse=fuse).train()
    pruned(image[None]).square().sum().backward()
    by_hand(model, image, {1: 6}, fuse).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in pruned.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_it_is_a_copy_with_the_hosts_keys():
    model, images = host(), torch.randn(2, *SIZE)
    expected, pruned = model(images), prune(model, {1: 4})
    assert list(pruned.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(pruned)
    assert torch.equal(other(images), pruned(images))
    other.blocks[1].count = 16
    other.head.weight.data.zero_()
    assert torch.equal(model(images), expected)
    assert not torch.equal(pruned(images), expected)


def test_layers_and_numbers_that_do_not_fit():
    with pytest.raises(tokenlearner.InputError, match="layers 0 to 2, and no layer 3"):
        prune(host(), {3: 4})
    with pytest.raises(tokenlearner.InputError, match="at least 1 token, not 0"):
        prune(host(), {1: 0})
