"""Targets and losses against torch's own and by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenlearner.training.losses import Targets, loss_of

CLASSES = 7


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Every image of another class than the one it is mixed with."""
    return torch.randn(size, 3, 8, 8), torch.arange(size) % CLASSES


def several(size: int = 6) -> torch.Tensor:
    """Multi-label: none, one or more of the classes."""
    return (torch.rand(size, CLASSES) < 0.4).float()


# ---- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_is_torchs(smoothing):
    images, labels = batch()
    logits = torch.randn(6, CLASSES)
    same, targets = Targets(CLASSES, label_smoothing=smoothing)(images, labels)
    assert same is images
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss_of(logits, targets, "cross_entropy"), expected)


def test_sigmoid_loss_by_hand():
    """The sum over the classes, the mean over the images."""
    logits = torch.tensor([[0.0, 2.0, -1.0], [3.0, 0.5, 0.0]])
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.25]])

    def one(z: float, t: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return -t * math.log(p) - (1 - t) * math.log(1 - p)

    both = [sum(one(z, t) for z, t in zip(*row)) for row in zip(logits.tolist(), targets.tolist())]
    assert float(loss_of(logits, targets, "sigmoid")) == pytest.approx(sum(both) / 2)


@pytest.mark.parametrize("kind", ["cross_entropy", "sigmoid"])
def test_large_logits_have_a_finite_loss_and_gradient(kind):
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = loss_of(logits, torch.tensor([[0.0, 1.0, 0.0]]), kind)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4, rel=1e-3)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_low_precision_logits_keep_their_precision():
    logits, (images, labels) = torch.randn(6, CLASSES), batch()
    targets = Targets(CLASSES, label_smoothing=0.1)(images, labels)[1]
    for kind in ("cross_entropy", "sigmoid"):
        loss = loss_of(logits.bfloat16(), targets, kind)
        assert loss.dtype == torch.bfloat16
        assert float(loss) == pytest.approx(float(loss_of(logits, targets, kind)), rel=0.02)


# ---- targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_multilabel_targets_are_smoothed_towards_one_half(smoothing):
    labels = several()
    images, targets = batch()[0], Targets(CLASSES, multilabel=True, label_smoothing=smoothing)
    assert torch.equal(targets(images, labels)[0], images)
    expected = torch.where(labels > 0, 1 - smoothing / 2, smoothing / 2)
    torch.testing.assert_close(targets(images, labels)[1], expected)


@pytest.mark.parametrize("multilabel", [False, True])
def test_nothing_is_mixed_without_an_alpha(multilabel):
    images, labels = batch()
    targets = Targets(CLASSES, multilabel=multilabel)
    hard = several() if multilabel else labels
    mixed, distribution = targets(images, hard)
    assert mixed is images
    assert torch.equal(distribution, hard if multilabel else F.one_hot(labels, CLASSES).float())


def seen_by_seed(seeds: int, images: torch.Tensor, labels: torch.Tensor, **options) -> list:
    """(mixed images, targets) for every seed of NumPy's generator, from which the share is drawn."""
    targets, drawn = Targets(CLASSES, **options), []
    for seed in range(seeds):
        np.random.seed(seed)
        drawn.append(targets(images, labels))
    return drawn


def share_of(targets: torch.Tensor, labels: torch.Tensor) -> float:
    """λ: of image 0's own class, which its partner does not have."""
    return float(targets[0, labels[0]])


def test_mixup_mixes_images_and_labels_by_the_same_share():
    images, labels = batch()
    one_hot = F.one_hot(labels, CLASSES).float()
    shares = []
    for mixed, targets in seen_by_seed(8, images, labels, mixup=0.8):
        share = share_of(targets, labels)
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.flip(0))
        torch.testing.assert_close(targets.sum(-1), torch.ones(6))
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))
        shares.append(round(share, 4))
    assert len(set(shares)) == 8


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    images, labels = batch()
    one_hot = F.one_hot(labels, CLASSES).float()
    shares = []
    for mixed, targets in seen_by_seed(8, images, labels, cutmix=1.0):
        pasted = (mixed != images).any(1)
        assert all(torch.equal(box, pasted[0]) for box in pasted)
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns)
        assert torch.equal(mixed, torch.where(pasted[:, None], images.flip(0), images))
        share = 1 - float(pasted[0].float().mean())
        torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.flip(0))
        shares.append(share)
    assert len(set(shares)) > 4


def test_with_both_every_batch_takes_one_of_the_two():
    images, labels = batch()
    kinds = []
    for mixed, targets in seen_by_seed(30, images, labels, mixup=0.8, cutmix=1.0):
        blended = share_of(targets, labels) * images + (1 - share_of(targets, labels)) * images.flip(0)
        pasted = (mixed == images) | (mixed == images.flip(0))
        assert torch.allclose(mixed, blended, atol=1e-5) or bool(pasted.all())
        kinds.append(bool(pasted.all()))
    assert 5 < sum(kinds) < 25


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_mixed_targets_are_smoothed_too(multilabel, options):
    images, labels = batch()
    hard = F.one_hot(labels, CLASSES).float()
    given, spread = (hard, 0.5) if multilabel else (labels, 1 / CLASSES)
    for seed in range(4):
        np.random.seed(seed)
        _, mixed = Targets(CLASSES, multilabel=multilabel, **options)(images, given)
        np.random.seed(seed)
        _, smoothed = Targets(CLASSES, multilabel=multilabel, label_smoothing=0.3, **options)(images, given)
        torch.testing.assert_close(smoothed, 0.7 * mixed + 0.3 * spread)


def test_multilabel_targets_are_mixed_entry_by_entry():
    images, labels = batch()[0], several()
    labels[0, 0], labels[-1, 0] = 1.0, 0.0  # so that λ can be read off
    for mixed, targets in seen_by_seed(4, images, labels, multilabel=True, mixup=0.8):
        share = float(targets[0, 0])
        torch.testing.assert_close(targets, share * labels + (1 - share) * labels.flip(0))
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_an_odd_one_out_is_left_as_it_is(options, size, multilabel):
    """A damaged file can leave an odd number, and timm mixes pairs."""
    images, labels = batch(size)
    hard = several(size) if multilabel else F.one_hot(labels, CLASSES).float()
    mixing = Targets(CLASSES, multilabel=multilabel, label_smoothing=0.2, **options)
    np.random.seed(1)
    mixed, targets = mixing(images, hard if multilabel else labels)
    assert mixed.shape == images.shape
    assert torch.equal(mixed[-1], images[-1])
    torch.testing.assert_close(targets[-1], 0.8 * hard[-1] + 0.2 * (0.5 if multilabel else 1 / CLASSES))
    np.random.seed(1)
    if size > 1:
        even = mixing(images[:-1], (hard if multilabel else labels)[:-1])
        assert torch.equal(mixed[:-1], even[0])
        assert torch.equal(targets[:-1], even[1])


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("options", [{}, {"mixup": 0.8}, {"cutmix": 1.0}], ids=["none", "mixup", "cutmix"])
def test_what_is_given_is_not_changed(options, size, multilabel):
    images, labels = batch(size)
    labels = several(size) if multilabel else labels
    before = images.clone(), labels.clone()
    for _ in range(3):
        Targets(CLASSES, multilabel=multilabel, label_smoothing=0.1, **options)(images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
