"""Parameter groups against timm's own rule on the bare host, the schedule against its closed form."""

import copy
import math

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from insertion.hosts import DEPTH, FUSERS, inserted, tiny
from tokenlearner.insertion import inserted_parameters
from tokenlearner.training.optim import build_optimizer, build_schedule, param_groups
from tokenlearner.training.recipe import OptimizerRecipe

HOSTS = {
    "default": {},
    "registers, fc_norm": {"reg_tokens": 2, "global_pool": "avg"},
    "pre_norm, LayerScale": {"pre_norm": True, "init_values": 0.1},
    "map pooling": {"global_pool": "map"},
    "distilled": {"cls": VisionTransformerDistilled},
    "parallel": {"block_fn": ParallelScalingBlock, "qkv_bias": False},
}


def by_name(model, groups, key):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


@pytest.mark.parametrize("options", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("fuser", FUSERS)
@pytest.mark.parametrize("extra_layers", [0, 2])
def test_hosts_learn_at_timms_rates_and_new_modules_at_the_full_rate(options, fuser, extra_layers):
    host = tiny(**options)
    model = inserted(host, fuser=fuser, extra_layers=extra_layers)
    reference = param_groups_layer_decay(host, 0.05, no_weight_decay_list=host.no_weight_decay(), layer_decay=0.75)
    groups = param_groups(model, weight_decay=0.05, layer_decay=0.75)
    rates, new = by_name(model, groups, "lr_scale"), inserted_parameters(model)
    assert rates == by_name(host, reference, "lr_scale") | dict.fromkeys(new, 1.0)
    decays = by_name(model, groups, "weight_decay")
    assert {name: decays[name] for name in decays if name not in new} == by_name(host, reference, "weight_decay")
    # And timm's rule once by hand: the stem, the layers with the norm in the last, the head.
    assert rates["pos_embed"] == rates["patch_embed.proj.weight"] == 0.75 ** (DEPTH + 1)
    for i in range(DEPTH):
        layer = {rate for name, rate in rates.items() if name.startswith(f"blocks.{i}.") and name not in new}
        assert layer == {0.75 ** (DEPTH - i)}
    assert rates["head.weight"] == 1.0


@pytest.mark.parametrize("at", [0, 1, 1.0])
@pytest.mark.parametrize("layer_decay", [0.5, 0.75, 1.0])
def test_the_place_of_the_learner_does_not_matter(at, layer_decay):
    groups = param_groups(model := inserted(tiny(), at=at), layer_decay=layer_decay)
    rates = by_name(model, groups, "lr_scale")
    for i in range(DEPTH):
        assert rates[f"blocks.{i}.mlp.fc1.weight"] == layer_decay ** (DEPTH - i)
    assert rates["norm.weight"] == layer_decay  # the last layer's rate
    assert {rates[name] for name in inserted_parameters(model)} == {1.0}


@pytest.mark.parametrize("layer_decay", [None, 0.75])
@pytest.mark.parametrize("kind", ["mlp", "conv", "gate", "dense"])
def test_every_trainable_parameter_is_in_one_group(kind, layer_decay):
    model = inserted(tiny(), kind=kind, fuser="fuser", extra_layers=1)
    model.blocks[0].requires_grad_(False)
    groups = param_groups(model, layer_decay=layer_decay)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    names = [name for group in groups for name in group["param_names"]]
    assert [id(p) for name in names for p in [model.get_parameter(name)]] == grouped
    assert not any(name.startswith("blocks.0.") for name in names)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_layer_leaves_the_others_rates(freeze):
    model = inserted(tiny(), extra_layers=1)
    whole = by_name(model, param_groups(model, layer_decay=0.75), "lr_scale")
    if freeze:
        model.patch_embed.requires_grad_(False)
        model.blocks[1].requires_grad_(False)
        model.head.requires_grad_(False)
    part = by_name(model, param_groups(model, layer_decay=0.75), "lr_scale")
    assert part.items() <= whole.items()
    assert (len(part) < len(whole)) == freeze


def test_only_matrices_are_decayed():
    host = tiny(reg_tokens=1, init_values=0.1)
    model = inserted(host, kind="gate", fuser="fuser")
    groups = param_groups(model, weight_decay=0.3)
    decays, parameters = by_name(model, groups, "weight_decay"), dict(model.named_parameters())
    undecayed = {name for name, decay in decays.items() if decay == 0}
    assert undecayed == {name for name, p in parameters.items() if p.ndim == 1} | {
        "pos_embed",
        "cls_token",
        "reg_token",
    }
    assert {decays[name] for name in decays.keys() - undecayed} == {0.3}
    assert decays["blocks.2.token_learner.alpha.conv.weight"] == decays["blocks.2.token_fuser.mix.weight"] == 0.3
    assert {group["lr_scale"] for group in groups} == {1.0}
    plain = param_groups_weight_decay(host, 0.3, no_weight_decay_list=host.no_weight_decay())
    assert by_name(host, plain, "weight_decay").items() <= decays.items()


def test_the_optimizer_keeps_each_groups_rate_and_decay():
    model = inserted(tiny(), extra_layers=1)
    recipe = OptimizerRecipe(lr=0.1, weight_decay=0.2, layer_decay=0.5, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, recipe)
    assert type(optimizer) is torch.optim.AdamW
    groups = param_groups(model, weight_decay=0.2, layer_decay=0.5)
    for key in ("lr_scale", "weight_decay"):
        assert by_name(model, optimizer.param_groups, key) == by_name(model, groups, key)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.9)}


