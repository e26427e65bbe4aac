"""insert() with learners that look over time: maps that see neighbouring slices, and tokens of several slices."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from insertion.clips import GRID, WAYS, clips, fused_over_the_clip, tiny_vivit
from insertion.hosts import DEPTH, inserted, shake, spread_back, tiny
from tokenlearner import attention_maps, cost, insert, insertion_of, learners, load, remove, save
from tokenlearner.core import NeighbourTokenLearner, Unpool, WindowTokenLearner
from tokenlearner.insertion import inserted_parameters

SLICES, FRAMES = 4, 8
PLACES = [("neighbours", *way, at) for way in WAYS for at in (0, 2, DEPTH) if not (way[0] and at == DEPTH)]
PLACES += [("window", None, "slice", at) for at in (0, 2, DEPTH)]
INSERTIONS = [{"over": "neighbours", "fuser": fuser, "mix": mix} for fuser, mix in WAYS] + [{"over": "window"}]
NAMES = [" ".join(str(value) for value in options.values()) for options in INSERTIONS]
every_way = pytest.mark.parametrize("options", INSERTIONS, ids=NAMES)


def vivit(**options):
    """4 slices of 2×4 tubelets."""
    return tiny_vivit(num_frames=FRAMES, **options)


def naive_features(host, model, x, grid=(SLICES, *GRID), seen=None):
    """The host's layers with the learners called on whole clips; ``seen`` takes the clips that reach each."""
    bare = copy.deepcopy(host)
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "token_" not in key})
    count, x = bare.num_prefix_tokens, bare.norm_pre(bare._pos_embed(bare.patch_embed(x)))
    for i, (layer, carrier) in enumerate(zip([*bare.blocks, bare.norm], [*model.blocks, model.norm])):
        learner, fuser = learners(model).get(i), getattr(carrier, "token_fuser", None)
        if learner is None:
            x = layer(x)
            continue
        clip = x[:, count:].unflatten(1, grid)
        if seen is not None:
            seen[i] = clip
        Z, A = learner.tokens_and_maps(clip)
        x = layer(torch.cat([x[:, :count], Z.flatten(1, 2)], dim=1))
        if fuser is not None:
            Xs, Ys = clip.flatten(2, 3).unbind(1), x[:, count:].chunk(grid[0], dim=1)
            if getattr(fuser, "num_frames", None) is not None:
                back = fused_over_the_clip(fuser, Ys, Xs)
            else:
                maps = A.unbind(1) if isinstance(fuser, Unpool) else [None] * grid[0]
                back = [spread_back(fuser, Y, X, A_t) for Y, X, A_t in zip(Ys, Xs, maps)]
            x = torch.cat([x[:, :count], *(X + B for X, B in zip(Xs, back))], dim=1)
    return x


@pytest.mark.parametrize("prefix", [{}, {"class_token": True, "reg_tokens": 2}], ids=["mean", "prefix tokens"])
@pytest.mark.parametrize(("over", "fuser", "mix", "at"), PLACES)
def test_output_and_input_gradient_are_those_of_learners_called_by_hand(over, fuser, mix, at, prefix):
    host = vivit(**prefix)
    model = inserted(host, num_tokens=5, at=at, fuser=fuser, mix=mix, over=over)
    x = clips(FRAMES).requires_grad_()
    features, expected = model.forward_features(x), naive_features(host, model, x)
    assert_close(features, expected)
    assert_close(model(x), model.forward_head(expected))
    weights = torch.randn_like(features)
    (gradient,), (wanted,) = (torch.autograd.grad(y, x, weights) for y in (features, expected))
    assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    tokens = SLICES * GRID[0] * GRID[1] if fuser else 5 * SLICES if over == "neighbours" else 5 * SLICES // 2
    assert features.shape == (2, tokens + host.num_prefix_tokens, 32)


@pytest.mark.parametrize("kind", ["conv", "conv1", "gate"])
@pytest.mark.parametrize("over", ["neighbours", "window"])
def test_the_other_kinds(over, kind):
    host, x = vivit(), clips(FRAMES)
    model = inserted(host, kind=kind, over=over)
    assert_close(model.forward_features(x), naive_features(host, model, x))


@pytest.mark.parametrize(
    ("over", "cls", "window", "used"),
    [
        ("neighbours", NeighbourTokenLearner, None, 3),
        ("neighbours", NeighbourTokenLearner, 5, 5),
        ("window", WindowTokenLearner, None, 2),
        ("window", WindowTokenLearner, 4, 4),
    ],
)
def test_the_options_reach_the_learner_and_the_window_used_is_noted(over, cls, window, used):
    model = insert(vivit(), 3, kind="conv1", pool="sum", over=over, window=window)
    learner = learners(model)[2]
    assert type(learner) is cls
    assert (learner.num_tokens, learner.kind, learner.pool, learner.window) == (3, "conv1", "sum", used)
    assert (insertion_of(model).over, insertion_of(model).window) == (over, used)
    learner = learners(insert(vivit(), hidden_dim=24, dropout=0.25, over=over))[2]
    assert (learner.alpha.fc1.out_features, learner.alpha.drop.p) == (24, 0.25)


