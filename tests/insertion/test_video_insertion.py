"""insert() into a ViViT: tokens learned per slice, and all that holds for images held for clips too."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from insertion.clips import GRID, SLICES, WAYS, clips, naive_layers, tiny_vivit
from insertion.hosts import DEPTH, images, inserted, shake, tiny
from tokenlearner import attention_maps, insert, insertion_of, learners, load, remove, save
from tokenlearner.core import KINDS
from tokenlearner.insertion import inserted_parameters
from tokenlearner.models import ViViT

HOSTS = {"mean": {}, "class token": {"class_token": True}, "registers": {"reg_tokens": 2, "no_embed_class": True}}
PLACES = [(way, at) for way in WAYS for at in (0, 2, DEPTH) if not (way[0] and at == DEPTH)]


@pytest.mark.parametrize("options", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize(("way", "at"), PLACES)
def test_output_and_input_gradient_are_those_of_a_loop_over_slices(options, way, at):
    host = tiny_vivit(**options)
    model = inserted(host, num_tokens=5, at=at, fuser=way[0], mix=way[1])
    x = clips().requires_grad_()
    features, expected = model.forward_features(x), naive_layers(host, model, x)[-1]
    assert_close(features, expected)
    assert_close(model(x), model.forward_head(expected))
    weights = torch.randn_like(features)
    (gradient,), (wanted,) = (torch.autograd.grad(y, x, weights) for y in (features, expected))
    assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    tokens = SLICES * (GRID[0] * GRID[1] if way[0] else 5) + host.num_prefix_tokens
    assert features.shape == (2, tokens, 32)


@pytest.mark.parametrize("fuser", [None, "fuser", "reproject"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_learner(kind, fuser):
    host, x = tiny_vivit(), clips()
    model = inserted(host, kind=kind, fuser=fuser)
    assert_close(model.forward_features(x), naive_layers(host, model, x)[-1])


def test_a_slice_alone_decides_on_its_tokens():
    model, x = inserted(tiny_vivit(), 3, 0), clips()
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    x[:, :, 2:4] += 1  # the frames of the slice in the middle
    model(x)
    changed = (seen[0] != seen[1]).any(dim=(0, 2))
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_mixing_over_the_clip_lets_slices_see_each_other_in_the_fuser():
    Y, X = torch.randn(1, 3 * SLICES, 32), torch.randn(1, SLICES, 8, 32)
    for mix, others in (("slice", False), ("clip", True)):
        fuser = inserted(tiny_vivit(), 3, fuser="fuser", mix=mix).blocks[2].token_fuser
        moved = Y.clone()
        moved[:, :3] += torch.randn(32)
        if mix == "slice":
            first, second = (fuser(y.unflatten(1, (SLICES, 3))[0], X[0]) for y in (Y, moved))
        else:
            first, second = (fuser(y, X)[0] for y in (Y, moved))
        assert (first != second).any(dim=(1, 2)).tolist() == [True, others, others]


@pytest.mark.parametrize(("fuser", "mix"), WAYS)
def test_the_hosts_keys_stay_and_remove_brings_the_host_back(fuser, mix):
    host, x = tiny_vivit(class_token=True), clips()
    before = copy.deepcopy(host)
    insert(host, at=1, fuser=fuser, extra_layers=2, mix=mix)
    keys = set(before.state_dict())
    assert [key for key in host.state_dict() if key in keys] == list(before.state_dict())
    assert list(learners(host)) == ([1, 2, 3, 4, 5] if fuser else [1])
    assert insertion_of(host).mix == mix
    added = dict(host.named_parameters()).keys() - dict(before.named_parameters()).keys()
    assert inserted_parameters(host).keys() == added
    shake(*inserted_parameters(host).values())
    assert not torch.allclose(host(x), before(x), atol=1e-3)

    assert remove(host) is host
    assert torch.equal(host(x), before(x))
    assert list(host.state_dict()) == list(before.state_dict())
    assert repr(host) == repr(before)
    assert host.__dict__.keys() == before.__dict__.keys()
    assert host.feature_info == before.feature_info


@pytest.mark.parametrize(("fuser", "mix"), WAYS)
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict", "assigned state_dict", "saved"])
def test_copies_are_the_same_and_independent(copied, fuser, mix, tmp_path):
    model, x = inserted(tiny_vivit(), fuser=fuser, extra_layers=1, mix=mix), clips()
    out, maps = model(x), attention_maps(model, x)[2]
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "saved":
        other = load(save(model, tmp_path))
        assert type(other) is ViViT
        assert insertion_of(other) == insertion_of(model)
    else:
        other = insert(tiny_vivit(), fuser=fuser, extra_layers=1, mix=mix)
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=copied.startswith("assigned"))
    assert torch.equal(other(x), out)
    assert list(other.state_dict()) == list(model.state_dict())
    shake(*other.parameters())
    assert not torch.allclose(other(x), out, atol=1e-3)
    assert torch.equal(model(x), out)
    assert torch.equal(attention_maps(model, x)[2], maps)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_attention_maps_are_those_of_each_slice(fuser, kind):
    host, x = tiny_vivit(reg_tokens=1), clips()
    model = inserted(host, 5, 1, kind, fuser)
    seen = {}
    naive_layers(host, model, x, seen=seen)
    maps = attention_maps(model, x)
    assert list(maps) == list(seen) == ([1, 2, 3] if fuser else [1])
    for i, learner in learners(model).items():
        assert maps[i].shape == (2, SLICES, 5, *GRID)
        for t in range(SLICES):
            assert_close(maps[i][:, t], learner.maps(seen[i][t], GRID).detach())


@pytest.mark.parametrize(("fuser", "mix"), [way for way in WAYS if way[0] != "unpool"])  # whose maps start random
def test_extra_layers_start_as_the_identity(fuser, mix):
    host, x = tiny_vivit(), clips()
    model = insert(copy.deepcopy(host), at=1, fuser=fuser, mix=mix)
    longer = insert(copy.deepcopy(host), at=1, fuser=fuser, extra_layers=2, mix=mix)
    longer.load_state_dict(model.state_dict(), strict=False)
    assert_close(longer(x), model(x))


@pytest.mark.parametrize(("fuser", "mix"), WAYS)
def test_gradients_with_checkpointing_are_those_without(fuser, mix):
    plain, x = inserted(tiny_vivit(), kind="gate", fuser=fuser, mix=mix).train(), clips()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    runs = []
    checkpointed.blocks[3].norm1.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        model(x).square().mean().backward()
    assert len(runs) == 2
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
        assert_close(q.grad, p.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(dict(checkpointed.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_two_shapes_of_as_many_tokens_waiting_for_their_backwards(fuser):
    plain = inserted(tiny_vivit(dynamic_img_size=True), kind="conv", fuser=fuser).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    xs = [clips(4, 16, 24), clips(6, 32, 8)]  # 2×2×3 and 3×4×1
    losses = [checkpointed(x).square().mean() for x in xs]
    for loss, x in zip(losses, xs):
        loss.backward()
        plain(x).square().mean().backward()
        for p, q in zip(plain.parameters(), checkpointed.parameters()):
            assert_close(q.grad, p.grad)
        plain.zero_grad()
        checkpointed.zero_grad()


@pytest.mark.parametrize("fuser", [None, "fuser", "unpool", "reproject"])
def test_clips_of_any_length_and_size(fuser):
    host = tiny_vivit(dynamic_img_size=True)
    model = inserted(host, fuser=fuser)
    for size, grid in [((4, 24, 16), (2, 3, 2)), ((2, 8, 40), (1, 1, 5))]:
        x = clips(*size)
        assert_close(model.forward_features(x), naive_layers(host, model, x, grid)[-1])


def test_clips_of_another_length_do_not_fit_a_mixing_over_the_clip():
    model = inserted(tiny_vivit(dynamic_img_size=True), fuser="fuser", mix="clip")
    assert model(clips(6, 8, 24)).isfinite().all()
    with pytest.raises(ValueError, match="mix='clip' was inserted for clips of 3 slices, and these have 2"):
        model(clips(4))


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("fuser", "mix"), [(None, "slice"), ("unpool", "slice"), ("fuser", "clip")])
@pytest.mark.usefixtures("without_shape_checks", "_fresh_dynamo")
def test_compiled_output_and_gradients(fuser, mix):
    model, x = inserted(tiny_vivit(depth=2, class_token=True), fuser=fuser, mix=mix), clips()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for m in (model, compiled):
        m(x).square().mean().backward()
    assert_close(compiled(x), model(x))
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_close({name: p.grad for name, p in compiled._orig_mod.named_parameters()}, expected)


@pytest.mark.usefixtures("without_shape_checks", "_fresh_dynamo")
def test_compiled_model_of_dynamic_sizes():
    model = inserted(tiny_vivit(depth=2, dynamic_img_size=True), kind="conv", fuser="fuser")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for size in [(6, 16, 32), (4, 32, 24), (8, 8, 16)]:
        x = clips(*size)
        assert_close(compiled(x), model(x))


@pytest.mark.parametrize(("fuser", "mix"), WAYS)
@pytest.mark.usefixtures("without_shape_checks", "_fresh_dynamo")
def test_exported_with_a_dynamic_batch(fuser, mix):
    kind = "mlp" if fuser == "unpool" else "conv"
    model = inserted(tiny_vivit(depth=2), kind=kind, fuser=fuser, mix=mix)
    program = torch.export.export(model, (clips(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        x = clips(batch=batch)
        assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("fuser", "mix"), WAYS)
def test_half_precision(fuser, mix, dtype):
    model, x = inserted(tiny_vivit(), fuser=fuser, mix=mix), clips()
    full = model(x)
    model.to(dtype)
    assert_close(model(x.to(dtype)).float(), full, rtol=0.05, atol=0.05 if dtype == torch.float16 else 0.3)


def test_intermediates_have_no_grid_after_the_insertion():
    host, x = tiny_vivit(class_token=True), clips()
    model = inserted(host, 5)
    expected = naive_layers(host, model, x)
    found = model.forward_intermediates(x, [0, 1])[1]
    for i in (0, 1):
        assert_close(found[i], expected[i][:, 1:].transpose(1, 2).unflatten(2, (SLICES, *GRID)))
    with pytest.raises(ValueError, match="layers 2, 3 run on 5 learned tokens"):
        model.forward_intermediates(x)
    assert_close(model.forward_intermediates(x, [3], output_fmt="NLC")[1][0], expected[3][:, 1:])
    fused = inserted(host, 5, fuser="fuser")
    assert fused.forward_intermediates(x, [3])[1][0].shape == (2, 32, SLICES, *GRID)


@pytest.mark.parametrize(
    ("host", "options", "sentence"),
    [
        (tiny_vivit, {"mix": "frame"}, "mix is 'slice' or 'clip', not 'frame'"),
        (tiny_vivit, {"mix": "clip"}, "so it needs fuser='fuser'"),
        (tiny_vivit, {"mix": "clip", "fuser": "unpool"}, "so it needs fuser='fuser'"),
        (tiny, {"mix": "clip", "fuser": "fuser"}, "so it needs a host that takes clips"),
        (lambda: tiny_vivit(patch_drop_rate=0.1), {}, "create the host with patch_drop_rate=0"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")  # beartype would refuse "frame" before we do
def test_what_is_refused(host, options, sentence):
    model = host()
    before = repr(model)
    with pytest.raises(ValueError, match=sentence):
        insert(model, **options)
    assert repr(model) == before


def test_images_do_not_pass_for_clips():
    with pytest.raises(ValueError, match=r"takes clips as \(b, c, t, h, w\), and got shape \(2, 3, 16, 32\)"):
        insert(tiny_vivit())(images(16, 32))


def test_the_mixing_is_told():
    told = insertion_of(insert(tiny_vivit(), fuser="fuser", mix="clip")).describe()
    assert told == "8 tokens (mlp) before layer 2 of 4 with fuser in every layer, mixed over the clip"