def rate(step, steps, warmup, recipe):
    """Linear from lr / warmup, then the cosine over all steps from where it is by then."""
    if step < warmup:
        return recipe.lr / warmup + step * (recipe.lr - recipe.lr / warmup) / warmup
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


@pytest.mark.parametrize(
    ("warmup_epochs", "steps", "steps_per_epoch", "warmup"),
    [(2.0, 100, 10, 20), (0.5, 60, 10.0, 5), (0, 50, 10, 0), (30, 100, 10, 50), (1.5, 40, 3, 4)],
)
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_schedule_warms_up_and_follows_a_cosine(warmup_epochs, steps, steps_per_epoch, warmup, layer_decay):
    model = inserted(tiny(depth=2))
    recipe = OptimizerRecipe(lr=0.4, min_lr=0.01, warmup_epochs=warmup_epochs, layer_decay=layer_decay)
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe, steps, steps_per_epoch)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert scales == ([1.0] if layer_decay is None else [0.125, 0.25, 0.5, 1.0])
    for step in sorted(
        {0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1, steps, steps + 7} - {-1}
    ):
        if step:  # the first is set without a call
            schedule.step_update(step)
        expected = rate(step, steps, warmup, recipe) if step < steps else recipe.min_lr
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected * group["lr_scale"], rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "middle"), [("linear", (0.4 + 0.01) / 2), ("cosine", 0.01 + 0.39 * (1 + math.cos(0.6 * math.pi)) / 2)]
)
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_the_line_falls_from_the_end_of_the_warm_up_and_the_cosine_from_the_start(schedule, middle, layer_decay):
    """20 of 100 steps warm up, so half of what is left is done at step 60."""
    recipe = OptimizerRecipe(lr=0.4, min_lr=0.01, warmup_epochs=2, schedule=schedule, layer_decay=layer_decay)
    optimizer = build_optimizer(inserted(tiny(depth=2)), recipe)
    steps = build_schedule(optimizer, recipe, 100, 10)
    after_warmup = 0.4 if schedule == "linear" else 0.01 + 0.39 * (1 + math.cos(0.2 * math.pi)) / 2
    almost = 0.01 + 0.39 * (1 / 80 if schedule == "linear" else (1 + math.cos(0.99 * math.pi)) / 2)
    wanted = {0: 0.02, 10: 0.21, 19: 0.381, 20: after_warmup, 60: middle, 99: almost, 100: 0.01, 107: 0.01}
    for step, rate in wanted.items():
        if step:  # the first is set without a call
            steps.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"], rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_have_a_rate(schedule, steps):
    recipe = OptimizerRecipe(lr=0.4, min_lr=0.01, schedule=schedule)
    optimizer = build_optimizer(inserted(tiny(depth=2)), recipe)
    scheduler = build_schedule(optimizer, recipe, steps, 1)
    rates = [optimizer.param_groups[0]["lr"]]
    for step in range(1, steps + 1):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 0.4
    assert rates[-1] == 0.01
    assert all(0.01 <= rate <= 0.4 for rate in rates)


def test_the_schedule_moves_the_weights_by_its_rate():
    """One SGD step on the gradient 1: each parameter moves by the scheduled rate times its own scale."""
    model = inserted(tiny(depth=2))
    before = copy.deepcopy(model.state_dict())
    recipe = OptimizerRecipe(name="sgd", lr=0.4, weight_decay=0.0, warmup_epochs=1.0, layer_decay=0.5)
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in param_groups(model, layer_decay=0.5)]
    optimizer = torch.optim.SGD([g | {"weight_decay": 0.0} for g in groups], lr=recipe.lr)
    build_schedule(optimizer, recipe, 100, 10).step_update(5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    scales = by_name(model, param_groups(model, layer_decay=0.5), "lr_scale")
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.22 * scales[name]), rtol=1e-5, atol=1e-6)
