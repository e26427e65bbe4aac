"""Official parameters: the official outputs, every way they can be stored, and every way they can be wrong."""

import json
import re

import numpy as np
import pytest
import torch

import tokenlearner
from tokenlearner.models import load_scenic

BLOCK = "Transformer/encoderblock_0"
QUERY = f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel"
LEARNER = "Transformer/TokenLearnerModuleV11_0"
POSITIONS = "Transformer/posembed_input/pos_embedding"


@pytest.fixture
def mlp(reference_dir):
    """Flat parameters of v1.1 before layer 2 of 4, without fuser."""
    return parameters(reference_dir / "vit_tl_mlp.npz")


@pytest.fixture
def conv(reference_dir):
    """Flat parameters of v1.0 with a TokenFuser in the layers 2 and 3 of 4."""
    return parameters(reference_dir / "vit_fuser_conv.npz")


def parameters(path):
    return {name.removeprefix("param/"): value for name, value in np.load(path).items() if name.startswith("param/")}


def images_and_outputs(path):
    arrays = np.load(path)
    return torch.from_numpy(arrays["in/x"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["out"])


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "at", "insertion"),
    [
        ("vit_tl_mlp", 2, {"kind": "mlp", "fuser": None}),
        ("vit_fuser_conv", None, {"kind": "conv", "fuser": "fuser"}),
    ],
)
def test_official_parameters_give_the_official_outputs(name, at, insertion, reference_dir, tmp_path):
    path = reference_dir / f"{name}.npz"
    images, expected = images_and_outputs(path)
    meta = json.loads(np.load(path)["meta"].item())

    model = load_scenic(path, at=at)

    with torch.no_grad():
        assert relative_error(model(images), expected) < 1e-4
    spec = tokenlearner.insertion_of(model)
    assert {"kind": spec.kind, "fuser": spec.fuser} == insertion
    assert (spec.num_tokens, spec.at, spec.host_depth) == (meta["tokens"], meta["at"], meta["layers"])
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())

    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path / "model"))
    assert torch.equal(loaded(images), model(images))


def test_the_exact_gelu_would_not_do(reference_dir):
    """Guards the comparison above: it must see the difference between the two forms."""
    path = reference_dir / "vit_fuser_conv.npz"
    images, expected = images_and_outputs(path)
    model = load_scenic(path)
    for block in model.blocks:
        block.mlp.act = torch.nn.GELU()
    assert relative_error(model(images), expected) > 1e-4


def test_every_way_the_parameters_can_be_stored(mlp, reference_dir, tmp_path):
    images, expected = images_and_outputs(reference_dir / "vit_tl_mlp.npz")
    np.savez(tmp_path / "flat.npz", **mlp)
    state = {"opt_state": {"mu": mlp}, "global_step": 7}
    sources = [
        mlp,
        {f"params/{name}": value for name, value in mlp.items()},
        {f"param/{name}": value for name, value in mlp.items()},
        {name: torch.from_numpy(value) for name, value in mlp.items()},
        {"params": nested(mlp), **state},
        {"optimizer": {"target": nested(mlp)}, **state},
        {"optimizer": {"target": {"params": nested(mlp)}}, **state},
        tmp_path / "flat.npz",
        str(tmp_path / "flat.npz"),
    ]
    for source in sources:
        assert relative_error(load_scenic(source, at=2)(images), expected) < 1e-4


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_flax_msgpack(dtype, error, mlp, reference_dir, tmp_path):
    msgpack = pytest.importorskip("msgpack")
    images, expected = images_and_outputs(reference_dir / "vit_tl_mlp.npz")

    def array(value):
        data = value.tobytes() if dtype == "float32" else (value.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return msgpack.ExtType(1, msgpack.packb((value.shape, dtype, data)))  # as flax.serialization writes it

    path = tmp_path / "checkpoint_90"
    step = msgpack.ExtType(3, msgpack.packb(((), "int32", np.int32(7).tobytes())))
    path.write_bytes(msgpack.packb({"params": nested(mlp, array), "global_step": step, "model_state": None}))

    model = load_scenic(path, at=2)

    assert relative_error(model(images), expected) < error
    if dtype == "bfloat16":
        kept = torch.from_numpy(mlp["output_projection/bias"]).view(torch.int32).bitwise_and(-65536).view(torch.float32)
        assert torch.equal(model.head.bias, kept)


def test_msgpack_that_is_not_installed_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "msgpack", None)
    path = tmp_path / "checkpoint"
    path.write_bytes(b"\x80")
    with pytest.raises(tokenlearner.InputError, match="pip install msgpack"):
        load_scenic(path)


