"""Gradients of a kernel by way of the PyTorch code it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradients(
    plain: Callable[..., Tensor], tensors: Sequence[Tensor], rest: tuple[Any, ...], needed: Sequence[bool], of: Tensor
) -> list[Tensor | None]:
    """``of`` times the Jacobian of ``plain(*tensors, *rest)``, for those tensors that ``needed`` marks."""
    with torch.enable_grad():
        copies = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, needed)]
        found = iter(torch.autograd.grad(plain(*copies, *rest), [copy for copy in copies if copy.requires_grad], of))
    return [next(found) if copy.requires_grad else None for copy in copies]
