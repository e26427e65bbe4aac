"""Counted multiply-adds against the closed form, written out once more here, and against the paper's tables."""

import copy
import json
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from insertion.clips import WAYS, tiny_vivit
from insertion.hosts import FUSERS, images, inserted, tiny
from tokenlearner import TokenLearner, cost, insert, load, save
from tokenlearner.inspection.cost import describe_tokens

TABLES = Path(__file__).parents[3] / "shared" / "paper_tables.json"


def layer(n, d, m):
    """Queries, keys and values; attention's two products; the output projection; the MLP."""
    return 3 * n * d**2 + 2 * n**2 * d + n * d**2 + 2 * n * d * m


def learner(kind, n, s, d):
    alpha = {
        "mlp": n * d * 64 + n * 64 * s,
        "conv": 9 * n * (d * s + 3 * s**2),
        "conv1": 9 * n * d * s,
        "gate": 49 * n * 2 * s,
        "dense": 0,
        "grid": 0,
    }
    return alpha[kind] + s * n * d


def fuser(kind, n, s, d):
    if kind == "reproject":  # q and output for all positions, k and v for the tokens
        return 2 * n * d**2 + 2 * s * d**2 + 2 * n * s * d
    beta = s * s * d + n * (d * 64 + 64 * s) if kind == "fuser" else 0
    return beta + n * s * d


def closed_form(model, s=8, at=None, kind="mlp", fused=None):
    """Multiply-adds of a ViT at the size it was built for, with ``s`` tokens learned before layer ``at``."""
    d, m, prefix, depth = model.embed_dim, model.embed_dim * 4, model.num_prefix_tokens, len(model.blocks)
    n = model.patch_embed.num_patches
    total = n * d * 3 * model.patch_embed.patch_size[0] ** 2 + d * model.num_classes
    if at is None:
        return total + depth * layer(prefix + n, d, m)
    total += at * layer(prefix + n, d, m) + (depth - at) * layer(prefix + s, d, m)
    if fused is None:
        return total + learner(kind, n, s, d)
    return total + (depth - at) * (learner(kind, n, s, d) + fuser(fused, n, s, d))


@cache
def built(**options):
    """A ViT-B/16 unless told otherwise, without numbers: no weights are drawn and none are stored."""
    with torch.device("meta"):
        return VisionTransformer(**options, weight_init="skip")


def host(**options):
    return copy.deepcopy(built(**options))


def own_size(model):
    return (3, *model.patch_embed.img_size)


B16_384 = {"img_size": 384}
S32 = {"patch_size": 32, "embed_dim": 384, "num_heads": 6}
WIDE = {"img_size": (160, 320), "reg_tokens": 4, "num_classes": 10}


def assert_parts_add_up(counted):
    assert sum(part.macs for part in counted.layers) == counted.macs
    assert sum(part.parameters for part in counted.layers) == counted.parameters
    assert all(part.macs >= 0 and part.parameters >= 0 for part in counted.layers)


@pytest.mark.parametrize(("options", "gmacs"), [({}, 17.56), (B16_384, 55.48), (S32, 1.14), (WIDE, 18.30)])
def test_plain_hosts(options, gmacs):
    model = host(**options)
    counted = cost(model, own_size(model))
    assert counted.macs == closed_form(model)
    assert counted.macs / 1e9 == pytest.approx(gmacs, abs=0.005)  # the closed form's own check: known totals
    assert counted.flops == 2 * counted.macs
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    n = model.num_prefix_tokens + model.patch_embed.num_patches
    assert counted.tokens == (n,) * 12
    assert_parts_add_up(counted)


# 1 is after the first layer, 1.0 after the last.
@pytest.mark.parametrize(
    ("options", "at", "index", "s"),
    [
        ({}, 0, 0, 8),
        ({}, 1, 1, 16),
        ({}, 0.3, 3, 1),
        ({}, 1.0, 12, 8),
        (B16_384, 0.5, 6, 8),
        (S32, 9, 9, 16),
        (WIDE, 0.5, 6, 8),
        (WIDE, 1.0, 12, 3),
    ],
)
def test_a_learner_somewhere(options, at, index, s):
    model = insert(host(**options), s, at)
    counted = cost(model, own_size(model))
    assert counted.macs == closed_form(model, s, index)
    prefix, n = model.num_prefix_tokens, model.patch_embed.num_patches
    assert counted.tokens == (prefix + n,) * index + (prefix + s,) * (12 - index)
    assert_parts_add_up(counted)