@pytest.mark.parametrize(("at", "index"), [(0, 0), (1, 1), (3, 3), (0.5, 2), (0.75, 3)])
def test_at_is_where_the_caller_says(at, index, mlp, reference_dir):
    images, expected = images_and_outputs(reference_dir / "vit_tl_mlp.npz")
    model = load_scenic(mlp, at=at)
    assert list(tokenlearner.learners(model)) == [index]
    assert (relative_error(model(images), expected) < 1e-4) == (index == 2)


def test_a_grid_that_is_not_square(mlp, reference_dir):
    """v1.1 looks at each position alone, so 4×4 patches laid out as 2×8 must give the same result."""
    images, expected = images_and_outputs(reference_dir / "vit_tl_mlp.npz")
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # b c n ph pw
    wide = patches.unflatten(2, (2, 8)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    assert wide.shape == (2, 3, 8, 32)

    model = load_scenic(mlp, at=2, grid=(2, 8))

    assert relative_error(model(wide), expected) < 1e-4
    assert tokenlearner.attention_maps(model, wide)[2].shape == (2, 4, 2, 8)


def test_v1_0_sees_the_grid_it_was_given(conv):
    """Its convolutions look at neighbours: the same positions as 2×8 have others."""
    x = torch.randn(1, 16, 32)
    square, wide = (load_scenic(conv, grid=grid).blocks[2].token_learner for grid in ((4, 4), (2, 8)))
    assert torch.equal(square(x, (2, 8)), wide(x, (2, 8)))
    assert relative_error(square(x, (4, 4)), wide(x, (2, 8))) > 1e-3


def test_a_plain_vit_loads_too(mlp):
    model = load_scenic({name: value for name, value in mlp.items() if not name.startswith(LEARNER)})
    images = torch.randn(2, 3, 16, 16)
    assert tokenlearner.insertion_of(model) is None
    assert torch.equal(model(images), tokenlearner.remove(load_scenic(mlp, at=2))(images))


def test_sizes_that_are_not_the_usual_ones(mlp):
    """Another MLP width in the learner, no power of two in the host's, one channel in."""
    changed = {**mlp, "embedding/kernel": mlp["embedding/kernel"][:, :, :1]}
    for i in range(4):
        name = f"Transformer/encoderblock_{i}/MlpBlock_0/Dense_"
        changed[f"{name}0/kernel"], changed[f"{name}0/bias"] = mlp[f"{name}0/kernel"][:, :53], mlp[f"{name}0/bias"][:53]
        changed[f"{name}1/kernel"] = mlp[f"{name}1/kernel"][:53]
    masking = f"{LEARNER}/token_masking/Dense_"
    changed[f"{masking}0/kernel"] = mlp[f"{masking}0/kernel"][:, :10]
    changed[f"{masking}0/bias"] = mlp[f"{masking}0/bias"][:10]
    changed[f"{masking}1/kernel"] = mlp[f"{masking}1/kernel"][:10, :3]
    changed[f"{masking}1/bias"] = mlp[f"{masking}1/bias"][:3]

    model = load_scenic(changed, at=1)

    spec = tokenlearner.insertion_of(model)
    assert (spec.hidden_dim, spec.num_tokens, model.in_chans) == (10, 3, 1)
    assert torch.equal(model.blocks[3].mlp.fc1.weight, torch.from_numpy(changed[f"{name}0/kernel"]).T)
    assert model(torch.randn(1, 1, 16, 16)).isfinite().all()


def nested(flat, leaf=lambda value: value):
    tree = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf(value)
    return tree


def without(flat, *names):
    return {name: value for name, value in flat.items() if not any(re.match(n, name) for n in names)}


def twice(flat):
    return {**flat, **{name.replace("V11_0", "V11_1"): v for name, v in flat.items() if "V11_0" in name}}


ERRORS = [
    # What is asked for.
    ("mlp", lambda p: p, {}, "one TokenLearnerModuleV11 does not tell its layer: give at=, from 0 to 3"),
    ("mlp", lambda p: {**p, POSITIONS: p[POSITIONS][:, :15]}, {"at": 2}, "15 entries, which is no square: give grid"),
    # Contradictions.
    ("mlp", lambda p: p, {"at": 2, "grid": (3, 5)}, r"16 entries, and grid=\(3, 5\) is not"),
    ("mlp", lambda p: p, {"at": 4}, "at=4 is outside the host's 3 layers"),
    ("mlp", lambda p: p, {"at": 1.0}, "at=1.0 is after the last layer"),
    ("mlp", lambda p: p, {"at": 6.0}, "give the int 6"),
    ("conv", lambda p: p, {"at": 1}, "of 4 layers the last 2 have a TokenFuser: at is 2"),
    ("mlp", lambda p: without(p, LEARNER), {"at": 2}, "at=2 places a TokenLearner, and these parameters have none"),
    # Other models.
    ("mlp", lambda p: {**p, "embedding/kernel": p["embedding/kernel"][None]}, {"at": 2}, "16 entries over time and"),
    ("mlp", lambda p: {**p, "cls": np.zeros((1, 1, 32))}, {"at": 2}, "class token"),
    ("mlp", lambda p: {**p, "pre_logits/kernel": np.zeros((32, 32))}, {"at": 2}, "pre_logits/kernel is not expected"),
    ("mlp", twice, {"at": 2}, "4 layers, 2 TokenLearners and 0 TokenFusers"),
    ("conv", lambda p: without(p, "Transformer/TokenLearnerModule_1"), {}, "1 TokenLearners and 2 TokenFusers"),
    (
        "conv",
        lambda p: {**p, f"{LEARNER}/LayerNorm_0/scale": np.ones(32)},
        {},
        "both TokenLearnerModule and TokenLearnerModuleV11",
    ),
    # Missing, unexpected, misshapen.
    ("mlp", lambda p: without(p, "embedding/kernel"), {"at": 2}, "embedding/kernel is missing"),
    ("mlp", lambda p: without(p, "output"), {"at": 2}, "output_projection/bias, output_projection/kernel are missing"),
    (
        "mlp",
        lambda p: without(p, "Transformer/encoderblock_1/"),
        {"at": 2},
        "encoderblock_1/.* and 13 more are missing",
    ),
    ("mlp", lambda p: without(p, "Transformer/encoderblock_"), {"at": 2}, "no layers"),
    ("mlp", lambda p: {**p, "Transformer/extra": np.zeros(3)}, {"at": 2}, "Transformer/extra is not expected"),
    ("mlp", lambda p: {**p, QUERY: p[QUERY].reshape(32, 32)}, {"at": 2}, r"query/kernel has shape \(32, 32\)"),
    ("mlp", lambda p: {**p, QUERY: p[QUERY][:, :3]}, {"at": 2}, "3 heads don't divide the width 32"),
    (
        "mlp",
        lambda p: {**p, QUERY.replace("query", "key"): p[QUERY][:, :3]},
        {"at": 2},
        r"query/kernel and .*key/kernel and .*value/kernel: can't be of shape \(32, 4, 8\), \(32, 3, 8\)",
    ),
    (
        "mlp",
        lambda p: {**p, f"{BLOCK}/LayerNorm_0/scale": np.ones(31)},
        {"at": 2},
        r"LayerNorm_0/scale make \(31,\), and the model that the other parameters describe needs \(32,\)",
    ),
    ("mlp", lambda p: {**p, "embedding/bias": "no array"}, {"at": 2}, "embedding/bias is no array of numbers but str"),
]


@pytest.mark.parametrize(("which", "change", "options", "message"), ERRORS)
def test_what_does_not_fit_is_said_in_a_sentence(which, change, options, message, request):
    source = change(request.getfixturevalue(which))
    with pytest.raises(tokenlearner.InputError, match=message) as caught:
        load_scenic(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"PK\x03\x04 no zip", "neither an .npz nor a msgpack file"),
        (b"\xc1", "neither an .npz nor a msgpack file"),
        (b"\x07", "neither an .npz nor a msgpack file of named parameters"),
    ],
)
def test_files_that_are_none(content, message, tmp_path):
    pytest.importorskip("msgpack")
    path = tmp_path / "checkpoint.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tokenlearner.InputError, match=message):
        load_scenic(path)


