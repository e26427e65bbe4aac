"""Token merging against section 3 of its paper, transcribed with loops and lists."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cosine_similarity

import tokenlearner
from tokenlearner.insertion.saving import Preprocessing

from peers import tome
from plain_hosts import HOSTS, SIZE, attention_of, host, logits_of, tokens_of, with_mlp


def by_hand(model, image, per_layer):
    """Steps 1 to 5 of bipartite soft matching, one token at a time."""
    tokens, prefix = tokens_of(model, image), model.num_prefix_tokens
    sizes = [1] * len(tokens)
    for block, r in zip(model.blocks, per_layer):
        added, keys, _ = attention_of(block, tokens, sizes)
        tokens = [token + more for token, more in zip(tokens, added)]
        if r == 0:  # nothing is put apart and back together
            tokens = with_mlp(block, tokens)
            continue
        order = list(range(prefix, len(tokens)))
        A, B = order[::2], order[1::2]  # 1. alternate
        edges = []
        for a in A:  # 2. an edge to the most similar
            similarity = [cosine_similarity(keys[a].mean(0), keys[b].mean(0), dim=0).item() for b in B]
            edges.append((max(similarity), a, B[similarity.index(max(similarity))]))
        kept = sorted(edges, reverse=True)[: min(r, len(order) // 2)]  # 3. the r most similar
        together = {b: [b] + [a for _, a, partner in kept if partner == b] for b in B}  # 4. merge what is connected
        gone = [a for _, a, _ in kept]
        groups = [[i] for i in range(prefix)] + [[a] for a in A if a not in gone] + [together[b] for b in B]  # 5.
        tokens, sizes = (
            [sum(tokens[i] * sizes[i] for i in g) / sum(sizes[i] for i in g) for g in groups],
            [sum(sizes[i] for i in g) for g in groups],
        )
        tokens = with_mlp(block, tokens)
    return logits_of(model, tokens, sizes)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("r", [3, [0, 5, 2], [8, 1, 50]])
def test_it_is_the_papers_rule(name, r):
    model, images = host(name), torch.randn(2, *SIZE)
    per_layer = [r] * 3 if isinstance(r, int) else r
    expected = torch.stack([by_hand(model, image, per_layer) for image in images])
    torch.testing.assert_close(tome(model, r)(images), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_rule():
    model, image = host("mean"), torch.randn(*SIZE)
    merging = tome(model, 4).train()
    merging(image[None]).square().sum().backward()
    by_hand(model, image, [4] * 3).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in merging.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_under_checkpointing():
    merging, images = tome(host(), 4).train(), torch.randn(2, *SIZE)
    merging(images).sum().backward()
    expected = [p.grad.clone() for p in merging.parameters()]
    merging.zero_grad()
    merging.set_grad_checkpointing()
    merging(images).sum().backward()
    for parameter, gradient in zip(merging.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("name", HOSTS)
def test_no_merges_are_the_host(name):
    model, images = host(name), torch.randn(2, *SIZE)
    assert torch.equal(tome(model, 0)(images), model(images))


@pytest.mark.parametrize("fused", [True, False])
def test_twins_merge_without_a_trace(fused):
    """Attention in proportion to size and the mean weighted by size make merging equal tokens the host exactly."""
    model = host("class token, mean", pos_embed="none")
    for block in model.blocks:
        block.attn.fused_attn = fused
    images = torch.randn(2, 3, 4, 4, 2, 4).repeat_interleave(2, dim=4).reshape(2, *SIZE)  # patches 2i and 2i + 1
    merging = tome(model, [8, 0, 0])
    assert tokenlearner.cost(merging, SIZE).tokens == (17, 9, 9)
    torch.testing.assert_close(merging(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_sizes_count_every_patch_and_no_prefix_token_merges(name):
    merging, seen = tome(host(name), 3), []
    for block in merging.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    merging(torch.randn(2, *SIZE))
    prefix = merging.num_prefix_tokens
    for (x, size), left in zip(seen, [13, 10, 7]):
        assert x.shape[:2] == size.shape == (2, prefix + left)
        assert (size[:, :prefix] == 1).all()
        assert (size >= 1).all()
        assert size[:, prefix:].sum(dim=1).tolist() == [16, 16]


def test_no_more_than_half_of_the_patches_merge():
    assert tokenlearner.cost(tome(host("class token, registers"), 100), SIZE).tokens == (19, 11, 7)
    odd = host(img_size=12)
    assert tokenlearner.cost(tome(odd, 100), (3, 12, 12)).tokens == (9, 5, 3)


def test_the_features_are_what_the_head_reads():
    merging, images = tome(host(), 3), torch.randn(2, *SIZE)
    features = merging.forward_features(images)
    assert features.shape == (2, 7, 16)
    assert torch.equal(merging.forward_head(features), merging(images))


def test_it_is_a_copy_with_the_hosts_keys_and_notes():
    model, images = host(), torch.randn(2, *SIZE)
    model.preprocessing, model.label_names = Preprocessing(SIZE), ["a", "b", "c", "d", "e"]
    expected = model(images)
    merging = tome(model, 3)
    assert list(merging.state_dict()) == list(model.state_dict())
    assert (merging.num_classes, merging.label_names) == (5, model.label_names)
    assert Preprocessing.of(merging) == Preprocessing.of(model)
    assert merging.get_classifier() is merging.head
    merging.head.weight.data.zero_()
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_the_same_and_their_own(clone):
    merging, images = tome(host("class token, registers"), 3), torch.randn(2, *SIZE)
    expected, other = merging(images), clone(merging)
    assert torch.equal(other(images), expected)
    other.blocks[0].r = 0
    other.norm.weight.data.zero_()
    assert torch.equal(merging(images), expected)


def test_in_half_precision_sizes_stay_whole():
    merging = tome(host(), 8).bfloat16()
    sizes = []
    merging.blocks[2].register_forward_hook(lambda module, args, out: sizes.append(out[1]))
    assert merging(torch.randn(1, *SIZE).bfloat16()).dtype == torch.bfloat16
    assert sizes[0].dtype == torch.float32
    assert sizes[0].sum() == 16


@pytest.mark.parametrize("r", [-1, [1, 2], [1, 2, -3]])
def test_numbers_that_do_not_fit(r):
    with pytest.raises(tokenlearner.InputError, match="one for each of 3 layers"):
        tome(host(), r)


def test_hosts_that_are_refused():
    for name, options, reason in [
        ("vit_relpos_small_patch16_224", {}, "not VisionTransformerRelPos"),
        ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}, "pools by"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, "patch_drop_rate=0"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}, "Block with Attention"),
    ]:
        with torch.device("meta"):
            model = timm.create_model(name, depth=2, **options)
        with pytest.raises(tokenlearner.InputError, match=reason):
            tome(model, 1)
    with pytest.raises(tokenlearner.InputError, match="has a TokenLearner already"):
        tome(tokenlearner.insert(VisionTransformer(embed_dim=16, num_heads=2, depth=2), 4), 1)
