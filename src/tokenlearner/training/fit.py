"""Runs Lightning's Trainer on one model and hands back what happened."""

from __future__ import annotations

import csv
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback, RichProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from tokenlearner.data.images import Damaged, collate
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import Speed
from tokenlearner.inspection.summary import ModelResult
from tokenlearner.training.module import Classifier
from tokenlearner.training.recipe import Recipe


@dataclass(frozen=True)
class Fitted:
    """``history`` has one row per epoch: epoch, train_loss, val_loss, val_accuracy (0 to 1)."""

    accuracy: float
    seconds: float
    history: list[dict[str, float]]
    damaged: tuple[Damaged, ...]


def fit(
    model: nn.Module,
    train_set: Dataset[Any],
    val_set: Dataset[Any],
    recipe: Recipe,
    folder: Path,
    *,
    num_classes: int,
    after_epoch: Callable[[], object] | None = None,
) -> Fitted:
    """Trains ``model`` in place by ``recipe``; logs to ``folder/metrics.csv``; leaves it in eval mode on the CPU.

    ``after_epoch`` runs after every validation, to save the model, say: what is trained so far is never lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").unlink(missing_ok=True)
    classifier = Classifier(model.train(), recipe, num_classes)  # Lightning leaves the mode as it is
    callbacks: list[Callback] = [RichProgressBar() if sys.stderr.isatty() else LineProgress()]
    if after_epoch is not None:
        callbacks.append(AfterEpoch(after_epoch))
    if recipe.ema is not None:  # after AfterEpoch: it swaps the averaged weights in for validation, and out at its end
        callbacks.append(WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)))
    start = time.perf_counter()
    with quiet_lightning(), interruptible():
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            accelerator="auto",
            devices=1,
            precision=recipe.precision,
            gradient_clip_val=recipe.optimizer.clip_norm,
            logger=CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        trainer.fit(classifier, _loader(train_set, recipe, shuffle=True), _loader(val_set, recipe, shuffle=False))
    model.cpu().eval()
    history = read_history(folder / "metrics.csv")
    return Fitted(
        accuracy=float(trainer.callback_metrics["val_accuracy"]),
        seconds=time.perf_counter() - start,
        history=history,
        damaged=tuple(classifier.damaged.values()),
    )


@contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C come out as KeyboardInterrupt, where Lightning would exit with 1 and no word."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from stop
        raise


def result_of(name: str, model: nn.Module, fitted: Fitted, speed: Speed, input_size: tuple[int, ...]) -> ModelResult:
    """What a run's summary and report say of one trained and measured model."""
    counted = cost(model, input_size)
    return ModelResult(
        name=name,
        accuracy=fitted.accuracy,
        parameters=counted.parameters,
        macs=counted.macs,
        images_per_second=speed.images_per_second,
        images_per_second_spread=speed.spread,
        speedup=speed.ratio,
        tokens_per_layer=counted.tokens,
        train_seconds=fitted.seconds,
        history=fitted.history,
    )


class LineProgress(Callback):
    """Ten lines a run, for logs and other places where a progress bar would be noise."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done, total = trainer.current_epoch + 1, trainer.max_epochs or 1
        if done % max(1, total // 10) and done != total:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        line = f"  epoch {done}/{total}  accuracy {metrics.get('val_accuracy', 0):.1%}"
        print(line, file=sys.stderr, flush=True)


class AfterEpoch(Callback):
    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.check_epoch()  # a model gone wrong must not be saved over the last good one
        if trainer.is_global_zero:
            self.action()


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, merged to one per epoch."""
    epochs: dict[int, dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            epoch = epochs.setdefault(int(row["epoch"]), {"epoch": int(row["epoch"])})
            epoch |= {k: float(v) for k, v in row.items() if v and k not in ("epoch", "step")}
    return [epochs[key] for key in sorted(epochs)]


class quiet_lightning(warnings.catch_warnings):  # noqa: N801 - reads as the context manager it is
    """Keeps Lightning's advice (more workers, tips, hardware lists) out of the way of the progress bar."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # the model is saved next to its log
        warnings.filterwarnings("ignore", message=".*returned `None`")  # a batch of damaged files alone
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6 on torch 2.13
        self._levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        return entered

    def __exit__(self, *exc_info: object) -> None:
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        super().__exit__(*exc_info)  # type: ignore[arg-type]


def _loader(dataset: Dataset[Any], recipe: Recipe, *, shuffle: bool) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        shuffle=shuffle,
        num_workers=recipe.workers,
        persistent_workers=recipe.workers > 0,
        collate_fn=collate,
        drop_last=shuffle and len(dataset) >= 2 * recipe.batch_size,  # type: ignore[arg-type]
    )
