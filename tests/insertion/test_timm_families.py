"""timm's ViTs that are no VisionTransformer: what their layers know of places does not reach learned tokens."""

import copy
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.eva import Eva
from torch import nn
from torch.testing import assert_close

import tokenlearner
import tokenlearner.models
from insertion.hosts import DEPTH, images, inserted, shake
from tokenlearner import attention_maps, insert, remove
from tokenlearner.insertion import inserted_parameters, learners
from tokenlearner.insertion.hosts import TIMM

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 5}
NEW_KEY = re.compile("token_(learner|fuser)")  # CaiT has blocks_token_only
ROPE = {"embed_dim": 64, "num_heads": 4}
FAMILIES = {
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "EVA with norms after the branches": ("eva02_enormous_patch14_clip_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {"init_values": 0.1}),
    "DINOv3 of any size": ("vit_small_patch16_dinov3", {"dynamic_img_size": True}),
    "rotation of each layer": ("vit_small_patch16_rope_mixed_224", {}),
    "attention pooling": ("vit_pe_core_tiny_patch16_384", {}),
    "BEiT v2": ("beitv2_base_patch16_224", {"init_values": 0.1}),
    "BEiT, one bias": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": None},
    ),
    "relative positions": ("vit_relpos_small_patch16_224", {"init_values": 0.1}),
    "relative positions, one MLP": ("vit_srelpos_small_patch16_224", {}),
    "relative positions, a table and a class token": (
        "vit_relpos_base_patch16_clsgap_224",
        {"rel_pos_type": "bias", "global_pool": "avg"},
    ),
    "relative positions, one table and a class token": (
        "vit_relpos_base_patch16_clsgap_224",
        {"rel_pos_type": "bias", "shared_rel_pos": True},
    ),
    "relative positions, norms after the branches": ("vit_relpos_medium_patch16_rpn_224", {}),
    "NaFlex": ("naflexvit_base_patch16_gap", {}),
    "NaFlex, attention pooling and registers": ("naflexvit_so150m2_patch16_reg1_map", {}),
    "NaFlex with rotation": ("naflexvit_base_patch16_gap", {"rope_type": "dinov3", "class_token": True, **ROPE}),
    "NaFlex with a rotation of each layer": ("naflexvit_base_patch16_gap", {"rope_type": "mixed"}),
    "CaiT": ("cait_xxs24_224", {}),
    "VisionTransformer, attention pooling": ("vit_base_patch16_siglip_224", {}),
    "VisionTransformer, distilled": ("deit_tiny_distilled_patch16_224", {}),
}
NEW = {name: family for name, family in FAMILIES.items() if not name.startswith("VisionTransformer")}
# One of each way of knowing places, for what takes long.
WAYS = [
    "DINOv3 of any size",
    "rotation of each layer",
    "BEiT v2",
    "BEiT, one bias",
    "relative positions, a table and a class token",
    "NaFlex with rotation",
    "CaiT",
]
ROTATED = ("rotation of each layer", "NaFlex with a rotation of each layer")


def small(family):
    architecture, options = FAMILIES[family]
    model = timm.create_model(architecture, **{**SMALL, **options}).eval()
    shake(*model.parameters())
    return model


def prefix_of(host):
    return 0 if type(host).__name__ == "Cait" else host.num_prefix_tokens


def enter(host, x):
    """The tokens that reach the first layer, and what each layer is handed besides."""
    kind = type(host).__name__
    if kind == "NaFlexVit":
        x, grid = host.embeds(x)
        rope = host.rope.get_embed(shape=grid) if host.rope is not None else None
        per_layer = rope if host.rope_is_mixed else [rope] * DEPTH
        return host.norm_pre(x), [{} if rope is None else {"rope": r} for r in per_layer]
    x = host.patch_embed(x)
    if kind == "Eva":
        x, rope = host._pos_embed(x)
        return host.norm_pre(x), [{"rope": r} for r in (rope if host.rope_mixed else [rope] * DEPTH)]
    if kind == "Cait":
        return x + host.pos_embed, [{}] * DEPTH
    if kind in ("Beit", "VisionTransformerRelPos"):
        if host.cls_token is not None:
            x = torch.cat([host.cls_token.expand(len(x), -1, -1), x], dim=1)
        if kind == "VisionTransformerRelPos":
            return x, [{"shared_rel_pos": host.shared_rel_pos and host.shared_rel_pos.get_bias()}] * DEPTH
        x = x if host.pos_embed is None else x + host.pos_embed
        return x, [{"shared_rel_pos_bias": host.rel_pos_bias and host.rel_pos_bias()}] * DEPTH
    return host.norm_pre(host._pos_embed(x)), [{}] * DEPTH


