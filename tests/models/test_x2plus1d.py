"""X(2+1)D against the same network written with functions, and its cost against a closed form."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from core.naive import randomized
from tokenlearner.errors import InputError
from tokenlearner.inspection.cost import cost
from tokenlearner.models.x2plus1d import X2Plus1D
from tokenlearner.training.optim import build_optimizer, param_groups
from tokenlearner.training.recipe import OptimizerRecipe

SMALL = {"widths": (4, 8), "depths": (1, 3), "head_width": 12, "num_classes": 5, "num_frames": 4}
TOKENS = {"key_dim": 4, "num_weights": 2, "num_tokens": 3}


def small(module="Conv2D + Conv1D", swapped=2, **options):
    return X2Plus1D(module, swapped=swapped, **{**SMALL, **options})


def clips(batch=2, frames=4, side=16):
    return torch.randn(batch, 3, frames, side, side)


def by_functions(state, x):
    """The plain backbone of SMALL, from its parameters alone."""

    def layer(x, name, stride=1, act=True):
        weight = state[f"{name}.0.weight"]
        padding = [side // 2 for side in weight.shape[2:]]
        x = F.conv3d(x, weight, stride=(1, stride, stride), padding=padding)
        norm = {key: state[f"{name}.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        x = F.batch_norm(x, **norm)
        return x.relu() if act else x

    x = layer(layer(x, "stem.0", 2), "stem.1")
    for stage, depth in enumerate(SMALL["depths"]):
        for i in range(depth):
            block, stride = f"stages.{stage}.{i}", 1 if i else 2
            inside = layer(layer(x, f"{block}.expand"), f"{block}.middle.0", stride)
            inside = layer(layer(inside, f"{block}.middle.1"), f"{block}.project", act=False)
            x = (inside + (x if i else layer(x, f"{block}.shortcut", stride, act=False))).relu()
    x = layer(layer(x, "final.0"), "final.1")
    return F.linear(x.mean(dim=(2, 3, 4)), state["head.weight"], state["head.bias"])


def test_it_is_the_network_written_with_functions():
    model, x = randomized(small()).eval(), clips(side=20)
    torch.testing.assert_close(model(x), by_functions(model.state_dict(), x))
    kernels = {tuple(p.shape[2:]) for name, p in model.named_parameters() if p.ndim == 5 and "middle" in name}
    assert kernels == {(1, 3, 3), (3, 1, 1)}


def test_swapping_leaves_the_other_blocks_and_the_classifier_alone():
    plain, tokens = small(), small("Conv2D + TokenLearner", **TOKENS)
    assert {key for key in plain.state_dict().keys() ^ tokens.state_dict().keys() if ".middle." not in key} == set()
    with_tokens = {key.split(".middle")[0] for key in tokens.state_dict() if "fuser" in key}
    assert with_tokens == {"stages.1.1", "stages.1.2"}
    for name, module in plain.named_modules():
        if ".middle" not in name and isinstance(module, nn.Conv3d):
            assert tokens.get_submodule(name).weight.shape == module.weight.shape


@pytest.mark.parametrize(("side", "grid"), [(256, 8), (224, 7)])
def test_what_the_module_sees(side, grid):
    with torch.device("meta"):
        model = X2Plus1D("TokenLearner")
        seen = []
        for block in model.stages[-1][-3:]:
            block.middle.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
        with torch.no_grad():
            features = model.forward_features(torch.empty(2, 3, 64, side, side))
    assert seen == [(2, 432, 64, grid, grid)] * 3
    assert features.shape == (2, 2048, 64, grid, grid)


def test_its_cost_is_the_closed_form():
    """The paper's 532 GFLOPs, two per multiply-add; pooling before 432 → 2048 would leave 525."""
    frames = 64
    macs = frames * 128**2 * 24 * (9 * 3 + 5 * 24)
    side, before = 128, 24
    for dim, depth in zip((24, 48, 96, 192), (3, 5, 11, 7)):
        width, inside, outside = dim * 9 // 4, frames * (side // 2) ** 2, frames * side**2
        macs += outside * before * width + inside * before * dim  # the first expansion, and its shortcut
        macs += (depth - 1) * inside * dim * width + depth * inside * (12 * width**2 + width * dim)
        side, before = side // 2, dim
    early = macs + frames * 64 * 192 * 432
    macs = early + frames * 64 * 432 * 2048
    with torch.device("meta"):
        counted = cost(X2Plus1D(num_classes=157), (3, 64, 256, 256))
    assert counted.macs == macs + 2048 * 157
    assert counted.flops / 1e9 == pytest.approx(532, rel=1e-3)
    assert 2 * early / 1e9 == pytest.approx(525.2, rel=1e-3)


def test_classifier_as_timms_models_have_it():
    model, x = randomized(small()).eval(), clips()
    features = model.forward_features(x)
    pooled = features.mean(dim=(2, 3, 4))
    assert torch.equal(model.forward_head(features, pre_logits=True), pooled)
    assert torch.equal(model(x), F.linear(pooled, model.head.weight, model.head.bias))
    assert model.get_classifier() is model.head
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (5, 12, 12)
    model.double().reset_classifier(7)
    assert model(x.double()).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x.double()), model.forward_head(model.forward_features(x.double()), pre_logits=True))


def test_dropout_is_before_the_classifier():
    model = small(drop_rate=0.75).train()
    model.head = nn.Identity()
    dropped = model.forward_head(torch.ones(400, 12, 1, 1, 1))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert (dropped == 0).float().mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("module", ["Conv2D + Conv1D", "Spatial + Temporal transformer", "Conv2D + TokenLearner"])
