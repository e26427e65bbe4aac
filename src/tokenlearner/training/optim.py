"""Optimizer, parameter groups and schedule: timm's, told which modules are new."""

from __future__ import annotations

from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch import nn

from tokenlearner.insertion.insert import inserted_parameters
from tokenlearner.training.recipe import OptimizerRecipe


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.05, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups with weight decay and, if asked for, layer-wise learning rates (``lr_scale``).

    Host layers get ``layer_decay`` to the power of their distance from the head, as timm's rule gives them. Inserted
    modules (learners, fusers, extra layers) are new, so they learn at the full rate: by their place in the names that
    rule would give a learner at ``blocks.6`` of 12 layers 0.75^7 of it. Biases, norms and what the host
    lists in ``no_weight_decay()`` are not decayed.
    """
    new = inserted_parameters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = dict.fromkeys(trained, 1.0)
    if layer_decay is not None:
        # Grouped without what is new: an extra layer before the norm would shift every layer's distance by one.
        own = ((name, p) for name, p in model.named_parameters() if name not in new)
        group_of = group_with_matcher(own, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        last = max(group_of.values())
        scales |= {name: layer_decay ** (last - group_of[name]) for name in trained if name not in new}
    undecayed: set[str] = getattr(model, "no_weight_decay", set)()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, p in trained.items():
        decay = 0.0 if p.ndim <= 1 or name.endswith("bias") or name in undecayed else weight_decay
        group = groups.setdefault(
            (scales[name], decay), {"params": [], "param_names": [], "weight_decay": decay, "lr_scale": scales[name]}
        )
        group["params"].append(p)
        group["param_names"].append(name)
    return list(groups.values())


def build_optimizer(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in param_groups(model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    ]
    return create_optimizer_v2(groups, opt=recipe.name, lr=recipe.lr, weight_decay=0.0, betas=recipe.betas)


def build_schedule(
    optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, steps: int, steps_per_epoch: float
) -> CosineLRScheduler | PolyLRScheduler:
    """Linear warm-up, then a cosine or a straight line to ``min_lr``, by optimizer steps."""
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), steps // 2)
    settings: dict[str, Any] = {
        "lr_min": recipe.min_lr,
        "warmup_t": warmup,
        "warmup_lr_init": recipe.lr / max(1, warmup),
        "t_in_epochs": False,
    }
    if recipe.schedule == "linear":  # falls from the end of the warm-up on, as the official one
        return PolyLRScheduler(optimizer, max(1, steps - warmup), power=1.0, warmup_prefix=True, **settings)
    return CosineLRScheduler(optimizer, max(1, steps), **settings)