@pytest.mark.parametrize("kind", ["mlp", "conv", "conv1", "gate", "dense", "grid"])
@pytest.mark.parametrize("fused", FUSERS)
def test_every_kind_with_every_fuser(kind, fused):
    model = host(**WIDE, depth=3)
    expected = closed_form(model, 8, 1, kind, fused)
    counted = cost(insert(model, 8, 1, kind, fuser=fused), own_size(model))
    assert counted.macs == expected
    assert counted.tokens == (205, 13, 13)  # inside a fused layer too the block runs on the tokens
    assert_parts_add_up(counted)


@pytest.mark.parametrize("fused", FUSERS)
def test_extra_layers_cost_what_layers_cost(fused):
    longer, model = host(depth=5), host(depth=3)
    counted = cost(insert(model, 8, 2, fuser=fused, extra_layers=2))
    assert counted.macs == closed_form(longer, 8, 2, "mlp", fused)
    assert counted.tokens == (197, 197, 9, 9, 9)


def test_the_parts_are_those_of_the_model_in_order():
    model = insert(host(depth=3), 8, 1, fuser="fuser")
    parts = {part.name: part for part in cost(model).layers}
    assert list(parts) == ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm", "head", "other"]
    assert [part.tokens for part in parts.values()] == [None, 197, 9, 9, None, None, None]
    assert [part.macs for part in parts.values()] == [
        196 * 768 * 768,
        layer(197, 768, 3072),
        *[layer(9, 768, 3072) + learner("mlp", 196, 8, 768) + fuser("fuser", 196, 8, 768)] * 2,
        0,
        768 * 1000,
        0,
    ]
    own = 12 * 768**2 + 13 * 768  # q, k, v, output and MLP with their biases, and two norms
    alpha = 2 * 768 + 768 * 64 + 64 + 64 * 8 + 8
    mixed = 4 * 768 + 8 * 8 + 8
    assert [part.parameters for part in parts.values()] == [
        768 * 768 + 768,
        own,
        *[own + alpha + (alpha + mixed)] * 2,
        2 * 768,
        768 * 1000 + 1000,
        768 + 197 * 768,  # the class token and the position embedding
    ]


def test_a_learner_after_the_last_layer_counts_with_the_norm():
    model = insert(host(depth=2), 8, 1.0)
    parts = {part.name: part.macs for part in cost(model).layers}
    assert parts["norm"] == learner("mlp", 196, 8, 768)


def test_tied_parameters_count_once():
    model = tiny(depth=2)
    before = cost(model, (3, 32, 32))
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    after = cost(model, (3, 32, 32))
    assert before.parameters - after.parameters == 32 * 128
    assert after.macs == before.macs
    assert_parts_add_up(after)


def paper_rows():
    if not TABLES.exists():
        return [pytest.param(None, marks=pytest.mark.skip(f"the paper's tables are not in {TABLES}"))]
    rows = json.loads(TABLES.read_text())["table4_fuser"]
    return [pytest.param(row, id=row["name"]) for row in rows if row["fits"]]


@pytest.mark.parametrize("row", paper_rows())
def test_the_papers_table_4(row):
    base, patch = row["base"].split("/")
    width, heads = {"B": (768, 12), "L": (1024, 16)}[base]
    model = host(
        img_size=row["res"],
        patch_size=int(patch),
        embed_dim=width,
        depth=row["layers"],
        num_heads=heads,
        class_token=False,
        global_pool="avg",
    )
    insert(model, row["tokens"], row["at"], "conv", fuser="fuser" if row["fuser"] else None)
    assert cost(model, (3, row["res"], row["res"])).macs / 1e9 == pytest.approx(row["gmacs"], rel=0.01)


