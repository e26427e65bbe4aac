"""Small helpers shared by the core modules: where float32 is kept, and how a recomputation is told from a forward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves float32 alone; nothing at all where autocast is off.

    The no-op branch keeps the autocast region out of compiled and exported graphs that don't need it.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta knows no autocast
        return torch.autocast(device, enabled=False)
    return nullcontext()


def in_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as gradient checkpointing's second forward does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def positive_int(name: str, value: int) -> int:
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a positive whole number, not {value!r}")
    return int(value)
