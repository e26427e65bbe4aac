"""The layer and the tokens for a share of a model's MACs or of its time."""

from dataclasses import replace

import pytest
import timm

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.training import budget
from tokenlearner.training.budget import within_budget
from tokenlearner.training.recipe import Recipe

RECIPE = Recipe(tokens=2)


def of_36_patches():
    return timm.create_model("test_vit", img_size=96)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 0.9])
def test_a_budget_of_macs_takes_the_last_layer_and_then_the_most_tokens(budget):
    model = of_36_patches()
    whole = tokenlearner.cost(model, (3, 96, 96)).macs
    recipe = within_budget(model, RECIPE, (3, 96, 96), macs=budget)

    def share(at: int, tokens: int) -> float:
        return tokenlearner.cost(tokenlearner.insert(of_36_patches(), tokens, at), (3, 96, 96)).macs / whole

    fits = [at for at in range(len(model.blocks) + 1) if share(at, 2) <= budget]
    assert recipe.at == max(fits)
    assert recipe.tokens == max(tokens for tokens in (2, 4, 8, 16, 32) if share(recipe.at, tokens) <= budget)
    assert tokenlearner.insertion_of(model) is None


def test_a_budget_of_time_is_measured(monkeypatch):
    """By a clock that says each layer takes as long as any other, and each token a hundredth of a layer."""
    model, asked = of_36_patches(), []

    def timed(models, inputs, **options):
        spec = models["it"].token_learner_insertion
        asked.append(spec)
        share = 0.1 + 0.9 * (spec.at + 0.01 * spec.num_tokens) / len(models["it"].blocks)
        return [None, type("Speed", (), {"ratio": 1 / share})]

    monkeypatch.setattr(budget, "measure_speed", timed)
    recipe = within_budget(model, RECIPE, (3, 96, 96), latency=0.57)
    assert recipe.at == int((0.57 - 0.1) / 0.9 * len(model.blocks))
    assert recipe.tokens == 8
    assert len(asked) <= 9


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"macs": 1.5}, "a budget is a share of the model's own cost, above 0 and below 1, not 1.5"),
        ({"latency": float("nan")}, "above 0 and below 1, not nan"),
        ({"macs": 0.01}, "2 tokens from the first layer on still take 0"),
        ({"macs": 0.5, "latency": 0.5}, "--macs and --latency both choose the layer"),
        ({"macs": 0.5, "at": 2}, "choose the layer: leave out --at 2, or the budget"),
    ],
)
def test_budgets_that_make_no_sense(given, reason):
    recipe = replace(RECIPE, at=given.pop("at", 0.5))
    with pytest.raises(InputError, match=reason):
        within_budget(of_36_patches(), recipe, (3, 96, 96), **given)


@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_a_budget_near_the_whole_cost_goes_before_the_last_layer(fuser):
    """After it not every host takes a TokenLearner, and none a fuser."""
    model = of_36_patches()
    chosen = within_budget(model, replace(RECIPE, fuser=fuser), (3, 96, 96), macs=0.999)
    assert chosen.at == len(model.blocks) - 1