def off_grid(host, layer, x):
    """A layer on learned tokens: no rotation, and a bias only where the class token takes part."""
    if type(host).__name__ not in ("Beit", "VisionTransformerRelPos"):
        return layer(x)
    attn = layer.attn
    holder = getattr(host, "rel_pos_bias", None) or getattr(host, "shared_rel_pos", None) or attn
    table = getattr(getattr(attn, "rel_pos", None) or holder, "relative_position_bias_table", None)
    bias = torch.zeros(attn.num_heads, x.shape[1], x.shape[1])
    if table is not None and prefix_of(host):
        for head in range(attn.num_heads):
            bias[head, 0, 1:], bias[head, 1:, 0], bias[head, 0, 0] = table[-3:, head]

    def attend(x):
        qkv_bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if hasattr(attn, "q_bias") else attn.qkv.bias
        qkv = F.linear(x, attn.qkv.weight, qkv_bias).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * attn.scale + bias).softmax(dim=-1)
        return attn.proj((weights @ v).transpose(1, 2).flatten(2))

    if type(layer).__name__ == "ResPostRelPosBlock":
        x = x + layer.norm1(attend(x))
        return x + layer.norm2(layer.mlp(x))
    one = getattr(layer, "ls1", None) or (lambda y: y if layer.gamma_1 is None else layer.gamma_1 * y)
    two = getattr(layer, "ls2", None) or (lambda y: y if layer.gamma_2 is None else layer.gamma_2 * y)
    x = x + one(attend(layer.norm1(x)))
    return x + two(layer.mlp(layer.norm2(x)))


def by_hand(host, model, x, at=2, grid=(4, 4)):
    """The features ``model`` must give, out of the bare host's own parts."""
    bare = copy.deepcopy(host)
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if not NEW_KEY.search(key)})
    count = prefix_of(bare)
    x, handed = enter(bare, x)
    for i, layer in enumerate(bare.blocks):
        if i < at:
            x = layer(x, **handed[i])
            continue
        fuser = getattr(model.blocks[i], "token_fuser", None)
        prefix, X = x[:, :count], x[:, count:]
        if fuser is not None:
            out = off_grid(bare, layer, torch.cat([prefix, learners(model)[i](X, grid)], dim=1))
            x = torch.cat([out[:, :count], fuser(out[:, count:], X)], dim=1)
        else:
            x = off_grid(bare, layer, torch.cat([prefix, learners(model)[i](X, grid)], dim=1) if i == at else x)
    x = bare.forward_cls(x) if type(bare).__name__ == "Cait" else x
    return bare.norm(x)


# As many tokens as the grid has patches: then a rotation or bias of the grid's would fit, and give something wrong.
@pytest.mark.parametrize("num_tokens", [8, 16])
@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_by_hand(family, fuser, num_tokens):
    host, x = small(family), images()
    model = inserted(host, num_tokens, fuser=fuser)
    expected = by_hand(host, model, x)
    assert_close(model.forward_features(x), expected)
    assert_close(model(x), host.forward_head(expected))
    assert not torch.allclose(model(x), host(x), atol=1e-3)


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", NEW)
def test_removed_is_the_host_bit_for_bit(family, fuser):
    host, x = small(family), images()
    keys, out, plain = list(host.state_dict()), host(x), [sorted(vars(m)) for m in host.modules()]
    extra = 0 if family in ROTATED else 1
    model = insert(host, fuser=fuser, extra_layers=extra)
    found = [key for key in model.state_dict() if not NEW_KEY.search(key)]
    assert [key for key in found if f"blocks.{DEPTH}." not in key] == keys
    remove(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), out)
    assert [sorted(vars(m)) for m in model.modules()] == plain
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", NEW)
def test_backward_reaches_every_learner_and_checkpointing_changes_nothing(family, fuser):
    model, x = inserted(small(family), fuser=fuser).train(), images()
    for module in model.modules():  # jitter and dropout draw at random
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("shift_coords", "jitter_coords", "rescale_coords"):
            if hasattr(module, name):
                setattr(module, name, None)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    for m in (model, checkpointed):
        m(x).square().mean().backward()
    for learner in learners(model).values():
        assert learner.alpha.fc1.weight.grad.abs().max() > 0
    found = {name: p.grad for name, p in checkpointed.named_parameters()}
    assert_close(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("family", NEW)
def test_maps_and_cost(family):
    model = inserted(small(family), 4)
    assert attention_maps(model, images())[2].shape == (2, 4, 4, 4)
    count = prefix_of(model)
    assert tokenlearner.cost(model, (3, 32, 32)).tokens == (16 + count,) * 2 + (4 + count,) * 2


@pytest.mark.parametrize(("architecture", "side"), [("vit_tiny_r_s16_p8_224", 128), ("vitamin_small_224", 64)])
def test_hosts_on_convolutional_features(architecture, side, tmp_path):
    """A ResNet's, and ViTamin's: tokens are learned from the 4×4 features of the network before the layers."""
    host = timm.create_model(architecture, img_size=side, depth=2, num_classes=5).eval()
    x = torch.randn(2, 3, side, side)
    plain, keys = host(x), list(host.state_dict())
    model = tokenlearner.insert(host, 3, 1)
    assert attention_maps(model, x)[1].shape == (2, 3, 4, 4)
    out = model(x)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert tokenlearner.cost(model, (3, side, side)).tokens[1] < tokenlearner.cost(model, (3, side, side)).tokens[0]
    torch.testing.assert_close(tokenlearner.load(tokenlearner.save(model, tmp_path))(x), out.detach())
    assert torch.equal(tokenlearner.remove(model)(x), plain)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", NEW)
def test_copies_are_the_same_and_their_own(family, fuser):
    model, x = inserted(small(family), fuser=fuser), images()
    out = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), out)
        shake(*twin.parameters())
        assert not torch.allclose(twin(x), out, atol=1e-3)
        assert torch.equal(model(x), out)
        remove(twin)


