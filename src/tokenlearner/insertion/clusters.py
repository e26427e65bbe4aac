"""Maps that start at what is in the pictures: every token at the centre of a cluster of the host's own features."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tokenlearner.core.alpha import MlpAlpha
from tokenlearner.insertion.insert import learners
from tokenlearner.insertion.layers import evaluating

ModelT = TypeVar("ModelT", bound=nn.Module)
POSITIONS = 8192  # of all pictures together, among which clusters are looked for
_ROUNDS = 30


@torch.no_grad()
def start_at_clusters(model: ModelT, images: Tensor, *, sharpness: float = 16.0, seed: int = 0) -> ModelT:
    """Sets the maps of every TokenLearner of kind ``"mlp"`` in ``model`` to look for one cluster of features each.

    The features that reach a learner for ``images`` are normed and clustered by k-means; the map of token i is then the
    softmax over space of ``sharpness`` times the mean product with centre i. A token so starts as the mean of the
    positions that look alike, near to what the later layers are used to, where random maps give about the mean of all.

    That is exact within the MLP: gelu(z) − gelu(−z) = z, so two hidden units carry a linear map. The others start
    without influence, and can learn.

    Args:
        model: As :func:`insert` returned it. Learners of other kinds, and those whose hidden layer is narrower than
            twice their tokens, are left as they are.
        images: Some hundreds of prepared pictures, or clips where the model takes those; on the model's device.
        sharpness: How much more the best places count; 0 would make every map uniform.
        seed: Of k-means.
    """
    seen: dict[nn.Module, Tensor] = {}
    found = [it for it in learners(model).values() if isinstance(it.alpha, MlpAlpha)]
    found = [it for it in found if 2 * it.num_tokens <= it.alpha.fc1.out_features]  # type: ignore[union-attr, operator]

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[module] = args[0].flatten(0, -2).float()

    handles = [learner.register_forward_pre_hook(keep) for learner in found]
    try:
        with evaluating(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    for learner in found:
        alpha: Any = learner.alpha
        features = F.layer_norm(seen[learner], (learner.dim,), eps=alpha.norm.eps)
        _look_for(alpha, sharpness / learner.dim * centres(features, learner.num_tokens, seed))
    return model


def centres(features: Float[Tensor, "n d"], number: int, seed: int = 0) -> Float[Tensor, "number d"]:
    """Those of k-means on :data:`POSITIONS` of the features, from as many of them drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=generator)[:POSITIONS].to(features.device)
    features = features[order]
    found = features[:number].clone()
    if len(found) < number:  # fewer positions than tokens
        found = found.repeat(-(-number // len(found)), 1)[:number]
    for _ in range(_ROUNDS):
        members = F.one_hot(torch.cdist(features, found).argmin(dim=1), number).to(features.dtype)
        counts = members.sum(dim=0)[:, None]
        found = torch.where(counts > 0, members.T @ features / counts.clamp_min(1), found)
    return found


def _look_for(alpha: MlpAlpha, weight: Float[Tensor, "s d"]) -> None:
    """Makes the logits of ``alpha`` the products of the normed features with ``weight``."""
    s = len(weight)
    alpha.norm.weight.fill_(1.0)
    alpha.norm.bias.zero_()
    alpha.fc1.weight[: 2 * s] = torch.cat([weight, -weight])
    alpha.fc1.bias[: 2 * s] = 0.0
    alpha.fc2.weight.zero_()
    eye = torch.eye(s, dtype=weight.dtype, device=weight.device)
    alpha.fc2.weight[:, : 2 * s] = torch.cat([eye, -eye], dim=1)
    alpha.fc2.bias.zero_()
