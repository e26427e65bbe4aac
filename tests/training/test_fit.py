"""Training a tiny ViT on tensors: what is reported, and what happens when something is wrong."""

import copy
import csv
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner.data.images import Damaged
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.saving import load, save
from tokenlearner.training.fit import Fitted, fit
from tokenlearner.training.recipe import OptimizerRecipe, Recipe

Samples = list  # a list is a dataset: it has a length and items
STILL = Recipe(  # learns nothing, so that every loss can be computed from the model before
    epochs=2, batch_size=4, workers=0, label_smoothing=0.0, optimizer=OptimizerRecipe("sgd", lr=0.0, min_lr=0.0)
)
LEARNING = replace(STILL, epochs=3, optimizer=OptimizerRecipe(lr=1e-2, warmup_epochs=0))


@pytest.fixture
def model() -> nn.Module:
    """Random, but with a head that tells its three classes apart by more than rounding."""
    host = VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2)
    nn.init.normal_(host.head.weight)
    return insert(host, 2, at=1)


def samples(number: int, seed: int = 0) -> Samples:
    """Noise of brightness -2, 0 and 2 for the three classes."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 8, 8, generator=generator) + 2.0 * (i % 3 - 1), i % 3, i) for i in range(number)]


def stacked(some: Samples) -> tuple[Tensor, Tensor]:
    good = [sample for sample in some if not isinstance(sample, Damaged)]
    return torch.stack([image for image, _, _ in good]), torch.tensor([label for _, label, _ in good])


@torch.no_grad()
def loss_of(model: nn.Module, some: Samples, label_smoothing: float = 0.0) -> float:
    images, labels = stacked(some)
    return float(F.cross_entropy(model(images), labels, label_smoothing=label_smoothing))


@torch.no_grad()
def accuracy_of(model: nn.Module, some: Samples) -> float:
    images, labels = stacked(some)
    return float((model(images).argmax(-1) == labels).float().mean())


def head_of(model: nn.Module) -> Tensor:
    """A copy: training goes on, on another device perhaps."""
    return model.head.weight.detach().cpu().clone()


def train(model: nn.Module, train_set: Samples, val_set: Samples, recipe: Recipe, folder: Path, **more) -> Fitted:
    L.seed_everything(0, verbose=False)
    return fit(model, train_set, val_set, recipe, folder, num_classes=3, **more)


def steps_of(folder: Path) -> list[int]:
    """The number of updates made so far, as metrics.csv has it in each epoch."""
    with (folder / "metrics.csv").open(newline="") as file:
        return sorted({int(row["step"]) + 1 for row in csv.DictReader(file)})


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


# ---- what is reported


def test_history_is_what_the_model_did(model, tmp_path):
    train_set, val_set = samples(12), samples(7, seed=1)
    fitted = train(model, train_set, val_set, replace(STILL, label_smoothing=0.3), tmp_path)
    assert [row["epoch"] for row in fitted.history] == [0, 1]
    for row in fitted.history:
        assert row["train_loss"] == pytest.approx(loss_of(model, train_set, 0.3), rel=1e-4)
        assert row["val_loss"] == pytest.approx(loss_of(model, val_set), rel=1e-4)  # smoothing is for training alone
        assert row["val_accuracy"] == pytest.approx(accuracy_of(model, val_set))
    assert fitted.accuracy == pytest.approx(accuracy_of(model, val_set))
    assert fitted.damaged == ()
    assert fitted.seconds > 0


def test_training_learns_and_leaves_the_model_ready_for_use(model, tmp_path):
    train_set, val_set = samples(48), samples(24, seed=1)
    before = loss_of(model, val_set)
    fitted = train(model, train_set, val_set, LEARNING, tmp_path)
    assert not model.training
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert fitted.history[-1]["val_loss"] == pytest.approx(loss_of(model, val_set), rel=1e-4)
    assert loss_of(model, val_set) < 0.5 * before
    assert fitted.accuracy == pytest.approx(accuracy_of(model, val_set))
    assert fitted.accuracy > 0.9


def test_a_loaded_model_is_trained_in_training_mode(tmp_path):
    """``load`` returns it in eval mode, and Lightning would leave it there: no dropout, no stochastic depth."""
    model = VisionTransformer(
        img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=2, num_heads=2, drop_rate=0.9
    )
    nn.init.normal_(model.head.weight)
    train_set, val_set = samples(8), samples(3)
    fitted = train(model.eval(), train_set, val_set, STILL, tmp_path)
    assert fitted.history[0]["train_loss"] != pytest.approx(loss_of(model, train_set), rel=0.05)
    assert fitted.history[0]["val_loss"] == pytest.approx(loss_of(model, val_set), rel=1e-4)


def test_a_second_run_starts_its_own_metrics(model, tmp_path):
    train(model, samples(4), samples(3), STILL, tmp_path)
    fitted = train(model, samples(4), samples(3), replace(STILL, epochs=1), tmp_path)
    assert [row["epoch"] for row in fitted.history] == [0]


@pytest.mark.parametrize(
    ("number", "updates"),
    [(3, 1), (4, 1), (7, 2), (8, 2), (10, 2), (11, 2)],  # an epoch, in batches of four
)
def test_only_larger_sets_drop_their_last_batch(model, tmp_path, number, updates):
    """Of seven images three would be missing from every epoch, of three all: those end with a smaller batch."""
    train_set = samples(number)
    fitted = train(model, train_set, samples(3), STILL, tmp_path)
    assert steps_of(tmp_path) == [updates, 2 * updates]
    losses = [row["train_loss"] for row in fitted.history]
    if number <= 8:  # every image once, each with the same weight
        assert losses == pytest.approx([loss_of(model, train_set)] * 2, rel=1e-4)
    else:  # a different two or three are left out each time
        assert losses[0] != pytest.approx(losses[1], rel=1e-4)


# ---- after each epoch


def test_after_epoch_sees_the_model_of_every_epoch(model, tmp_path):
    seen = [head_of(model)]
    fitted = train(model, samples(8), samples(3), LEARNING, tmp_path, after_epoch=lambda: seen.append(head_of(model)))
    assert len(seen) == 1 + LEARNING.epochs == 1 + len(fitted.history)
    assert all(not torch.equal(before, after) for before, after in pairwise(seen))
    assert torch.equal(seen[-1], model.head.weight)


def test_an_interrupted_run_keeps_the_epochs_before(model, tmp_path):
    calls = []

    def keep_then_stop() -> None:
        calls.append(head_of(model))
        if len(calls) == 2:
            raise KeyboardInterrupt
        save(model, tmp_path)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(model, samples(8), samples(3), LEARNING, tmp_path, after_epoch=keep_then_stop)
    assert len(calls) == 2
    assert torch.equal(load(tmp_path).head.weight, calls[0])
    assert not torch.equal(calls[0], calls[1])
    assert signal.getsignal(signal.SIGINT) is handler  # and the next Ctrl-C counts, too


@pytest.mark.parametrize("ema", [0.0, 0.7])
def test_averaged_weights_are_what_is_scored_saved_and_kept(model, tmp_path, ema):
    """One update an epoch, whose weights the same run without averaging shows; the average starts with the first."""
    bare, averaged = [], []
    twin = copy.deepcopy(model)
    train(twin, samples(4), samples(9), LEARNING, tmp_path, after_epoch=lambda: bare.append(head_of(twin)))
    fitted = train(
        model,
        samples(4),
        samples(9),
        replace(LEARNING, ema=ema),
        tmp_path,
        after_epoch=lambda: averaged.append(head_of(model)),
    )
    expected = bare[:1]
    for weights in bare[1:]:
        expected.append(ema * expected[-1] + (1 - ema) * weights)
    for kept, wanted in zip(averaged, expected, strict=True):
        assert torch.allclose(kept, wanted, atol=1e-6)
    assert torch.equal(model.head.weight, averaged[-1])
    assert fitted.history[-1]["val_loss"] == pytest.approx(loss_of(model, samples(9)), rel=1e-4)
    assert fitted.accuracy == pytest.approx(accuracy_of(model, samples(9)))


# ---- what is wrong


def test_a_loss_that_is_lost_ends_the_run_with_advice_and_saves_nothing_over_the_last_model(model, tmp_path):
    optimizer = OptimizerRecipe("sgd", lr=1e30, clip_norm=None, warmup_epochs=0)
    saved = []
    advice = r"no longer finite in epoch 1; lower optimizer\.lr \(now 1e\+30\)"
    with pytest.raises(InputError, match=advice) as caught:
        train(model, samples(8), samples(3), replace(STILL, optimizer=optimizer), tmp_path, after_epoch=saved.append)
    assert "optimizer.warmup_epochs" in str(caught.value)
    assert "optimizer.clip_norm" in str(caught.value)
    assert not saved


def test_weights_lost_in_the_very_last_step_are_noticed(model, tmp_path):
    """The training loss of that step was still finite; only the held-out images tell."""
    optimizer = OptimizerRecipe("sgd", lr=1e30, clip_norm=None, warmup_epochs=0)
    with pytest.raises(InputError, match=r"finite in epoch 1"):
        train(model, samples(4), samples(3), replace(STILL, epochs=1, optimizer=optimizer), tmp_path)


def lost(*names: str) -> Samples:
    return [Damaged(name, "the file is empty") for name in names]


def test_damaged_files_are_left_out_and_named_once(model, tmp_path):
    train_set, val_set = samples(6) + lost("a.jpg", "b.jpg"), lost("c.jpg") + samples(3, seed=1)
    fitted = train(model, train_set, val_set, STILL, tmp_path)
    assert sorted(fitted.damaged) == [(f"{name}.jpg", "the file is empty") for name in "abc"]
    for row in fitted.history:
        assert row["train_loss"] == pytest.approx(loss_of(model, train_set), rel=1e-4)
        assert row["val_loss"] == pytest.approx(loss_of(model, val_set), rel=1e-4)
        assert row["val_accuracy"] == pytest.approx(accuracy_of(model, val_set))


def test_batches_of_nothing_but_damaged_files_are_passed_over(model, tmp_path):
    """With one file a batch each damaged one is such a batch: no update, and no mark on the means."""
    train_set, val_set = lost("a.jpg") + samples(5), lost("b.jpg", "c.jpg") + samples(4, seed=1)
    fitted = train(model, train_set, val_set, replace(STILL, batch_size=1), tmp_path)
    assert {damaged.path for damaged in fitted.damaged} == {"a.jpg", "b.jpg", "c.jpg"}
    for row in fitted.history:
        assert row["train_loss"] == pytest.approx(loss_of(model, train_set), rel=1e-4)
        assert row["val_accuracy"] == pytest.approx(accuracy_of(model, val_set))
    train(model, train_set, val_set, replace(LEARNING, batch_size=1), tmp_path)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("good", "part"), [("val", "training"), ("train", "held-out")])
def test_a_part_without_a_readable_image_ends_the_run(model, tmp_path, good, part):
    train_set, val_set = (samples(4) if good == name else lost("a.jpg", "b.jpg") for name in ("train", "val"))
    saved = []
    with pytest.raises(InputError, match=f"none of the {part} images could be decoded.*[ab].jpg: the file is empty"):
        train(model, train_set, val_set, STILL, tmp_path, after_epoch=lambda: saved.append(1))
    assert not saved
