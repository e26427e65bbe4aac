"""torch.compile without graph breaks, and torch.export with a dynamic batch."""

import copy

import pytest
import torch
from torch.testing import assert_close

from insertion.hosts import FUSERS, images, inserted, tiny
from tokenlearner import attention_maps, remove

pytestmark = pytest.mark.usefixtures("without_shape_checks")


SMALL = {"depth": 2, "reg_tokens": 1}  # compiling costs seconds a layer


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fuser", FUSERS)
def test_compiled_output_and_gradients(fuser):
    model, x = inserted(tiny(**SMALL), fuser=fuser), images()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for m in (model, compiled):
        m(x).square().mean().backward()
    assert_close(compiled(x), model(x))
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_close({name: p.grad for name, p in compiled._orig_mod.named_parameters()}, expected)


def compiled(model):
    return torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")


@pytest.mark.parametrize("at", [1, 2])  # a block, and what comes after the last
@pytest.mark.parametrize("first", ["host", "inserted", "fewer"])
def test_models_compiled_after_each_other_run_as_themselves(first, at):
    """torch.compile keeps its code by class and does not look at hooks, so the first one's could serve the others."""
    host, x = tiny(**SMALL, global_pool="avg"), images()
    models = {"host": host, "inserted": inserted(host, at=at), "fewer": inserted(host, 2, at=at)}
    expected = {name: model(x) for name, model in models.items()}
    assert (expected["host"] - expected["inserted"]).abs().max() > 1e-3
    for name in sorted(models, key=lambda name: name != first):
        assert_close(compiled(models[name])(x), expected[name])


def test_a_model_is_compiled_anew_after_an_insertion_and_its_removal():
    host, x = tiny(**SMALL), images()
    model = inserted(host)
    for one in (host, model, remove(copy.deepcopy(model)), model):
        assert_close(compiled(one)(x), one(x))


@pytest.mark.parametrize("fuser", FUSERS[:2])
def test_compiled_model_of_dynamic_sizes(fuser):
    model = inserted(tiny(**SMALL, dynamic_img_size=True), kind="conv", fuser=fuser)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for size in [(16, 48), (48, 16)]:
        x = images(*size)
        assert_close(compiled(x), model(x))
        assert_close(compiled._orig_mod(x), model(x))  # eager afterwards: what compiling kept of the grid is no use


@pytest.mark.parametrize("fuser", FUSERS[:2])
def test_attention_maps_of_a_model_compiled_in_place(fuser):
    model, x = inserted(tiny(**SMALL), fuser=fuser), images()
    expected = attention_maps(model, x)
    model.compile(backend="eager")
    with torch.no_grad():
        model(x)
    assert_close(attention_maps(model, x), expected)


@pytest.mark.parametrize("fuser", FUSERS)
def test_exported_with_a_dynamic_batch(fuser):
    model = inserted(tiny(**SMALL, img_size=(32, 48)), kind="conv" if fuser != "unpool" else "mlp", fuser=fuser)
    program = torch.export.export(model, (images(32, 48),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        x = images(32, 48, batch)
        assert_close(program.module()(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