@pytest.mark.parametrize(
    ("over", "window", "moved"),
    [("neighbours", 3, [1, 1, 1, 0]), ("neighbours", 5, [1, 1, 1, 1]), ("window", 2, [1, 0]), ("window", 4, [1])],
)
def test_a_slice_reaches_the_tokens_of_its_window(over, window, moved):
    model, x = inserted(vivit(), 3, 0, over=over, window=window), clips(FRAMES)
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    x[:, :, 2:4] += torch.randn(2)[:, None, None]  # the frames of the slice with index 1
    model(x)
    changed = (seen[0] != seen[1]).any(dim=2).any(dim=0)
    assert changed.unflatten(0, (-1, 3)).any(dim=1).tolist() == moved


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(("fuser", "mix"), WAYS)
def test_new_neighbours_change_nothing(fuser, mix, kind):
    host, x = vivit(), clips(FRAMES)
    plain = inserted(host, kind=kind, fuser=fuser, mix=mix)
    model = insert(copy.deepcopy(host), kind=kind, fuser=fuser, mix=mix, over="neighbours")
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert {key.split(".")[-1] for key in missing} == {"time_weight"}
    assert unexpected == []
    assert torch.equal(model(x), plain(x))

    torch.manual_seed(5)
    one = insert(copy.deepcopy(host), kind=kind, fuser=fuser, mix=mix)
    torch.manual_seed(5)
    other = insert(copy.deepcopy(host), kind=kind, fuser=fuser, mix=mix, over="neighbours")
    assert torch.equal(one(x), other(x))


@every_way
def test_the_hosts_keys_stay_and_remove_brings_the_host_back(options):
    host, x = vivit(class_token=True), clips(FRAMES)
    before = copy.deepcopy(host)
    insert(host, at=1, extra_layers=1, **options)
    added = dict(host.named_parameters()).keys() - dict(before.named_parameters()).keys()
    assert inserted_parameters(host).keys() == added
    assert any(key.endswith(("time_weight", "frame_bias")) for key in added)
    assert remove(host) is host
    assert list(host.state_dict()) == list(before.state_dict())
    assert torch.equal(host(x), before(x))
    assert repr(host) == repr(before)
    assert host.__dict__.keys() == before.__dict__.keys()


@every_way
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "state_dict", "saved"])
def test_copies_are_the_same_and_independent(copied, options, tmp_path):
    model, x = inserted(vivit(), extra_layers=1, **options), clips(FRAMES)
    out, maps = model(x), attention_maps(model, x)[2]
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "saved":
        other = load(save(model, tmp_path))
    else:
        other = insert(vivit(), extra_layers=1, **options)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert insertion_of(other) == insertion_of(model)
    assert torch.equal(other(x), out)
    shake(*other.parameters())
    assert not torch.allclose(other(x), out, atol=1e-3)
    assert torch.equal(model(x), out)
    assert torch.equal(attention_maps(model, x)[2], maps)


