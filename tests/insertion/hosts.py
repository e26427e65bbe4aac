"""Tiny hosts for the tests of insertion, and the forward pass written out by hand that they are compared with."""

from __future__ import annotations

import copy
import math

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close

import tokenlearner
from tokenlearner.core import Unpool
from tokenlearner.insertion import inserted_parameters, learners

DEPTH = 4
PATCH = 8
FUSERS = (None, "fuser", "unpool", "reproject")
PLACES = [(fuser, at) for fuser in FUSERS for at in (0, 2, DEPTH) if not (fuser and at == DEPTH)]
TINY = {"img_size": 32, "patch_size": PATCH, "embed_dim": 32, "depth": DEPTH, "num_heads": 2, "num_classes": 5}


def tiny(cls: type[VisionTransformer] = VisionTransformer, **options: object) -> VisionTransformer:
    """A host in eval mode with every parameter random, so that no zero bias or token hides a mistake."""
    model = cls(**{**TINY, **options}).eval()
    shake(*model.parameters())
    return model


def inserted(host: nn.Module, *arguments: object, **options: object) -> nn.Module:
    """A copy of the host with an insertion of random weights; the host itself stays as it is."""
    model = tokenlearner.insert(copy.deepcopy(host), *arguments, **options)
    shake(*inserted_parameters(model).values())
    return model


def shake(*parameters: Tensor) -> None:
    """Adds noise in place; new fusers and extra layers change nothing before that."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2 * torch.randn(parameter.shape).to(parameter))


def cut(small: nn.Module, large: nn.Module, frames: int = 1) -> nn.Module:
    """``small``, of fewer tokens, with the first entries of ``large``'s weights: a token's are along an axis.

    A fuser's M over ``frames`` frames has the tokens of one after those of another.
    """
    state, target = large.state_dict(), small.state_dict()
    for name, value in target.items():
        if ".mix." in f".{name}" and frames > 1:
            step, kept = len(state[name]) // frames, len(value) // frames
            rows = [t * step + i for t in range(frames) for i in range(kept)]
            state[name] = state[name][rows][:, rows] if value.ndim == 2 else state[name][rows]
        else:
            state[name] = state[name][tuple(slice(side) for side in value.shape)]
    small.load_state_dict(state)
    return small


def images(height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


def naive_layers(host: nn.Module, model: nn.Module, x: Tensor, seen: dict[int, Tensor] | None = None) -> list[Tensor]:
    """What each layer of ``model`` and then its norm must return, with the learners and fusers called by hand.

    The host gives the structure and ``model`` all weights. ``seen`` takes the grid tokens that reach each learner.
    """
    bare = copy.deepcopy(host)
    for _ in range(len(model.blocks) - DEPTH):
        bare.blocks.append(copy.deepcopy(bare.blocks[-1]))
    bare.load_state_dict({key: value for key, value in model.state_dict().items() if "token_" not in key})
    bare.train(model.training)
    grid = (math.ceil(x.shape[2] / PATCH), math.ceil(x.shape[3] / PATCH))
    count = bare.num_prefix_tokens

    outs = [bare.norm_pre(bare._pos_embed(bare.patch_embed(x)))]
    for i, (layer, carrier) in enumerate(zip([*bare.blocks, bare.norm], [*model.blocks, model.norm])):
        prefix, X = outs[-1][:, :count], outs[-1][:, count:]
        learner, fuser = learners(model).get(i), getattr(carrier, "token_fuser", None)
        if learner is not None and seen is not None:
            seen[i] = X
        Z, A = (X, None) if learner is None else learn(learner, X, grid, with_maps=isinstance(fuser, Unpool))
        out = layer(torch.cat([prefix, Z], dim=1))
        if fuser is not None:
            X = X + spread_back(fuser, out[:, count:], X, A)
            out = torch.cat([out[:, :count], X], dim=1)
        outs.append(out)
    return outs[1:]


def naive_features(host: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    return naive_layers(host, model, x)[-1]


def learn(learner: nn.Module, X: Tensor, grid: tuple[int, int], with_maps: bool) -> tuple[Tensor, Tensor | None]:
    return learner.tokens_and_maps(X, grid) if with_maps else (learner(X, grid), None)


def spread_back(fuser: nn.Module, Y: Tensor, X: Tensor, A: Tensor | None) -> Tensor:
    """The fuser's share of its output, without the residual."""
    if A is not None:  # a softmax learner's maps are first made to say how a position shares itself
        A = A.flatten(2) / A.flatten(2).sum(dim=1, keepdim=True)
        return (A[..., None] * Y[:, :, None].float()).sum(dim=1).to(X.dtype)
    alone = copy.copy(fuser)
    alone.residual = False
    return alone(Y, X)


def assert_naive(host: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Compares features too: the head may read the cls token alone, which a wrong last layer need not touch."""
    expected = naive_features(host, model, x)
    assert_close(model.forward_features(x), expected)
    assert_close(model(x), model.forward_head(expected))
