"""The layer and the number of tokens for a share of a model's cost."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.hosting import bare_on_meta
from tokenlearner.insertion.hosts import host_of
from tokenlearner.insertion.insert import insert
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.training.build import insertion_arguments
from tokenlearner.training.recipe import Recipe


def check_budget(recipe: Recipe, macs: float | None, latency: float | None) -> None:
    """``InputError`` where there are two budgets, one that is no share, or one beside the layer it chooses."""
    if macs is not None and latency is not None:
        raise InputError("--macs and --latency both choose the layer: give one of them")
    wanted = macs if latency is None else latency
    if wanted is None:
        return
    if not 0 < wanted < 1:
        raise InputError(f"a budget is a share of the model's own cost, above 0 and below 1, not {wanted}")
    if recipe.at != Recipe().at:
        raise InputError(f"--macs and --latency choose the layer: leave out --at {recipe.at}, or the budget")


def within_budget(
    model: nn.Module,
    recipe: Recipe,
    size: tuple[int, ...],
    *,
    macs: float | None = None,
    latency: float | None = None,
) -> Recipe:
    """``recipe`` with the place and the number of tokens for a share of the host's MACs, or of its time for one input;
    as it is where neither is given.

    The last layer before which ``recipe.tokens`` tokens keep to it, then as many tokens, doubled again and again, as
    still do there: later layers see more of the picture, and what is left of the budget goes to more tokens.

    Raises:
        InputError: No layer is early enough; says what the earliest comes to.
    """
    check_budget(recipe, macs, latency)
    wanted = macs if latency is None else latency
    if wanted is None:
        return recipe
    whole = cost(model, size)

    def share(at: int, tokens: int) -> float:
        arguments = {**insertion_arguments(recipe), "num_tokens": tokens, "at": at}
        if latency is None:
            with torch.device("meta"):
                return cost(insert(bare_on_meta(model), **arguments), size).macs / whole.macs
        twin = insert(copy.deepcopy(model), **arguments)
        speeds = measure_speed({"host": model, "it": twin}, torch.randn(1, *size), rounds=5)
        return 1 / speeds[1].ratio

    # Shares grow with at; after the last layer nothing is saved.
    low, high, tokens = 0, len(host_of(model).layers()) - 1, recipe.tokens
    if (least := share(0, tokens)) > wanted:
        what = "MACs" if latency is None else "time"
        raise InputError(f"{tokens} tokens from the first layer on still take {least:.2f} of the {what}, not {wanted}")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(middle, tokens) <= wanted else (low, middle - 1)
    while 2 * tokens < min(whole.tokens) and share(low, 2 * tokens) <= wanted:
        tokens *= 2
    return replace(recipe, at=low, tokens=tokens)
