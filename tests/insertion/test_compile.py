"""torch.compile without graph breaks, and torch.export with a dynamic batch."""

import copy

import pytest
import torch
from torch.testing import assert_close

from insertion.hosts import FUSERS, images, inserted, tiny
from tokenlearner import attention_maps

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
