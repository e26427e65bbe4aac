"""Fewer tokens than a model was built with: the first k of its S, with the weights of all S kept.

A model that is to serve several numbers of tokens is trained with ``elastic=True`` on random prefixes of them, as
nested dropout does (arXiv 1402.0915): the first tokens then carry most, and each further one adds to them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn

from tokenlearner.core.fuser import TokenFuser
from tokenlearner.core.learner import TokenLearner
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import SPEC, host_of, insert, insertion_of
from tokenlearner.insertion.layers import FusedLayer, LearnTokens, LeaveGrid
from tokenlearner.insertion.spec import Insertion

ModelT = TypeVar("ModelT", bound=nn.Module)


def set_num_tokens(model: ModelT, num_tokens: int) -> ModelT:
    """Has ``model`` learn and use only the first ``num_tokens`` of its S tokens, in place, and returns the model.

    Only their maps are computed, and later layers run on as many tokens: the model is what one built with
    ``num_tokens`` tokens would be, with the first rows of this one's weights (of a TokenFuser's M rows and columns;
    the hidden layers of kind ``"conv"``, S wide, stay whole). All weights stay in the model, and ``num_tokens=S`` goes
    back to all tokens. ``save`` and ``save_pretrained`` keep the setting, and exports have it fixed.

    How good a model is with fewer tokens depends on its training: one trained with ``elastic=True`` was trained for
    it, another may fail.

    Args:
        model: As :func:`insert` returned it, or any network with TokenLearners, all of the same number of tokens. Its
            TokenFusers of that number are set too.
        num_tokens: From 1 to S.

    Raises:
        InputError: The model has no TokenLearner, one whose tokens have no order, or several that differ; or the
            number is out of range.
    """
    most = most_tokens(model)
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int) or not 1 <= num_tokens <= most:
        raise InputError(
            f"num_tokens is a whole number from 1 to {most}, the tokens the model was built with, not {num_tokens!r}"
        )
    used = None if num_tokens == most else num_tokens
    for module in model.modules():
        if isinstance(module, TokenLearner | TokenFuser) and module.num_tokens == most:
            module.used_tokens = used
    for module in reversed(list(model.modules())):  # from the inside out: a wrapper may show the insertion of its model
        spec = insertion_of(module)
        if isinstance(spec, Insertion) and spec.used_tokens != used:
            _settle(module, replace(spec, used_tokens=used))
    return model


def most_tokens(model: nn.Module) -> int:
    """S: the number of tokens ``model`` was built with, and the most that :func:`set_num_tokens` takes.

    Raises:
        InputError: As :func:`set_num_tokens` does for the model.
    """
    found = [module for module in model.modules() if isinstance(module, TokenLearner)]
    if not found:
        raise InputError(f"{type(model).__name__} has no TokenLearner; insert(model) one first")
    if any(learner.kind == "grid" for learner in found):
        raise InputError(
            "the tokens of kind 'grid' are cells that cover the frame together, so the first of them would leave a "
            "part of it out; it has no weights to keep either: remove(model), then insert with fewer tokens"
        )
    numbers = sorted({learner.num_tokens for learner in found})
    if len(numbers) > 1:
        raise InputError(
            f"{type(model).__name__} has TokenLearners of {', '.join(map(str, numbers))} tokens, and only models whose "
            "TokenLearners all have the same number can take another"
        )
    return numbers[0]


def note_elastic(model: nn.Module) -> None:
    """Notes in the insertion, if ``model`` has one, that it is trained on random numbers of its tokens."""
    if (spec := insertion_of(model)) is not None:
        setattr(model, SPEC, replace(spec, elastic=True))


def insert_again(model: ModelT, spec: Insertion) -> ModelT:
    """Inserts into ``model`` what ``spec`` says another model had, with its number of tokens in use.

    Raises:
        TypeError, ValueError: As :func:`insert` and :func:`set_num_tokens`.
    """
    insert(model, **spec.to_insert_arguments())
    if spec.elastic:
        note_elastic(model)
    if spec.used_tokens is not None:
        set_num_tokens(model, spec.used_tokens)
    return model


def _settle(model: nn.Module, spec: Insertion) -> None:
    """Tells the host, and whatever adapts its layers' arguments, of the number of tokens in ``spec``."""
    host = host_of(model)
    host.regain_grid()
    host.lose_grid(spec.at, len(host.layers()), spec.tokens)
    for module in model.modules():
        holders = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, LearnTokens | LeaveGrid)]
        for holder in [*holders, module] if isinstance(module, FusedLayer) else holders:
            holder.without_grid = host.without_grid
    setattr(model, SPEC, spec)
    if not spec.fuser:
        host.guard_intermediates(spec)