# --- video


@pytest.fixture
def video(reference_dir):
    """Flat parameters of v1.1 per slice before layer 2 of 3; tubelets of 2 frames, 2 slices of 4×4."""
    return parameters(reference_dir / "vivit_tl_mlp.npz")


def test_the_official_video_model_gives_the_official_outputs(reference_dir, tmp_path):
    path = reference_dir / "vivit_tl_mlp.npz"
    arrays = np.load(path)
    clips, expected = torch.from_numpy(arrays["in/x"]).permute(0, 4, 1, 2, 3), torch.from_numpy(arrays["out"])
    meta = json.loads(arrays["meta"].item())

    model = load_scenic(path, at=2, grid=(4, 4))

    with torch.no_grad():
        assert relative_error(model(clips), expected) < 1e-4
        assert relative_error(model(clips.flip(2)), expected) > 1e-3  # or the order of frames would not be seen
        assert relative_error(model(clips.transpose(3, 4)), expected) > 1e-3
    spec = tokenlearner.insertion_of(model)
    assert (spec.num_tokens, spec.at, spec.host_depth) == (meta["tokens"], meta["at"], meta["layers"])
    assert (spec.kind, spec.fuser, spec.mix) == ("mlp", None, "slice")
    assert (model.num_frames, model.tubelet_size, model.img_size) == (4, 2, (16, 16))
    loaded = tokenlearner.load(tokenlearner.save(model, tmp_path / "model"))
    assert torch.equal(loaded(clips), model(clips))


