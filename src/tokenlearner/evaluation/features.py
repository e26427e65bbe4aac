"""How well a model's features stand in for those of the model it was made of: for backbones, which have no labels.

All of it is about the direction of features, by which they are searched and compared with text. ``pictures`` are those
that are scored, ``references`` those among which neighbours are looked for: the host's own are the index that a
compressed model would be swapped in front of.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenlearner.errors import InputError

NEIGHBOURS, TEMPERATURE = 20, 0.07  # as DINO is scored (Caron et al. 2021, section 4.1 and its code)
_QUERIES = 1024  # compared with all references at once


def features_of(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """What a head of ``model`` reads: its tokens normed and pooled, before any classifier or projection.

    Of timm's models ``forward_head(…, pre_logits=True)``, of transformers' the ``pooler_output``.

    Raises:
        InputError: The model has no such thing.
    """
    features: Any
    if hasattr(model, "forward_head"):
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    else:
        features = getattr(model(images), "pooler_output", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise InputError(
            f"{type(model).__name__} gives no features, one vector a picture: give a timm ViT that pools, or a model "
            "of transformers with a pooler_output"
        )
    return features


@torch.inference_mode()
def projection_for(
    model: nn.Module, shape: tuple[int, ...], class_embeddings: Float[Tensor, "c e"] | None
) -> nn.Module | None:
    """What of ``model`` leads from its features to the space of ``class_embeddings``; None where that is their own.

    Raises:
        InputError: The model has no features, or ``class_embeddings`` fit neither these nor its head's outputs.
    """
    features = features_of(model.eval(), torch.zeros(1, *shape))
    if class_embeddings is None or class_embeddings.shape[-1] == features.shape[-1]:
        return None
    head: Any = getattr(model, "get_classifier", lambda: None)()
    if isinstance(head, nn.Module) and head(features).shape[-1] == class_embeddings.shape[-1]:
        return head
    raise InputError(
        f"class_embeddings have {class_embeddings.shape[-1]} numbers a class, and {type(model).__name__}'s features "
        f"have {features.shape[-1]}: give embeddings of its own space"
    )


class Extracted(NamedTuple):
    """A model's features of the pictures that are scored and of the references."""

    pictures: Float[Tensor, "n d"]
    references: Float[Tensor, "m d"]


class FolderLabels(NamedTuple):
    """The class of each picture and reference, 0 to ``classes`` − 1."""

    pictures: Int[Tensor, " n"]
    references: Int[Tensor, " m"]
    classes: int


@dataclass(frozen=True)
class FeatureScores:
    """Of a model beside its host; all are shares (0 to 1), but cosines can be below 0."""

    cosine: float
    """Of the angle between the two models' features of a picture, on average."""
    cosine_p5: float
    """The same of the picture at the 5th percentile."""
    neighbours: float
    """Share of the host's ``k`` nearest references that the model's features find too, in the host's index."""
    k: int
    class_agreement: float | None
    """How often the two are nearest to the same class embedding; None without classes."""
    knn_accuracy: float | None
    """Of the model's features among its own references; None without labels."""
    pictures: int
    references: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        told = [
            f"cosine {self.cosine:.4f} to the host (5th percentile {self.cosine_p5:.4f})",
            f"{self.neighbours:.1%} of the {self.k} nearest neighbours",
        ]
        if self.class_agreement is not None:
            told.append(f"the same nearest class for {self.class_agreement:.1%}")
        if self.knn_accuracy is not None:
            told.append(f"{self.knn_accuracy:.1%} right by nearest neighbours")
        return ", ".join(told)