def test_models_that_are_no_vits():
    model = timm.create_model("resnet18")
    counted = cost(model)
    assert 1.81e9 < counted.macs < 1.82e9  # as fvcore counts it
    assert counted.parameters == 11_689_512
    assert counted.tokens == ()
    assert [part.name for part in counted.layers] == [
        *("conv1", "bn1"),
        *(f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)),
        "fc",
    ]
    assert_parts_add_up(counted)
    assert cost(nn.Linear(5, 7), (5,)).macs == 35
    assert cost(TokenLearner(32, 4), (6, 9, 32)).macs == learner("mlp", 54, 4, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_does_not_matter(dtype):
    model = inserted(tiny(), fuser="fuser")
    assert cost(copy.deepcopy(model).to(dtype), (3, 32, 32)) == cost(model, (3, 32, 32))


@pytest.mark.parametrize("fused", FUSERS)
def test_saved_and_meta_models_cost_the_same(tmp_path, fused):
    model = inserted(tiny(), kind="dense", fuser=fused, extra_layers=1)
    expected = cost(model, (3, 32, 32))
    assert cost(load(save(model, tmp_path)), (3, 32, 32)) == expected
    assert cost(copy.deepcopy(model).to("meta"), (3, 32, 32)) == expected


def test_dynamic_sizes_are_counted_as_given():
    model = insert(host(dynamic_img_size=True, depth=2), 8, 1)
    for size in (96, 224, 384):
        fixed = insert(host(img_size=size, depth=2), 8, 1)
        assert cost(model, (3, size, size)).macs == cost(fixed, (3, size, size)).macs


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [list(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 40, 32)], ids=["succeeds", "fails"])
@pytest.mark.parametrize("fused", FUSERS)
def test_the_model_is_left_as_it_was(fused, size):
    model = inserted(tiny(), kind="gate", fuser=fused)
    model.train()
    model.blocks[1].eval()
    model.head.requires_grad_(False)
    before = {
        "modes": [module.training for module in model.modules()],
        "hooks": hooks(model),
        "trained": [p.requires_grad for p in model.parameters()],
        "identities": [id(t) for t in model.state_dict(keep_vars=True).values()],
    }
    state, x = copy.deepcopy(model.state_dict()), images()
    if size == (3, 32, 32):
        cost(model, size)
    else:
        with pytest.raises(ValueError, match=r"VisionTransformer can't take an input of \(3, 40, 32\): Input height"):
            cost(model, size)
    assert before == {
        "modes": [module.training for module in model.modules()],
        "hooks": hooks(model),
        "trained": [p.requires_grad for p in model.parameters()],
        "identities": [id(t) for t in model.state_dict(keep_vars=True).values()],
    }
    assert all(t.device.type == "cpu" and torch.equal(t, state[key]) for key, t in model.state_dict().items())
    model(x).sum().backward()
    assert learners_train(model)


def learners_train(model):
    return all(p.grad is not None for name, p in model.named_parameters() if "alpha" in name)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("fused", "mix"), WAYS)
def test_clips(fused, mix, kind):
    """3 slices of 2×4 tubelets of 2×8×8, 5 tokens in each from layer 1 of 4 on, and a class token."""
    d, n, t, s = 32, 8, 3, 5
    model = insert(tiny_vivit(class_token=True), s, 1, kind, fused, mix=mix)
    counted = cost(model, (3, 6, 16, 32))
    late = t * learner(kind, n, s, d) + 3 * layer(1 + t * s, d, 4 * d)
    if fused:
        late += 2 * t * learner(kind, n, s, d) + 3 * t * fuser(fused, n, s, d)
    if mix == "clip":  # M is S·T × S·T
        late += 3 * ((t * s) ** 2 - t * s**2) * d
    assert counted.macs == t * n * d * 3 * 2 * 8 * 8 + layer(1 + t * n, d, 4 * d) + late + 5 * d
    assert counted.tokens == (1 + t * n,) + (1 + t * s,) * 3
    assert counted.input_size == (3, 6, 16, 32)
    assert_parts_add_up(counted)
    with pytest.raises(ValueError, match=r"ViViT can't take an input of \(3, 16, 32\): the model takes clips as"):
        cost(model, (3, 16, 32))


@pytest.mark.parametrize("size", [(), (3, 0, 32), (3, -32, 32)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="input_size is one input's shape without a batch axis, such as"):
        cost(tiny(), size)


@pytest.mark.parametrize("size", [(32, 32), (1, 3, 32, 32), (1, 32, 32), (3, 64, 64)])
def test_sizes_the_model_cannot_take(size):
    with pytest.raises(ValueError, match="VisionTransformer can't take an input of "):
        cost(tiny(), size)


def test_what_is_printed_and_written():
    counted = cost(insert(host(), 8, 0.5))
    assert str(counted) == "86.62 M parameters, 9.234 GMACs = 18.468 GFLOPs at 3×224×224, tokens 197×6 + 9×6"
    document = json.loads(json.dumps(counted.to_dict()))
    assert document["macs"] == counted.macs
    assert document["flops"] == 2 * counted.macs
    assert document["tokens"] == [197] * 6 + [9] * 6
    assert document["input_size"] == [3, 224, 224]
    assert document["layers"][1] == {
        "name": "blocks.0",
        "parameters": 7_087_872,
        "macs": layer(197, 768, 3072),
        "tokens": 197,
        "flops": 2 * layer(197, 768, 3072),
    }
    assert sum(part["macs"] for part in document["layers"]) == document["macs"]


@pytest.mark.parametrize(
    ("tokens", "text"), [((), ""), ((5,), "5×1"), ((9, 9, 4), "9×2 + 4×1"), ((4, 9, 9, 4), "4×1 + 9×2 + 4×1")]
)
def test_describe_tokens(tokens, text):
    assert describe_tokens(tokens) == text
