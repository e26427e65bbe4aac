"""Which modules use the kernels, and when: everything here runs without Triton."""

from __future__ import annotations

import importlib.util
import os
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core.alpha import MlpAlpha
from tokenlearner.core.fuser import TokenFuser
from tokenlearner.core.learner import TokenLearner
from tokenlearner.errors import InputError

ModelT = TypeVar("ModelT", bound=nn.Module)

MOST_HIDDEN, MOST_TOKENS, LEAST_CHANNELS = 128, 64, 16  # what a program's registers hold, and a product's least side

_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch; its kernels then run on the CPU


def use(model: ModelT, on: bool = True) -> ModelT:
    """Has the TokenLearners and TokenFusers of ``model`` run on the Triton kernels, in place, and returns the model.

    Meant for bfloat16 and float16 on a GPU. Wherever a kernel can't serve (:func:`obstacle` says why), a module runs as
    without one, bit for bit. Parameters, state-dict keys and what ``save`` writes stay the same; a loaded model starts
    without kernels. Copies of the model keep them.

    Args:
        model: Any network with a TokenLearner of kind ``"mlp"`` or a TokenFuser of β ``"mlp"``, inserted or built with.
        on: False goes back to PyTorch alone.

    Raises:
        InputError: The model has neither.
    """
    learners = [m for m in model.modules() if type(m) is TokenLearner and isinstance(m.alpha, MlpAlpha)]
    fusers = [m for m in model.modules() if type(m) is TokenFuser and isinstance(m.beta, MlpAlpha)]
    if not learners and not fusers:
        raise InputError(
            f"{type(model).__name__} has no TokenLearner of kind 'mlp' over one frame and no TokenFuser of beta 'mlp', "
            "and only these have kernels"
        )
    for learner in learners:
        learner._kernel = learned if on else None
    for fuser in fusers:
        fuser._kernel = fused if on else None
    return model


def learned(learner: TokenLearner, X: Float[Tensor, "b h w d"]) -> Float[Tensor, "b s d"] | None:
    """The tokens by the kernel, or None where it can't serve."""
    if obstacle(learner, X) is not None:
        return None
    from tokenlearner.kernels.learner import learn

    return learn(X.flatten(1, 2), *_weights(learner.alpha, learner.used_tokens))


def fused(
    fuser: TokenFuser, X: Float[Tensor, "b *grid d"], Y: Float[Tensor, "b s d"], residual: bool
) -> Float[Tensor, "b n d"] | None:
    """The fused map by the kernel, or None where it can't serve. ``Y`` are the mixed tokens."""
    if obstacle(fuser, X) is not None or Y.dtype != X.dtype:
        return None
    from tokenlearner.kernels.fuser import fuse

    return fuse(X.flatten(1, -2), Y, *_weights(fuser.beta, fuser.used_tokens), residual)


def obstacle(module: TokenLearner | TokenFuser, x: Tensor) -> str | None:
    """Why the kernel of ``module`` can't serve for a feature map like ``x``, as a sentence; None where it can."""
    alpha = module.alpha if isinstance(module, TokenLearner) else module.beta
    if not isinstance(alpha, MlpAlpha):
        return "kernels are for kind 'mlp' and beta 'mlp'"
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "an export has to run without Triton"
    if not _INSTALLED:
        return "Triton is not installed"
    return _of_input(alpha, x) or _of_layers(alpha)


def _of_input(alpha: MlpAlpha, x: Tensor) -> str | None:
    dtype, device = x.dtype, x.device.type
    if type(x) not in (Tensor, nn.Parameter):
        return f"a {type(x).__name__} is not a plain tensor"
    if not (x.is_cuda or (_INTERPRETED and device == "cpu")):
        return f"the feature map is on the {device}, and kernels need a CUDA GPU"
    if not _is_new_enough(x.device):
        return "kernels need a GPU of compute capability 8.0 or newer"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the feature map is {dtype}, and kernels take bfloat16 and float16"
    autocast = torch.is_autocast_enabled(device)
    if autocast and torch.get_autocast_dtype(device) != dtype:
        return f"the feature map is {dtype} under an autocast to {torch.get_autocast_dtype(device)}"
    weights = list(alpha.parameters())
    if any(weight.dtype != dtype and not (autocast and weight.dtype == torch.float32) for weight in weights):
        return f"the weights are not {dtype} as the feature map is"
    if any(weight.device != x.device for weight in weights):
        return "weights and feature map are on different devices"
    return None


@torch.compiler.assume_constant_result  # torch.compile can't look into it, and a device stays what it is
def _is_new_enough(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _of_layers(alpha: MlpAlpha) -> str | None:
    norm, fc1, fc2 = alpha.norm, alpha.fc1, alpha.fc2
    if type(norm) is not nn.LayerNorm or type(fc1) is not nn.Linear or type(fc2) is not nn.Linear:
        return "a layer of the MLP is not PyTorch's own"
    if norm.weight is None or norm.bias is None or fc1.bias is None or fc2.bias is None:
        return "a layer of the MLP has no weight or no bias"
    if alpha.training and alpha.drop.p > 0:
        return "dropout is on"
    if fc1.out_features > MOST_HIDDEN or fc2.out_features > MOST_TOKENS or fc1.in_features < LEAST_CHANNELS:
        return (
            f"kernels take up to {MOST_HIDDEN} hidden units and {MOST_TOKENS} tokens, and {LEAST_CHANNELS} channels "
            f"or more, not {fc1.out_features}, {fc2.out_features} and {fc1.in_features}"
        )
    if any(_has_hooks(module) for module in alpha.modules()):
        return "a layer of the MLP has hooks, which a kernel would not call"
    return None


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(kind) > 0 for kind in hooks)


def _weights(alpha: nn.Module, k: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """What the operators take of an MLP, with the last layer's first k outputs alone."""
    assert isinstance(alpha, MlpAlpha)
    norm, fc1, fc2 = alpha.norm, alpha.fc1, alpha.fc2
    return norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight[:k], fc2.bias[:k], norm.eps
