"""TokenFuser, Unpool and Reproject against the official output and against loops written from the formulas."""

import naive
import numpy as np
import pytest
import torch
from naive import randomized, relative_error
from torch.export import Dim, export

from tokenlearner.core import Reproject, TokenFuser, Unpool

D, S, T, H, W = 6, 3, 2, 2, 5
FUSERS = [
    {},
    {"beta": "linear", "norm": False},  # the paper's equation with nothing added
    {"beta": "linear"},
    {"norm": False},
]


def make(frames=None, **options):
    return randomized(TokenFuser(D, S, num_frames=frames, hidden_dim=10, **options))


def inputs(frames=None, batch=2):
    """Tokens and x as (b, h, w, d), or (b, t, h, w, d) for clips."""
    tokens = torch.randn(batch, S * (frames or 1), D, requires_grad=True)
    return tokens, torch.randn(batch, *([frames] if frames else []), H, W, D, requires_grad=True)


def fused_by_loops(fuser, tokens, x):
    clips = x.double().reshape(len(x), fuser.num_frames or 1, H * W, D)
    return torch.stack([naive.fused(fuser, *pair) for pair in zip(tokens.double(), clips)]).reshape(x.shape)


# --- TokenFuser


def test_agrees_with_the_official_output(reference_dir):
    data = {
        key: torch.from_numpy(value) for key, value in np.load(reference_dir / "fuser.npz").items() if key != "meta"
    }
    state = {"mix.weight": data["param/Dense_0/kernel"].T, "mix.bias": data["param/Dense_0/bias"]}
    for ours, theirs in [("norm1", "fuser_mix_norm1"), ("norm2", "fuser_mix_norm2"), ("beta.norm", "LayerNorm_0")]:
        state |= {f"{ours}.weight": data[f"param/{theirs}/scale"], f"{ours}.bias": data[f"param/{theirs}/bias"]}
    for i in range(2):
        state[f"beta.fc{i + 1}.weight"] = data[f"param/token_masking/Dense_{i}/kernel"].T
        state[f"beta.fc{i + 1}.bias"] = data[f"param/token_masking/Dense_{i}/bias"]
    fuser = TokenFuser(48, 8, residual=False)
    fuser.load_state_dict(state)
    assert relative_error(fuser(data["in/tokens"], data["in/x"]), data["out"]) < 1e-4


@pytest.mark.parametrize("frames", [None, T], ids=["frame", "clip"])
@pytest.mark.parametrize("options", FUSERS, ids=str)
def test_fuser_agrees_with_a_naive_loop(options, frames):
    fuser, (tokens, x) = make(frames, **options), inputs(frames)
    expected = fused_by_loops(fuser, tokens, x) + x
    direction = torch.randn_like(expected)
    leaves = [tokens, x, *fuser.parameters()]
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)

    out = fuser(tokens, x)
    assert relative_error(out, expected) < 1e-5
    assert torch.equal(fuser(tokens, x.flatten(-3, -2)), out.flatten(-3, -2))  # (b, n, d) is (b, h, w, d)
    for gradient, expected_gradient in zip(torch.autograd.grad((out * direction).sum(), leaves), wanted):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_clip_tokens_mix_over_frames_but_each_frame_takes_its_own():
    """M that swaps two frames' tokens: frame 0 is rebuilt from frame 1's tokens alone, and the other way round."""
    fuser, (tokens, x) = make(T, norm=False, residual=False), inputs(T)
    fuser.mix.bias.data.zero_()
    fuser.mix.weight.data = torch.kron(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.eye(S))
    first, second = tokens.split(S, dim=1)
    out = fuser(tokens, x)
    for t, own in enumerate([second, first]):
        weights = fuser.beta(x[:, t]).sigmoid().transpose(1, 2)
        assert relative_error(out[:, t].flatten(1, 2), weights @ own) < 1e-6


@pytest.mark.parametrize("frames", [None, T], ids=["frame", "clip"])
@pytest.mark.parametrize("options", FUSERS, ids=str)
def test_a_new_fuser_returns_x_unchanged(options, frames):
    fuser, (tokens, x) = TokenFuser(D, S, num_frames=frames, **options), inputs(frames)
    assert torch.equal(fuser(tokens, x), x)
    fuser(tokens, x).square().sum().backward()
    assert fuser.mix.weight.grad.abs().max() > 0 or fuser.mix.bias.grad.abs().max() > 0  # and still learns


@pytest.mark.parametrize("built", [True, False])
def test_the_calls_residual_wins(built):
    fuser, (tokens, x) = make(residual=built), inputs()
    without, with_x = fuser(tokens, x, residual=False), fuser(tokens, x, residual=True)
    assert relative_error(without, fused_by_loops(fuser, tokens, x)) < 1e-5
    assert torch.equal(with_x, x + without)
    assert torch.equal(fuser(tokens, x), with_x if built else without)


# --- Unpool


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_unpool_agrees_with_a_naive_loop(normalize, residual):
    (tokens, x), maps = inputs(), torch.rand(2, S, H, W)
    expected = naive.unpooled(maps.flatten(2).double(), tokens.double(), normalize).reshape(x.shape)
    expected = expected + x if residual else expected
    unpool = Unpool(normalize=normalize, residual=residual)
    out = unpool(tokens, x, maps)
    assert relative_error(out, expected) < 1e-6
    assert torch.equal(unpool(tokens, x.flatten(1, 2), maps), out.flatten(1, 2))