def test_it_learns_to_tell_clips_apart(module):
    """Which way a bright column moves: only a model that sees time can."""
    options = TOKENS if "TokenLearner" in module else {"num_heads": 4}
    model = small(module, num_classes=2, drop_rate=0.0, widths=(8, 16), **options)
    right = torch.zeros(8, 3, 4, 16, 16)
    for i in range(8):
        for t in range(4):
            right[i, :, t, :, (i + 3 * t) % 16] = 3
    x, y = torch.cat([right, right.flip(2)]), torch.tensor([0] * 8 + [1] * 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(x).argmax(dim=1) == y).float().mean() == 1


def test_copies_and_autocast():
    model, x = randomized(small("Conv2D + TokenLearner", **TOKENS)).eval(), clips()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert ((out - expected).abs().max() / expected.abs().max()) < 0.1


@pytest.mark.parametrize("module", ["Spatial + Temporal transformer", "Conv2D + TokenLearner", "Conv2D + MLPMixer"])
def test_export_with_a_dynamic_batch(module, without_shape_checks):
    options = TOKENS if "TokenLearner" in module else {"num_heads": 2}
    model = randomized(small(module, **options)).eval()
    program = export(model, (clips(),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
    x = clips(5)
    torch.testing.assert_close(program.module()(x), model(x))


def test_other_frames_and_channels():
    model = small(in_chans=1, num_frames=4).eval()
    assert model(torch.randn(1, 1, 6, 24, 16)).shape == (1, 5)  # the plain backbone takes any length and shape
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small("TokenLearner", swapped=0).eval()(clips())
        none_swapped = counter.get_total_flops()
        small().eval()(clips())
    assert counter.get_total_flops() == 2 * none_swapped


def drop_rates(model):
    """Of each block, in order; None where nothing is dropped."""
    return [getattr(block.drop_path, "drop_prob", None) for stage in model.stages for block in stage]


def test_drop_path_grows_over_the_blocks():
    model, x = randomized(small("Conv2D + TokenLearner", drop_path_rate=0.3, **TOKENS)), clips()
    assert drop_rates(model) == [None, *(pytest.approx(rate) for rate in (0.1, 0.2, 0.3))]
    plain = small("Conv2D + TokenLearner", **TOKENS)
    plain.load_state_dict(model.state_dict())  # whose names are the same
    assert drop_rates(plain) == [None] * 4
    assert torch.equal(plain.eval()(x), model.eval()(x))


def test_a_dropped_block_is_its_shortcut():
    block = randomized(small(drop_path_rate=0.5).stages[1][2]).train()
    x = torch.rand(64, 8, 2, 4, 4)
    dropped = (block(x) == x).flatten(1).all(dim=1)
    assert 0.2 < dropped.float().mean() < 0.8


@pytest.mark.parametrize("options", [{}, {"module": "Conv2D + TokenLearner", "kind": "gate", **TOKENS}])
def test_checkpointing_changes_neither_results_nor_gradients_nor_statistics(options):
    plain, x, found = randomized(small(drop_rate=0.0, drop_path_rate=0.3, **options)).train(), clips(batch=4), []
    checkpointed, runs = copy.deepcopy(plain), []
    checkpointed.set_grad_checkpointing()
    for block in [*checkpointed.stages[0], *checkpointed.stages[1]]:
        block.middle.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        out = model(x)
        out.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((out, gradients, dict(model.named_buffers())))
    assert len(runs) == 2 * 4  # or nothing was run again
    assert_close(found[1], found[0])
    assert checkpointed.stages[1][2].project[1].num_batches_tracked == 1
    checkpointed.set_grad_checkpointing(False)
    assert not checkpointed.grad_checkpointing


def test_learning_rates_fall_block_by_block_away_from_the_classifier():
    model = small("Conv2D + TokenLearner", **TOKENS)
    scales = {
        name: (group["lr_scale"], group["weight_decay"])
        for group in param_groups(model, weight_decay=0.1, layer_decay=0.5)
        for name in group["param_names"]
    }
    assert scales.keys() == dict(model.named_parameters()).keys()
    order = ["stem", "stages.0.0", "stages.1.0", "stages.1.1", "stages.1.2", "final", "head"]
    for name, (scale, decay) in scales.items():
        (place,) = [i for i, part in enumerate(reversed(order)) if name.startswith(f"{part}.")]
        assert scale == 0.5**place, name
        assert decay == (0.0 if model.get_parameter(name).ndim == 1 else 0.1), name
    assert build_optimizer(model, OptimizerRecipe(layer_decay=0.5)).param_groups


def test_coarse_groups_are_stages():
    groups = timm.models.group_parameters(small(), small().group_matcher(coarse=True), reverse=True)
    assert {name.split(".")[0] + name.split(".")[1] * name.startswith("stages"): i for name, i in groups.items()} == {
        "stem": 0,
        "stages0": 1,
        "stages1": 2,
        "final": 3,
        "head": 4,
    }


def test_errors_say_what_is_wrong():
    with pytest.raises(InputError, match="no module 'X3D'; there are 'Joint"):
        X2Plus1D("X3D")
    with pytest.raises(InputError, match="swapped is 0 to 2 of the last stage's 3 blocks"):
        small(swapped=3)
    with pytest.raises(InputError, match="has no TokenLearner to take kind"):
        small(kind="mlp")
    with pytest.raises(InputError, match=r"one of each for a stage, and not \(4, 8\) and \(1, 3, 3\)"):
        small(depths=(1, 3, 3))
    with pytest.raises(InputError, match="pools by 'avg', not 'max'"):
        small().reset_classifier(5, "max")