@pytest.mark.parametrize("fuser", [None, "fuser", "unpool"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_attention_maps_of_neighbours_are_those_of_each_slice(kind, fuser):
    if fuser == "unpool" and kind == "conv":
        fuser = "reproject"  # by hand, unpool is written for the softmax form only
    host, x = vivit(reg_tokens=1), clips(FRAMES)
    model, seen = inserted(host, 5, 1, kind, fuser, over="neighbours"), {}
    naive_features(host, model, x, seen=seen)
    maps = attention_maps(model, x)
    assert list(maps) == list(seen) == ([1, 2, 3] if fuser else [1])
    for i, learner in learners(model).items():
        assert maps[i].shape == (2, SLICES, 5, *GRID)
        assert maps[i].dtype is torch.float32
        assert_close(maps[i], learner.maps(seen[i]).detach())


@pytest.mark.parametrize("window", [1, 2, 4])
def test_attention_maps_of_a_window_are_cut_into_slices(window):
    host, x = vivit(reg_tokens=1), clips(FRAMES)
    model, seen = inserted(host, 5, 1, over="window", window=window), {}
    naive_features(host, model, x, seen=seen)
    maps = attention_maps(model, x)[1]
    assert maps.shape == (2, SLICES, 5, *GRID)
    whole = learners(model)[1].maps(seen[1]).detach()
    for t in range(SLICES):
        assert_close(maps[:, t], whole[:, t // window, :, t % window])
    sums = maps.unflatten(1, (-1, window)).sum(dim=(2, 4, 5))
    assert_close(sums, torch.ones_like(sums))


@every_way
def test_gradients_with_checkpointing_are_those_without(options):
    plain, x = inserted(vivit(), kind="gate", **options).train(), clips(FRAMES)
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


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("over", "fuser"), [("neighbours", None), ("neighbours", "unpool"), ("window", None)])
@pytest.mark.usefixtures("without_shape_checks", "_fresh_dynamo")
def test_compiled_output_gradients_and_maps(over, fuser):
    model, x = inserted(vivit(depth=2, class_token=True), fuser=fuser, over=over), clips(FRAMES)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for m in (model, compiled):
        m(x).square().mean().backward()
    assert_close(compiled(x), model(x))
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_close({name: p.grad for name, p in compiled._orig_mod.named_parameters()}, expected)
    assert_close(attention_maps(compiled, x), attention_maps(model, x))


@pytest.mark.parametrize("over", ["neighbours", "window"])
@pytest.mark.usefixtures("without_shape_checks")
def test_exported_with_a_dynamic_batch(over):
    model = inserted(vivit(depth=2), over=over)
    program = torch.export.export(model, (clips(FRAMES),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        x = clips(FRAMES, batch=batch)
        assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("options", [{"over": "neighbours"}, {"over": "window"}], ids=["neighbours", "window"])
def test_bfloat16(options):
    model, x = inserted(vivit(), **options), clips(FRAMES)
    full = model(x)
    assert_close(model.bfloat16()(x.bfloat16()).float(), full, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("options", [{"over": "neighbours", "fuser": "fuser"}, {"over": "window"}])
def test_clips_of_another_length(options):
    host = vivit(dynamic_img_size=True)
    model = inserted(host, **options)
    for size, grid in [((4, 24, 16), (2, 3, 2)), ((12, 8, 40), (6, 1, 5))]:
        x = clips(*size)
        assert_close(model.forward_features(x), naive_features(host, model, x, grid))


def test_a_window_of_slices_that_are_not_there_is_refused():
    model = insert(vivit(dynamic_img_size=True), over="window")
    with pytest.raises(ValueError, match=r"got 3 frames .*give a multiple of 2"):
        model(clips(6))


def test_cost_counts_both():
    """Neighbours add no matrix product; windows cost less in the layers that run on fewer tokens."""
    n, d, s, at = SLICES * GRID[0] * GRID[1], 32, 5, 1

    def layers(tokens):
        return (DEPTH - at) * (12 * tokens * d**2 + 2 * tokens**2 * d)

    slices, neighbours, windows = (
        cost(insert(vivit(), s, at, over=over), (3, FRAMES, 16, 32)) for over in ("slice", "neighbours", "window")
    )
    assert neighbours.tokens == slices.tokens == (n,) + (s * SLICES,) * (DEPTH - at)
    assert windows.tokens == (n,) + (s * SLICES // 2,) * (DEPTH - at)
    assert neighbours.macs == slices.macs
    assert windows.macs == slices.macs - layers(s * SLICES) + layers(s * SLICES // 2)
    assert neighbours.parameters == slices.parameters + 3 * d
    assert windows.parameters == slices.parameters + 2 * s


@pytest.mark.parametrize(
    ("host", "options", "sentence"),
    [
        (vivit, {"over": "clip"}, "over is 'slice', 'neighbours' or 'window', not 'clip'"),
        (vivit, {"window": 3}, "window=3 counts slices for over='neighbours' or over='window'"),
        (
            tiny,
            {"over": "neighbours"},
            "over='neighbours' learns tokens over time, so it needs a host that takes clips",
        ),
        (tiny, {"over": "window"}, "over='window' learns tokens over time, so it needs a host that takes clips"),
        (vivit, {"over": "window", "window": 3}, "window=3 does not divide the 4 slices of the host's clips"),
        (vivit, {"over": "window", "window": 0}, "window must be a positive whole number, not 0"),
        (vivit, {"over": "neighbours", "window": 2}, "window must be odd"),
        (vivit, {"over": "window", "fuser": "fuser"}, "over='window' leaves no tokens of a single slice"),
        (vivit, {"over": "window", "fuser": "fuser", "mix": "clip"}, "which fuser='fuser' would spread"),
        (vivit, {"over": "window", "fuser": "unpool"}, "which fuser='unpool' would spread"),
        (vivit, {"over": "window", "fuser": "reproject"}, "which fuser='reproject' would spread"),
        (vivit, {"over": "window", "kind": "dense"}, "WindowTokenLearner takes kind 'mlp'.*not 'dense'"),
        (vivit, {"over": "neighbours", "kind": "average"}, "NeighbourTokenLearner takes kind 'mlp'.*not 'average'"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")  # beartype would refuse "clip" before we do
def test_what_is_refused(host, options, sentence):
    model = host()
    before = repr(model)
    with pytest.raises(ValueError, match=sentence):
        insert(model, **options)
    assert repr(model) == before
    assert insertion_of(model) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"over": "neighbours"}, "8 tokens (mlp) over 3 neighbouring slices before layer 2 of 4"),
        ({"over": "window"}, "8 tokens (mlp) per window of 2 slices before layer 2 of 4"),
    ],
)
def test_it_is_told(options, told):
    assert insertion_of(insert(vivit(), **options)).describe() == told