def test_a_copy_has_the_bias_of_its_own_table():
    model, x = inserted(small("BEiT v2")), images()
    twin, out = copy.deepcopy(model), model(x)
    shake(model.blocks[3].attn.relative_position_bias_table)
    assert torch.equal(twin(x), out)
    assert not torch.equal(model(x), out)


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", NEW)
def test_saved_and_loaded(family, fuser, tmp_path):
    host, x = small(family), images()
    for i, model in enumerate((host, inserted(host, fuser=fuser))):
        loaded = tokenlearner.load(tokenlearner.save(model, tmp_path / str(i)))
        assert type(loaded) is type(model)
        assert torch.equal(loaded(x), model(x))


def test_saved_in_half_precision(tmp_path):
    for family in ("DINOv3", "BEiT v2", "EVA-02"):
        model, x = inserted(small(family)).bfloat16(), images().bfloat16()
        loaded = tokenlearner.load(tokenlearner.save(model, tmp_path / family))
        assert torch.equal(loaded(x), model(x))


def test_a_model_made_with_its_tokens_by_name_is_saved_and_loaded(tmp_path):
    model, x = timm.create_model("tokenlearner_vit", host="eva02_tiny_patch14_224", tokens=4, **SMALL).eval(), images()
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path))
    assert torch.equal(loaded(x), model(x))


def test_saving_a_host_that_timm_did_not_make_is_refused(tmp_path):
    host = insert(Eva(**SMALL))
    with pytest.raises(ValueError, match=r"Eva can only be described by the name it has in timm; make it with timm\."):
        tokenlearner.save(host, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", WAYS)
def test_exported_with_a_dynamic_batch(family, fuser):
    model = inserted(small(family), fuser=fuser)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        x = images(batch=batch)
        assert_close(program.module()(x), model(x))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", WAYS)
def test_compiled_in_one_graph(family, fuser):
    torch._dynamo.reset()
    model, x = inserted(small(family), fuser=fuser), images()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", [name for name in NEW if name not in ROTATED])
def test_extra_layers_start_as_the_identity_and_train(family, fuser):
    host, x = small(family), images()
    plain = insert(copy.deepcopy(host), fuser=fuser)
    model = insert(copy.deepcopy(host), fuser=fuser, extra_layers=1)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(x), plain(x))
    optimizer = torch.optim.SGD(model.blocks[DEPTH].parameters(), lr=0.1)
    for _ in range(3 if fuser else 2):  # a step for the fuser, one for what scales a branch, one for what is behind it
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    behind = [
        p for n, p in model.blocks[DEPTH].named_parameters() if p.ndim > 1 and not NEW_KEY.search(n) and "rel" not in n
    ]
    assert all(p.grad.abs().max() > 0 for p in behind)


@pytest.mark.parametrize("family", ROTATED)
def test_a_rotation_of_each_layer_takes_no_extra_layers(family):
    host = small(family)
    keys = list(host.state_dict())
    with pytest.raises(ValueError, match="one rotation for each of its layers and none for more; use extra_layers=0"):
        insert(host, extra_layers=1)
    assert list(host.state_dict()) == keys