def test_sizes_of_a_video_model_are_read_off_the_arrays(video):
    """Tubelets of 3 frames, 3×2 pixels and one channel; 4 slices of 2×4."""
    rng = np.random.default_rng(0)
    changed = {**video, "embedding/kernel": rng.normal(size=(3, 3, 2, 1, 32)).astype(np.float32)}
    model = load_scenic(changed, at=1, grid=(2, 4))
    assert model.patch_embed.grid_size == (4, 2, 4)
    assert (model.num_frames, model.img_size, model.in_chans) == (12, (6, 8), 1)
    kernel = torch.from_numpy(changed["embedding/kernel"])
    assert torch.equal(model.patch_embed.proj.weight[5, 0, 2, 1, 0], kernel[2, 1, 0, 0, 5])
    x = torch.randn(2, 1, 12, 6, 8)
    maps = tokenlearner.attention_maps(model, x)
    assert maps[1].shape == (2, 4, 4, 2, 4)
    torch.testing.assert_close(maps[1].sum(dim=(3, 4)), torch.ones(2, 4, 4))


def test_a_plain_vivit_loads_too(video):
    model = load_scenic({name: value for name, value in video.items() if not name.startswith(LEARNER)}, grid=(4, 4))
    clips = torch.randn(2, 3, 4, 16, 16)
    assert tokenlearner.insertion_of(model) is None
    assert torch.equal(model(clips), tokenlearner.remove(load_scenic(video, at=2, grid=(4, 4)))(clips))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"at": 2}, r"32 entries over time and space: give grid=\(h, w\) of one slice"),
        ({"at": 2, "grid": (3, 4)}, r"32 entries, and grid=\(3, 4\) is not their \(h, w\) in one slice"),
        ({"at": 2, "grid": (8, 8)}, r"32 entries, and grid=\(8, 8\) is not"),
        ({"at": 2, "grid": (2, 4, 4)}, r"32 entries, and grid=\(2, 4, 4\) is not"),
        ({"grid": (4, 4)}, "give at=, from 0 to 2"),
    ],
)
def test_what_a_video_model_does_not_tell(options, message, video):
    with pytest.raises(tokenlearner.InputError, match=message):
        load_scenic(video, **options)