def test_normalized_unpool_survives_a_position_no_map_covers():
    (tokens, x), maps = inputs(), torch.rand(2, S, H, W)
    maps[:, :, 1, 2] = 0
    assert torch.equal(Unpool(normalize=True)(tokens, x, maps)[:, 1, 2], x[:, 1, 2])


# --- Reproject


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_reproject_agrees_with_naive_attention(heads, residual):
    module, (tokens, x) = randomized(Reproject(D, heads, residual=residual)), inputs()
    pairs = zip(tokens.double(), x.double().flatten(1, 2))
    expected = torch.stack([naive.reprojected(module, *pair) for pair in pairs]).reshape(x.shape)
    expected = expected + x if residual else expected
    out = module(tokens, x)
    assert relative_error(out, expected) < 1e-5
    assert torch.equal(module(tokens, x.flatten(1, 2)), out.flatten(1, 2))


def test_a_new_reprojection_returns_x_unchanged():
    tokens, x = inputs()
    assert torch.equal(Reproject(D, 2)(tokens, x), x)


# --- compile and export

MODULES = {
    "fuser": lambda: make().eval(),
    "bare fuser": lambda: make(beta="linear", norm=False).eval(),
    "clip fuser": lambda: make(T).eval(),
    "unpool": lambda: Unpool(normalize=True),
    "reproject": lambda: randomized(Reproject(D, 2)).eval(),
}


def arguments(name, batch):
    tokens, x = inputs(T if name == "clip fuser" else None, batch)
    return (tokens, x, torch.rand(batch, S, H, W)) if name == "unpool" else (tokens, x)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", MODULES)
def test_compiles_without_graph_breaks(name):
    torch._dynamo.reset()
    module, args = MODULES[name](), arguments(name, 2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, out = module(*args), compiled(*args)
    assert relative_error(out, expected) < 1e-6
    for gradient, wanted in zip(*(torch.autograd.grad(y.square().sum(), args[:2]) for y in (out, expected))):
        assert relative_error(gradient, wanted) < 1e-5


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", MODULES)
def test_exports_with_a_dynamic_batch(name):
    module, args = MODULES[name](), arguments(name, 2)
    exported = export(module, args, dynamic_shapes=[{0: Dim("batch")}] * len(args))
    for batch in (2, 5):
        args = arguments(name, batch)
        assert relative_error(exported.module()(*args), module(*args)) < 1e-6


# --- errors


@pytest.mark.usefixtures("without_shape_checks")  # a checker would speak before the library does
@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: TokenFuser(D, S, beta="conv"), r"beta is 'mlp' or 'linear', not 'conv'"),
        (lambda: TokenFuser(0, S), r"dim must be a positive whole number, not 0"),
        (lambda: TokenFuser(D, 0), r"num_tokens must be a positive whole number, not 0"),
        (lambda: TokenFuser(D, S, num_frames=0), r"num_frames must be a positive whole number, not 0"),
        (lambda: TokenFuser(D, S, hidden_dim=0), r"hidden_dim must be a positive whole number, not 0"),
        (lambda: Reproject(6, 4), r"num_heads must divide dim, and 4 does not divide 6"),
        (lambda: Reproject(6, 0), r"num_heads must be a positive whole number, not 0"),
    ],
)
def test_constructor_refuses(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("module", "shapes", "sentence"),
    [
        (TokenFuser(6, 3), [(2, 4, 6), (2, 10, 6)], r"tokens \(b, 3, 6\) .* tokens \(2, 4, 6\) and x \(2, 10, 6\)"),
        (TokenFuser(6, 3), [(2, 3, 6), (3, 10, 6)], r"tokens \(2, 3, 6\) and x \(3, 10, 6\)"),
        (TokenFuser(6, 3), [(2, 3, 7), (2, 10, 7)], r"x \(b, …, 6\) .* tokens \(2, 3, 7\) and x \(2, 10, 7\)"),
        (TokenFuser(6, 3), [(2, 3, 6), (2, 6)], r"tokens \(2, 3, 6\) and x \(2, 6\)"),
        (TokenFuser(6, 3, num_frames=2), [(2, 3, 6), (2, 2, 10, 6)], r"tokens \(b, 6, 6\) .* tokens \(2, 3, 6\)"),
        (TokenFuser(6, 3, num_frames=2), [(2, 6, 6), (2, 10, 6)], r"\(b, 2, h, w, d\), and got shape \(2, 10, 6\)"),
        (TokenFuser(6, 3, num_frames=2), [(2, 6, 6), (2, 4, 5, 6)], r"num_frames=2\) .* got shape \(2, 4, 5, 6\)"),
        (Reproject(6, 2), [(2, 3, 7), (2, 10, 6)], r"Reproject takes tokens \(b, 3, 6\) .* tokens \(2, 3, 7\)"),
        (Unpool(), [(2, 3, 6), (3, 10, 6), (2, 3, 2, 5)], r"Unpool .* tokens \(2, 3, 6\) and x \(3, 10, 6\)"),
        (Unpool(), [(2, 3, 6), (2, 10, 6), (2, 3, 3, 5)], r"x's 10 positions; .* maps \(2, 3, 3, 5\) don't fit"),
        (Unpool(), [(2, 3, 6), (2, 10, 6), (2, 4, 2, 5)], r"tokens \(2, 3, 6\), .* maps \(2, 4, 2, 5\) don't fit"),
        (Unpool(), [(2, 3, 6), (2, 2, 5, 6), (2, 3, 5, 2)], r"x \(2, 2, 5, 6\) and maps \(2, 3, 5, 2\) don't fit"),
    ],
)
def test_call_refuses(module, shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        module(*map(torch.zeros, shapes))
