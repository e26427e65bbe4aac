"""set_num_tokens: from then on the model is one with fewer tokens, and with all of them again what it was."""

import copy
import json
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from insertion.clips import clips, tiny_vivit
from insertion.hosts import PLACES, cut, images, inserted, tiny
from insertion.test_timm_families import NEW
from insertion.test_timm_families import small as of_family
from tokenlearner import (
    InputError,
    Preprocessing,
    attention_maps,
    cost,
    insert,
    insertion_of,
    learners,
    load,
    remove,
    save,
    set_num_tokens,
)
from tokenlearner.core import KINDS, TokenFuser, TokenLearner
from tokenlearner.export.exporting import export_model
from tokenlearner.insertion.elastic import note_elastic
from tokenlearner.insertion.hosting import differences
from tokenlearner.models import X2Plus1D

S, K = 5, 2
OVER_CLIPS = [
    {"fuser": "fuser", "mix": "clip"},
    {"fuser": "unpool"},
    {"over": "neighbours", "fuser": "fuser"},
    {"over": "window", "window": 3},
]


def x2plus1d(num_tokens=S):
    small = {"widths": (8, 16), "depths": (1, 2), "swapped": 1, "head_width": 16, "num_weights": 6}
    return X2Plus1D("TokenLearner", 5, num_frames=6, img_size=16, num_tokens=num_tokens, **small).eval()


# --- what it computes


@pytest.mark.parametrize(("fuser", "at"), PLACES)
def test_the_model_is_one_built_with_fewer_tokens(fuser, at):
    host, x = tiny(reg_tokens=1), images()
    model = inserted(host, S, at, fuser=fuser)
    few = cut(insert(copy.deepcopy(host), K, at, fuser=fuser), model)
    before = model.forward_features(x)
    assert set_num_tokens(model, K) is model
    assert_close(model.forward_features(x), few.forward_features(x))
    assert_close(attention_maps(model, x), attention_maps(few, x))
    counted, expected = (cost(m, (3, 32, 32)) for m in (model, few))
    assert (counted.macs, counted.tokens) == (expected.macs, expected.tokens)
    assert counted.parameters > expected.parameters
    if at < len(model.blocks):  # between the last layer and the norm only the learner itself has less to do
        assert counted.macs < cost(set_num_tokens(copy.deepcopy(model), S), (3, 32, 32)).macs
    assert torch.equal(set_num_tokens(model, S).forward_features(x), before)


@pytest.mark.parametrize("k", [1, 3, S - 1])
@pytest.mark.parametrize("kind", ["conv1", "gate", "dense", "average"])
def test_other_kinds_and_numbers(kind, k):
    host, x = tiny(), images()
    model = inserted(host, S, 1, kind)
    few = cut(insert(copy.deepcopy(host), k, 1, kind), model)
    assert_close(set_num_tokens(model, k)(x), few(x))


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("family", NEW)
def test_hosts_whose_layers_know_places(family, fuser):
    """Their relative position biases, say, are of as many tokens."""
    host, x = of_family(family), images()
    model = inserted(host, S, 1, fuser=fuser)
    few = cut(insert(copy.deepcopy(host), K, 1, fuser=fuser), model)
    before = model(x)
    assert_close(set_num_tokens(model, K)(x), few(x))
    assert torch.equal(set_num_tokens(model, S)(x), before)
    bare = remove(set_num_tokens(model, K))
    assert torch.equal(bare(x), host(x))
    assert differences(bare, host) == []


@pytest.mark.parametrize("options", OVER_CLIPS, ids=lambda options: " ".join(map(str, options.values())))
def test_clips(options):
    host, x = tiny_vivit(), clips()
    model = inserted(host, S, 1, **options)
    few = cut(insert(copy.deepcopy(host), K, 1, **options), model, 3 if options.get("mix") == "clip" else 1)
    before = model(x)
    set_num_tokens(model, K)
    assert_close(model(x), few(x))
    assert_close(attention_maps(model, x), attention_maps(few, x))
    assert torch.equal(set_num_tokens(model, S)(x), before)


def test_a_model_that_was_built_with_tokenlearners():
    model, few, x = x2plus1d(), x2plus1d(K), clips(6, 16, 16)
    cut(few, model, 6)
    set_num_tokens(model, K)
    assert_close(model(x), few(x))
    assert [maps.shape[-3] for maps in attention_maps(model, x).values()] == [K]
    assert cost(model, x.shape[1:]).macs == cost(few, x.shape[1:]).macs


