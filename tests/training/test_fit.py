"""Training a tiny ViT on tensors: what is reported, and what happens when something is wrong."""

import copy
import csv
import importlib.util
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner.data.images import Damaged
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.saving import load, save
from tokenlearner.training.fit import Fitted, fit
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.sampling import EpochBatches

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


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def steps_of(folder: Path) -> list[int]:
    """The number of updates made so far, as metrics.csv has it in each epoch."""
    return sorted({int(row["step"]) + 1 for row in rows(folder)})


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", torch.cuda.is_available())])
def test_attention_is_not_fused_while_training_in_16_bits_on_the_cpu(model, tmp_path, precision, fused):
    attention = model.blocks[0].attn
    seen = []
    train(
        model,
        samples(4),
        samples(2, seed=1),
        replace(STILL, epochs=1, precision=precision),
        tmp_path,
        after_epoch=lambda: seen.append(attention.fused_attn),
    )
    assert seen == [fused]
    assert attention.fused_attn


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


@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_of_every_fiftieth_step_is_in_the_metrics(model, tmp_path, parts):
    """With one image a part, whose loss can be told; of a batch in parts the last one's."""
    train_set = samples(55 * parts)
    recipe = replace(STILL, batch_size=parts, accumulate=parts)
    fitted = train(model, train_set, samples(3), recipe, tmp_path)
    logged = {int(row["step"]): float(row["loss"]) for row in rows(tmp_path) if "loss" in row}
    assert list(logged) == [49, 99]
    for step, loss in logged.items():
        batches = EpochBatches(len(train_set), parts, shuffle=True, parts=parts)
        batches.set_epoch(step // 55)
        last = list(batches)[step % 55 * parts + parts - 1]
        assert loss == pytest.approx(loss_of(model, [train_set[draw.place] for draw in last]), rel=1e-3)
    steps = [row for row in rows(tmp_path) if "loss" in row]
    assert len(steps) == 2
    assert steps_of(tmp_path) == [50, 55, 100, 110]
    assert [row["step"] for row in fitted.history] == [54, 109]


# ---- how a step is computed


def test_a_batch_in_parts_gives_the_weights_of_one_whole_batch(model, tmp_path):
    recipe = replace(LEARNING, optimizer=OptimizerRecipe("sgd", lr=0.1, warmup_epochs=1))
    ended, fitted = [], []
    for parts in (1, 2, 4):
        twin = copy.deepcopy(model)
        fitted.append(train(twin, samples(14), samples(3), replace(recipe, accumulate=parts), tmp_path / str(parts)))
        ended.append(twin.state_dict())
        assert steps_of(tmp_path / str(parts)) == [3, 6, 9]
    start = model.state_dict()
    assert not torch.allclose(ended[0]["head.weight"], start["head.weight"], atol=1e-2)
    for other, run in zip(ended[1:], fitted[1:]):
        torch.testing.assert_close(other, ended[0], rtol=1e-4, atol=1e-5)
        for row, whole in zip(run.history, fitted[0].history, strict=True):
            assert row == pytest.approx(whole, rel=1e-4)


def test_layers_computed_twice_to_save_memory_give_the_same_losses(model, tmp_path):
    calls = []
    model.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain, twin = copy.deepcopy(model), model
    kept = train(plain, samples(8), samples(3), LEARNING, tmp_path / "kept")
    once = len(calls)
    assert once == 3 * (2 + 1)  # two batches and one of validation, three times
    saved = train(
        twin,
        samples(8),
        samples(3),
        replace(LEARNING, grad_checkpointing=True),
        tmp_path / "again",
        after_epoch=lambda: save(twin, tmp_path / "model"),
    )
    assert len(calls) - once == 3 * (2 * 2 + 1)
    for row, expected in zip(saved.history, kept.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert model.grad_checkpointing is False
    images, _ = stacked(samples(4))
    torch.testing.assert_close(load(tmp_path / "model")(images), model(images))


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_losses_and_comes_back_as_it_was(
    model, tmp_path, monkeypatch, without_shape_checks
):
    """Without the compiler's last part, which writes and compiles C++ for a minute."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    recipe = replace(LEARNING, ema=0.5)
    plain, twin = model, copy.deepcopy(model)
    expected = train(plain, samples(8), samples(4), recipe, tmp_path / "plain")
    calls, names = [], []

    def keep() -> None:
        save(twin, tmp_path / "model")
        names.append(list(twin.state_dict()))
        calls.append(twin._compiled_call_impl is not None)

    fitted = train(twin, samples(8), samples(4), replace(recipe, compile=True), tmp_path / "compiled", after_epoch=keep)
    assert calls == [True] * 3  # it was, while it was trained
    for row, wanted in zip(fitted.history, expected.history, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
    assert names == [list(plain.state_dict())] * 3
    assert twin._compiled_call_impl is None
    images, _ = stacked(samples(4))
    torch.testing.assert_close(twin(images), plain(images), rtol=1e-2, atol=1e-3)
    for same in (pickle.loads(pickle.dumps(twin)), load(tmp_path / "model"), load(save(twin, tmp_path / "again"))):
        torch.testing.assert_close(same.eval()(images), twin(images))


# ---- other losses and targets


def sigmoid_loss_of(model: nn.Module, some: Samples, off: float = 0.0, on: float = 1.0) -> float:
    """Summed over the classes; labels are classes or vectors."""
    images = torch.stack([image for image, _, _ in some])
    hard = torch.stack([F.one_hot(torch.tensor(y), 3).float() if isinstance(y, int) else y for _, y, _ in some])
    with torch.no_grad():
        losses = F.binary_cross_entropy_with_logits(model(images), hard * (on - off) + off, reduction="none")
    return float(losses.sum(-1).mean())


def multilabel(number: int, seed: int = 0) -> Samples:
    """None, one or two of the classes 0 and 2; class 1 nowhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(number, 3, generator=generator) < 0.5).float() * torch.tensor([1.0, 0.0, 1.0])
    return [(image, label, i) for (image, _, i), label in zip(samples(number, seed), labels)]


def test_sigmoid_on_single_labels(model, tmp_path):
    train_set, val_set = samples(8), samples(7, seed=1)
    fitted = train(model, train_set, val_set, replace(STILL, loss="sigmoid", label_smoothing=0.3), tmp_path)
    for row in fitted.history:
        assert row["train_loss"] == pytest.approx(sigmoid_loss_of(model, train_set, 0.1, 0.8), rel=1e-4)
        assert row["val_loss"] == pytest.approx(sigmoid_loss_of(model, val_set), rel=1e-4)
        assert row["val_accuracy"] == pytest.approx(accuracy_of(model, val_set))
    assert fitted.metric == "accuracy"


def test_sigmoid_learns_single_labels(model, tmp_path):
    fitted = train(model, samples(48), samples(24, seed=1), replace(LEARNING, loss="sigmoid"), tmp_path)
    assert fitted.accuracy > 0.9


def test_several_labels_are_scored_by_average_precision(model, tmp_path, capsys):
    train_set, val_set = multilabel(8), multilabel(21, seed=1)
    fitted = train(model, train_set, val_set, replace(STILL, loss="sigmoid"), tmp_path, multilabel=True)
    with torch.no_grad():
        scores = model(torch.stack([image for image, _, _ in val_set]))[:, ::2]
    labels = torch.stack([label for _, label, _ in val_set])[:, ::2]
    expected = average_precision_score(labels, scores, average="macro")
    assert 0.1 < expected < 0.99
    for row in fitted.history:
        assert row["train_loss"] == pytest.approx(sigmoid_loss_of(model, train_set), rel=1e-4)
        assert row["val_loss"] == pytest.approx(sigmoid_loss_of(model, val_set), rel=1e-4)
        assert row["val_map"] == pytest.approx(expected, abs=1e-5)
        assert "val_accuracy" not in row
    assert (fitted.accuracy, fitted.metric) == (fitted.history[-1]["val_map"], "mean average precision")
    assert float(rows(tmp_path)[-1]["val_map"]) == pytest.approx(expected, abs=1e-5)
    assert f"epoch 2/2  map {expected:.1%}" in capsys.readouterr().err


def test_several_labels_need_the_sigmoid_loss(model, tmp_path):
    with pytest.raises(InputError, match="several labels, or none: use --loss sigmoid"):
        train(model, multilabel(4), multilabel(3), STILL, tmp_path, multilabel=True)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("augment", [AugmentRecipe(mixup=0.8), AugmentRecipe(cutmix=1.0)], ids=["mixup", "cutmix"])
def test_only_training_images_are_mixed(model, tmp_path, augment, several):
    train_set, val_set = (multilabel(9), multilabel(7, 1)) if several else (samples(9), samples(7, 1))
    recipe = replace(STILL, loss="sigmoid" if several else "cross_entropy", augment=augment)
    loss = sigmoid_loss_of if several else loss_of
    fitted = train(model, train_set, val_set, recipe, tmp_path, multilabel=several)
    assert fitted.history[0]["train_loss"] != fitted.history[1]["train_loss"]
    for row in fitted.history:
        assert row["val_loss"] == pytest.approx(loss(model, val_set), rel=1e-4)


def test_a_damaged_file_among_mixed_images(model, tmp_path):
    """It leaves an odd number to mix."""
    recipe = replace(LEARNING, augment=AugmentRecipe(mixup=0.8, cutmix=1.0))
    fitted = train(model, samples(7) + lost("a.jpg"), samples(3), recipe, tmp_path)
    assert [damaged.path for damaged in fitted.damaged] == ["a.jpg"]


def test_mixed_images_teach_what_unmixed_ones_are(model, tmp_path):
    recipe = replace(LEARNING, epochs=4, augment=AugmentRecipe(mixup=0.8))
    assert train(model, samples(48), samples(24, seed=1), recipe, tmp_path).accuracy > 0.9


# ---- loggers


def test_tensorboard_gets_what_the_metrics_get(model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitted = train(model, samples(8), samples(3), replace(LEARNING, tensorboard=True), tmp_path)
    events = EventAccumulator(str(next(tmp_path.glob("events.out.tfevents.*"))))
    events.Reload()
    for name in ("train_loss", "val_loss", "val_accuracy"):
        written = {event.step: event.value for event in events.Scalars(name)}
        assert written == pytest.approx({row["step"]: row[name] for row in fitted.history})
    assert len(rows(tmp_path)) == len(fitted.history)


@pytest.mark.parametrize(
    ("wanted", "there", "missing"),
    [
        ({"wandb"}, {"tensorboard"}, "wandb"),
        ({"tensorboard"}, {"wandb"}, "tensorboard"),
        ({"tensorboard", "wandb"}, {"tensorboard"}, "wandb"),
        ({"tensorboard", "wandb"}, set(), "tensorboard"),
    ],
)
def test_a_logger_that_is_not_installed_is_named(model, tmp_path, monkeypatch, wanted, there, missing):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    recipe = replace(STILL, **dict.fromkeys(wanted, True))
    with pytest.raises(InputError, match=f"logs to {missing}, which is not installed: pip install {missing}"):
        train(model, samples(4), samples(3), recipe, tmp_path)


# ---- going on with a run


@pytest.mark.parametrize("ema", [None, 0.5])
def test_going_on_with_a_run_that_has_ended_gives_its_model(model, tmp_path, ema):
    """All that is left to do is to write the summary; with an average it is the average that was scored and saved."""
    recipe, begin = replace(LEARNING, ema=ema), copy.deepcopy(model)
    fitted = train(model, samples(8), samples(9, seed=1), recipe, tmp_path, checkpoints=True)
    again = train(begin, samples(8), samples(9, seed=1), recipe, tmp_path, checkpoints=True, resume=True)
    assert again.history == fitted.history
    torch.testing.assert_close(begin.state_dict(), model.state_dict())


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


@pytest.mark.parametrize("parts", [3, 8])
def test_a_batch_that_does_not_divide_ends_the_run(model, tmp_path, parts):
    with pytest.raises(InputError, match=f"batch_size 4 can't be split evenly over 1 processes and {parts} parts"):
        train(model, samples(8), samples(3), replace(STILL, accumulate=parts), tmp_path)
