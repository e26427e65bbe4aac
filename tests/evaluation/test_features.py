"""What a backbone's features are, and how far those of another may stand in for them, beside numpy and scikit-learn."""

import numpy as np
import pytest
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.evaluation import features
from tokenlearner.evaluation.features import (
    Extracted,
    FolderLabels,
    class_agreement,
    class_means,
    compare,
    features_of,
    knn_accuracy,
    nearest,
    neighbour_overlap,
    projection_for,
)


@pytest.fixture(params=[7, 1024], ids=["in batches", "at once"])
def queries_at_once(request, monkeypatch) -> None:
    monkeypatch.setattr(features, "_QUERIES", request.param)


def blobs(each: int, classes: int = 4, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around class centres, near enough to one another that some are taken for their neighbours'."""
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(7))
    return centres[labels] + 1.2 * torch.randn(len(labels), dim), labels


def unit(x: torch.Tensor) -> np.ndarray:
    return (x / x.norm(dim=-1, keepdim=True)).numpy()


# ---- features


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {"num_classes": 5}),
        ("test_vit", {"num_classes": 0, "global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "img_size": 32, "num_classes": 5}),
        ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 28, "num_classes": 0}),
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5}),
        ("cait_xxs24_224", {"depth": 1, "img_size": 32, "num_classes": 5}),
        ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32}),
        ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 5}),
    ],
)
def test_the_features_are_what_a_head_reads(name, options):
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, *(options.get("img_size", 32),) * 2)
    found = features_of(model, x)
    assert found.shape == (2, model.num_features)
    model.reset_classifier(0)
    torch.testing.assert_close(found, model(x))


def test_transformers_pool_themselves():
    transformers = pytest.importorskip("transformers")
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**config)).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(features_of(model, x), model(x).last_hidden_state[:, 0])
    inserted = tokenlearner.insert(model, 2)
    assert features_of(inserted, x).shape == (2, 16)
    classifier = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**config))
    with pytest.raises(InputError, match="Dinov2ForImageClassification gives no features"):
        features_of(classifier, x)


@pytest.mark.parametrize(
    "model", [nn.Flatten(), timm.create_model("test_vit", num_classes=0, global_pool="")], ids=["no ViT", "unpooled"]
)
def test_models_without_features_are_refused(model):
    with pytest.raises(InputError, match="gives no features, one vector a picture"):
        features_of(model, torch.randn(1, 3, 160, 160))


# ---- measures


def test_neighbours_are_those_of_scikit_learn(queries_at_once):
    queries, references = torch.randn(30, 5), torch.randn(50, 5)
    cosines, places = nearest(queries, references, 4)
    distances, expected = NearestNeighbors(n_neighbors=4, metric="cosine").fit(references).kneighbors(queries)
    assert np.array_equal(places, expected)
    np.testing.assert_allclose(1 - cosines, distances, atol=1e-5)


def test_the_overlap_of_neighbours_one_by_one(queries_at_once):
    host, references = torch.randn(30, 5), torch.randn(50, 5)
    model = host + 0.5 * torch.randn(30, 5)
    found = [
        [set(row) for row in NearestNeighbors(n_neighbors=4, metric="cosine").fit(references).kneighbors(x)[1].tolist()]
        for x in (model, host)
    ]
    expected = np.mean([len(one & other) / 4 for one, other in zip(*found)])
    assert 0.2 < expected < 0.9
    assert neighbour_overlap(model, host, references, 4) == pytest.approx(expected)
    assert neighbour_overlap(3 * host, host, references, 4) == 1.0


def test_the_vote_of_neighbours_is_that_of_scikit_learn(queries_at_once):
    queries, labels = blobs(20)
    references, reference_labels = blobs(30)
    voting = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = voting.fit(references, reference_labels).score(queries, labels)
    assert 0.4 < expected < 0.95
    assert knn_accuracy(queries, labels, references, reference_labels) == pytest.approx(expected)