@torch.no_grad()
def compare(
    model: Extracted,
    host: Extracted,
    *,
    labels: FolderLabels | None = None,
    class_embeddings: Float[Tensor, "c e"] | None = None,
    projection: nn.Module | None = None,
    k: int = NEIGHBOURS,
) -> FeatureScores:
    """All measures of ``model`` beside ``host``, on the same pictures.

    Args:
        labels: For the accuracy of nearest neighbours.
        class_embeddings: Such as those of the classes' names in CLIP's text tower; the class means of the host's
            references where there are labels and none of these.
        projection: From features to the embeddings' space, CLIP's projection say, where these differ.
        k: Neighbours, or as many as there are references.
    """
    k = min(k, len(host.references))
    cosines = F.cosine_similarity(model.pictures, host.pictures, dim=-1)
    means = class_embeddings is None and labels is not None
    if means:
        assert labels is not None
        class_embeddings = class_means(host.references, labels.references, labels.classes)
    ours, theirs = (
        seen.pictures if projection is None or means else projection(seen.pictures) for seen in (model, host)
    )
    return FeatureScores(
        cosine=float(cosines.mean()),
        cosine_p5=float(cosines.quantile(0.05)),
        neighbours=neighbour_overlap(model.pictures, host.pictures, host.references, k),
        k=k,
        class_agreement=None if class_embeddings is None else class_agreement(ours, theirs, class_embeddings),
        knn_accuracy=labels and knn_accuracy(model.pictures, labels.pictures, model.references, labels.references, k=k),
        pictures=len(host.pictures),
        references=len(host.references),
    )


def nearest(
    queries: Float[Tensor, "n d"], references: Float[Tensor, "m d"], k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The cosines and places of the ``k`` nearest references of each query, the nearest first."""
    if not 1 <= k <= len(references):
        raise InputError(f"k must be at least 1 and at most the {len(references)} references, not {k}")
    index = F.normalize(references, dim=-1).T
    found = [(F.normalize(part, dim=-1) @ index).topk(k) for part in queries.split(_QUERIES)]
    return torch.cat([values for values, _ in found]), torch.cat([places for _, places in found])


def neighbour_overlap(
    model: Float[Tensor, "n d"], host: Float[Tensor, "n d"], references: Float[Tensor, "m d"], k: int = NEIGHBOURS
) -> float:
    """Share of the ``k`` references nearest to the host's features that are nearest to the model's too."""
    ours, theirs = (nearest(features, references, k)[1] for features in (model, host))
    shared = sum(int(torch.isin(one, other, assume_unique=True).sum()) for one, other in zip(ours, theirs))
    return shared / theirs.numel()


def knn_accuracy(
    queries: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    references: Float[Tensor, "m d"],
    reference_labels: Int[Tensor, " m"],
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """Top-1 of a vote of the ``k`` nearest references, each of weight exp(cosine / ``temperature``), as for DINO."""
    classes, right = int(reference_labels.max()) + 1, 0
    for part, truth in zip(queries.split(_QUERIES), labels.split(_QUERIES)):
        cosines, places = nearest(part, references, k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, reference_labels[places], (cosines / temperature).exp())
        right += int((votes.argmax(dim=-1) == truth).sum())
    return right / len(queries)


def class_agreement(
    model: Float[Tensor, "n e"], host: Float[Tensor, "n e"], class_embeddings: Float[Tensor, "c e"]
) -> float:
    """How often the two models' embeddings are nearest, by cosine, to the same class.

    Raises:
        InputError: The class embeddings are of another length.
    """
    if class_embeddings.ndim != 2 or class_embeddings.shape[1] != host.shape[1]:
        raise InputError(
            f"class_embeddings is {tuple(class_embeddings.shape)}: expected a row a class of {host.shape[1]} numbers, "
            "as many as the model gives for a picture"
        )
    ours, theirs = (nearest(embeddings, class_embeddings, 1)[1] for embeddings in (model, host))
    return float((ours == theirs).double().mean())


def class_means(features: Float[Tensor, "m d"], labels: Int[Tensor, " m"], classes: int) -> Float[Tensor, "c d"]:
    """The mean direction of each class's features; zero for a class without one."""
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, F.normalize(features, dim=-1))
    return F.normalize(sums, dim=-1)