@pytest.mark.parametrize("family", NEW)
def test_intermediate_layers_after_the_learner_have_no_map(family):
    host, x = small(family), images()
    model = inserted(host)
    with pytest.raises(ValueError, match=r"layers 2, 3 run on 8 learned tokens.*use output_fmt='NLC'"):
        model.forward_intermediates(x)
    _, early = model.forward_intermediates(x, [0, 1])
    assert_close(early, host.forward_intermediates(x, [0, 1])[1])
    _, late = model.forward_intermediates(x, output_fmt="NLC")
    assert [len(out[0]) for out in late] == [16, 16, 8, 8]


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # timm's, resizing BEiT's table
@pytest.mark.parametrize("family", ["BEiT v2", "BEiT, one bias", "relative positions", "DINOv3"])
def test_set_input_size_after_insertion(family):
    host, x = small(family), images(16, 48)
    model = inserted(host, kind="conv")
    for vit in (host, model):
        vit.set_input_size((16, 48))
    assert_close(model.forward_features(x), by_hand(host, model, x, grid=(2, 6)))


@pytest.mark.parametrize("family", ["DINOv3 of any size", "NaFlex", "NaFlex with rotation"])
def test_images_of_any_size(family):
    host = small(family)
    model = inserted(host, kind="conv")
    for size in [(16, 64), (64, 16), (48, 24)]:
        x = images(*size)
        assert_close(model.forward_features(x), by_hand(host, model, x, grid=(size[0] // 8, size[1] // 8)))


def test_naflex_batches_of_patches_are_refused():
    model = insert(small("NaFlex"))
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    batch = {
        "patches": torch.randn(2, 16, 8 * 8 * 3),
        "patch_coord": torch.stack([y, x], dim=-1).reshape(1, 16, 2).expand(2, -1, -1),
        "patch_valid": torch.ones(2, 16, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=r"no grid to learn tokens from; give images \(b, c, h, w\) of one size"):
        model(batch)
    assert remove(model)(batch).shape == (2, 5)


@pytest.mark.parametrize("family", ["DINOv3", "NaFlex"])
def test_masks_are_refused(family):
    model = insert(small(family))
    count = 16 + model.num_prefix_tokens
    with pytest.raises(ValueError, match="an attention mask over the patches does not fit the learned tokens"):
        model.forward_features(images(), attn_mask=torch.zeros(1, 1, count, count))


def test_patch_dropout_is_refused():
    for family in ("DINOv3", "NaFlex"):
        architecture, options = FAMILIES[family]
        host = timm.create_model(architecture, **{**SMALL, **options, "patch_drop_rate": 0.5})
        with pytest.raises(ValueError, match="create the host with patch_drop_rate=0"):
            insert(host)


def test_class_attention_leaves_no_place_after_the_last_layer():
    host = small("CaiT")
    with pytest.raises(ValueError, match=r"at=4 is after the last of 4 layers, and Cait has no module there"):
        insert(host, at=DEPTH)
    assert not inserted_parameters(host)


@pytest.mark.parametrize("family", [name for name in NEW if name != "CaiT"])
def test_after_the_last_layer(family):
    host, x = small(family), images()
    model = inserted(host, at=DEPTH)
    count = prefix_of(host)
    x_out, handed = enter(host, x)
    for layer, arguments in zip(host.blocks, handed):
        x_out = layer(x_out, **arguments)
    learned = learners(model)[DEPTH](x_out[:, count:], (4, 4))
    assert_close(model.forward_features(x), host.norm(torch.cat([x_out[:, :count], learned], dim=1)))


@pytest.mark.parametrize("family", NEW)
def test_learned_weight_of_each_position(family):
    insert(small(family), kind="dense")  # which asks the host for its grid


REFUSED = {
    "samvit_base_patch16": "its layers attend in windows of the patch grid",
    "convit_tiny": "its first layers attend by distance on a square grid",
    "xcit_nano_12_p16_224": "every one of its layers convolves the patch grid",
    "swin_tiny_patch4_window7_224": "SwinTransformer can't be a host: its grid shrinks from stage to stage",
    "qwen3_vit_88m": r"hands its patches on as a \(h, w\) grid after the last layer",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_transformers_are_refused_with_the_reason(name):
    with torch.device("meta"):
        host = timm.create_model(name)
    with pytest.raises(TypeError, match=REFUSED[name]):
        insert(host)


def test_adapters_offer_what_insertion_asks_for():
    from tokenlearner.insertion.host import Host

    asked = {name for name in vars(Host) if not name.startswith("_")}
    for adapter in TIMM:
        assert asked <= set(dir(adapter)), adapter