def test_near_neighbours_outvote_far_ones():
    references, labels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]]), torch.tensor([0, 1, 1])
    query = torch.tensor([[2.0, 0.1]])
    assert knn_accuracy(query, torch.tensor([0]), references, labels, k=3) == 1.0
    assert knn_accuracy(query, torch.tensor([1]), references, labels, k=3, temperature=100.0) == 1.0


def test_agreement_on_classes():
    model, host, classes = torch.randn(40, 6), torch.randn(40, 6), torch.randn(5, 6)
    picks = [(unit(x) @ unit(classes).T).argmax(axis=1) for x in (model, host)]
    assert class_agreement(model, host, classes) == pytest.approx(np.mean(picks[0] == picks[1]))
    assert class_agreement(host, host, classes) == 1.0
    with pytest.raises(InputError, match=r"class_embeddings is \(5, 4\): expected a row a class of 6 numbers"):
        class_agreement(model, host, classes[:, :4])


def test_the_mean_of_a_class_is_of_directions():
    x, labels = blobs(10)
    expected = np.stack([unit(x)[labels == i].mean(axis=0) for i in range(4)])
    means = class_means(x * torch.rand(40, 1).add(0.1), labels, 4).numpy()
    np.testing.assert_allclose(means, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_all_of_it_together():
    host_x, labels = blobs(25)
    host_references, reference_labels = blobs(30)
    host = Extracted(host_x, host_references)
    model = Extracted(host_x + 0.5 * torch.randn(100, 6), host_references + 0.5 * torch.randn(120, 6))
    scores = compare(model, host, labels=FolderLabels(labels, reference_labels, 4), k=9)
    cosines = (unit(model.pictures) * unit(host.pictures)).sum(axis=1)
    assert scores.cosine == pytest.approx(cosines.mean(), abs=1e-5)
    assert scores.cosine_p5 == pytest.approx(np.percentile(cosines, 5), abs=1e-5)
    assert scores.neighbours == neighbour_overlap(model.pictures, host_x, host_references, 9)
    assert scores.knn_accuracy == knn_accuracy(model.pictures, labels, model.references, reference_labels, k=9)
    means = class_means(host_references, reference_labels, 4)
    assert scores.class_agreement == class_agreement(model.pictures, host_x, means)
    assert (scores.k, scores.pictures, scores.references) == (9, 100, 120)
    assert str(scores).endswith("right by nearest neighbours")
    itself = compare(host, host)
    assert (itself.cosine, itself.neighbours) == (pytest.approx(1.0), 1.0)
    assert (itself.class_agreement, itself.knn_accuracy) == (None, None)


def test_of_few_references_all_are_neighbours():
    few = Extracted(torch.randn(3, 4), torch.randn(5, 4))
    scores = compare(few, few)
    assert (scores.k, scores.neighbours) == (5, 1.0)
    with pytest.raises(InputError, match="k must be at least 1 and at most the 5 references, not 6"):
        nearest(few.pictures, few.references, 6)


def test_embeddings_behind_a_projection_are_compared_there():
    """As of CLIP, whose text embeddings are of the length of its head's outputs."""
    host = timm.create_model("test_vit", num_classes=7, img_size=32)
    projection = projection_for(host, (3, 32, 32), torch.randn(4, 7))
    assert projection is host.head
    assert projection_for(host, (3, 32, 32), torch.randn(4, 64)) is None
    x, classes = Extracted(torch.randn(50, 64), torch.randn(9, 64)), torch.randn(4, 7)
    other = Extracted(x.pictures + torch.randn(50, 64), x.references)
    with torch.no_grad():
        expected = class_agreement(host.head(other.pictures), host.head(x.pictures), classes)
    assert 0 < expected < 1
    assert compare(other, x, class_embeddings=classes, projection=projection).class_agreement == expected
    with pytest.raises(InputError, match="have 5 numbers a class, and VisionTransformer's features have 64"):
        projection_for(host, (3, 32, 32), torch.randn(4, 5))