def test_modules_of_ones_own():
    class Both(nn.Module):
        def __init__(self, tokens):
            super().__init__()
            self.learner, self.fuser = TokenLearner(6, tokens, grid=(2, 3)), TokenFuser(6, tokens)

        def forward(self, x):
            return self.fuser(self.learner(x), x)

    model, x = Both(S), torch.randn(2, 6, 6)
    assert_close(set_num_tokens(model, K)(x), cut(Both(K), model)(x))


def test_gradients_reach_every_parameter_and_are_zero_for_the_tokens_left_out():
    model = inserted(tiny(), S, 1, fuser="fuser")
    set_num_tokens(model, K)(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = model.blocks[2].token_learner.alpha.fc2.weight.grad
    assert gradient[:K].abs().min() > 0
    assert gradient[K:].abs().max() == 0


# --- what goes along


def test_the_insertion_says_so_and_all_tokens_leave_no_trace():
    model = inserted(tiny(), S)
    spec = insertion_of(model)
    set_num_tokens(model, K)
    assert insertion_of(model) == replace(spec, used_tokens=K)
    assert insertion_of(model).describe().startswith(f"{K} of {S} tokens (mlp)")
    with pytest.raises(ValueError, match=rf"layers 2, 3 run on {K} learned tokens"):
        model.forward_intermediates(images())
    note_elastic(set_num_tokens(model, S))
    assert insertion_of(model) == replace(spec, elastic=True)
    assert insertion_of(model).describe().startswith(f"{S} elastic tokens (mlp)")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", ["BEiT v2", "BEiT, one bias", "DINOv3 of any size"])
def test_copies_are_independent(family, again):
    model, x = inserted(of_family(family), S, 1), images()
    before = model(x)
    set_num_tokens(model, K)
    other = again(model)
    assert torch.equal(other(x), model(x))
    assert torch.equal(set_num_tokens(other, S)(x), before)
    assert insertion_of(model).used_tokens == K
    prefix = model.num_prefix_tokens
    assert cost(model, (3, 32, 32)).tokens == (16 + prefix, *[K + prefix] * 3)


@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_a_saved_model_uses_as_many_and_has_them_all(fuser, tmp_path):
    model, x = inserted(tiny(), S, 1, fuser=fuser), images()
    before = model(x)
    note_elastic(set_num_tokens(model, K))
    loaded = load(save(model, tmp_path))
    assert insertion_of(loaded) == insertion_of(model)
    assert (insertion_of(loaded).elastic, insertion_of(loaded).used_tokens) == (True, K)
    assert torch.equal(loaded(x), model(x))
    assert differences(loaded, model) == []
    assert torch.equal(set_num_tokens(loaded, S)(x), before)


def test_a_saved_model_with_tokenlearners_of_its_own(tmp_path):
    model, x = x2plus1d(), clips(6, 16, 16)
    before = model(x)
    loaded = load(save(set_num_tokens(model, K), tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(set_num_tokens(loaded, S)(x), before)
    assert "used_tokens" not in json.loads((save(loaded, tmp_path) / "config.json").read_text())


def test_a_folder_saved_before_there_was_this_is_loaded(tmp_path):
    import safetensors.torch

    model, x = inserted(tiny(), S), images()
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["insertion"]["elastic"], config["insertion"]["used_tokens"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = {"format": "pt", "host": json.dumps(config["host"]), "insertion": json.dumps(config["insertion"])}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors", metadata=old)
    assert torch.equal(load(tmp_path)(x), model(x))


def test_a_config_that_asks_for_more_is_refused(tmp_path):
    save(set_num_tokens(x2plus1d(), K), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "used_tokens": S + 1}))
    with pytest.raises(InputError, match=f"num_tokens is a whole number from 1 to {S}"):
        load(tmp_path)


# --- hosts of transformers


def assert_uses(model, few, case, x):
    """Equal outputs, and the insertion in the config that is saved."""
    assert_close(getattr(model(x), case.output), getattr(few(x), case.output))
    assert model.config.token_learner["used_tokens"] == insertion_of(model).used_tokens == K


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("name", ["beit", "beit, shared bias", "dinov3", "siglip", "vit", "vjepa2"])
def test_hosts_of_transformers(name, fuser, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from insertion.test_huggingface import CASES

    case = CASES[name]
    host, x = case.model(), case.images()
    model = inserted(host, S, 1, fuser=fuser)
    few = cut(insert(copy.deepcopy(host), K, 1, fuser=fuser), model)
    before = getattr(model(x), case.output)
    assert_uses(set_num_tokens(model, K), few, case, x)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert_uses(loaded, few, case, x)
    assert_uses(copy.deepcopy(model), few, case, x)
    for each in (model, loaded):
        assert torch.equal(getattr(set_num_tokens(each, S)(x), case.output), before)
    bare = remove(set_num_tokens(model, K))
    assert torch.equal(getattr(bare(x), case.output), getattr(host(x), case.output))
    assert type(bare) is type(host)
    assert not hasattr(bare.config, "token_learner")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bare.modules())


# --- compiled and exported


@pytest.fixture
def _fresh_dynamo(without_shape_checks):
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_compiled_before_or_after(fuser):
    model, x = inserted(tiny(depth=2), S, 1, fuser=fuser), images()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for k in (S, K, 1, S):
        set_num_tokens(compiled, k)
        assert_close(compiled(x), set_num_tokens(model, k)(x))


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("fuser", [None, "fuser", "unpool", "reproject"])
def test_exported_it_has_as_many_tokens(fuser):
    model = set_num_tokens(inserted(tiny(depth=2), S, 1, fuser=fuser), K)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 4):
        x = images(batch=batch)
        assert_close(program.module()(x), model(x))
    shapes = [
        tuple(node.meta["val"].shape[1:]) for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")
    ]
    assert (K, 16) in shapes  # the maps
    assert all(shape[-2:] != (S, 32) for shape in shapes if len(shape) == 2)  # no S tokens anywhere
    names = Counter(str(node.target) for node in program.graph.nodes)
    assert not [name for name in names if "scatter" in name or "sort" in name]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_an_onnx_file_has_as_many_tokens(fuser, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = set_num_tokens(inserted(tiny(depth=2), S, 1, fuser=fuser), K), images()
    model.preprocessing = Preprocessing(input_size=(3, 32, 32))
    export_model(model, tmp_path, measure=False, log=lambda line: None)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(found), model(x), rtol=1e-3, atol=1e-4)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx")).graph
    shapes = [tuple(d.dim_value for d in value.type.tensor_type.shape.dim)[1:] for value in graph.value_info]
    assert (K, 16) in shapes
    assert (S, 16) not in shapes
    assert not [node.op_type for node in graph.node if "Scatter" in node.op_type or node.op_type in ("TopK", "Unique")]


# --- what it refuses


@pytest.mark.usefixtures("without_shape_checks")  # they refuse what is no int
def test_the_number_is_checked():
    model, x = inserted(tiny(), S), images()
    before = model(x)
    for number in (0, -1, S + 1, 2.0, True, None):
        with pytest.raises(ValueError, match=f"num_tokens is a whole number from 1 to {S}, .* not {number!r}"):
            set_num_tokens(model, number)
    set_num_tokens(model, K)
    with pytest.raises(ValueError, match=f"from 1 to {S}"):
        set_num_tokens(model, S + 1)
    assert insertion_of(model).used_tokens == K
    assert torch.equal(set_num_tokens(model, S)(x), before)


def test_models_that_have_no_first_tokens():
    with pytest.raises(ValueError, match="VisionTransformer has no TokenLearner"):
        set_num_tokens(tiny(), 1)
    assert "grid" in KINDS
    with pytest.raises(ValueError, match="kind 'grid' are cells that cover the frame together"):
        set_num_tokens(inserted(tiny(), 4, kind="grid"), 2)
    both = nn.ModuleList([TokenLearner(6, 4), TokenLearner(6, 8)])
    with pytest.raises(ValueError, match="TokenLearners of 4, 8 tokens"):
        set_num_tokens(both, 2)
    assert [module.used_tokens for module in both] == [None, None]


def test_inside_of_something_else():
    model, x = inserted(of_family("BEiT v2"), S, 1), images()
    expected = set_num_tokens(copy.deepcopy(model), K)(x)
    outer = nn.Sequential(model, nn.Identity())
    assert torch.equal(set_num_tokens(outer, K)(x), expected)
    assert insertion_of(model).used_tokens == K
    assert [learner.used_tokens for learner in learners(outer).values()] == [K]
