"""Runs Lightning's Trainer on one model and hands back what happened."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import Callback, RichProgressBar, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from tokenlearner.data.images import Damaged, collate
from tokenlearner.errors import InputError
from tokenlearner.inspection.cost import cost
from tokenlearner.inspection.speed import Speed
from tokenlearner.inspection.summary import ModelResult
from tokenlearner.training.checkpoint import Progress, WholeCheckpoints, checkpoint_callbacks, read_progress
from tokenlearner.training.distill import Distilled, Taught
from tokenlearner.training.module import Classifier
from tokenlearner.training.recipe import Recipe
from tokenlearner.training.sampling import EpochBatches, Seeded


@dataclass(frozen=True)
class Fitted:
    """``history`` has one row per epoch: epoch, step, train_loss, val_loss, val_accuracy or val_map (0 to 1), and lr.

    ``accuracy`` is the last epoch's of whichever ``metric`` names.
    """

    accuracy: float
    seconds: float
    history: list[dict[str, float]]
    damaged: tuple[Damaged, ...]
    metric: str = "accuracy"


def fit(
    model: nn.Module,
    train_set: Dataset[Any],
    val_set: Dataset[Any],
    recipe: Recipe,
    folder: Path,
    *,
    num_classes: int,
    after_epoch: Callable[[], object] | None = None,
    multilabel: bool = False,
    checkpoints: bool = False,
    resume: bool = False,
    data: str = "",
    teacher: nn.Module | None = None,
    taught: type[Taught] = Distilled,
) -> Fitted:
    """Trains ``model`` in place by ``recipe``; logs to ``folder/metrics.csv``; leaves it in eval mode on the CPU.

    Under ``torchrun`` every process calls this with the same arguments; each gets its share of every batch and of the
    evaluation, and the same result.

    Args:
        after_epoch: Runs after every validation, to save the model, say: what is trained so far is never lost. In the
            first process only.
        checkpoints: Keep one in ``folder/checkpoints``, after every epoch and ``recipe.checkpoint_steps`` steps.
        resume: Go on from it, if there is one, as if the run had never stopped.
        data: What identifies the data sets; a checkpoint made with other ``data`` is refused.
        teacher: A model of the same classes to be trained towards, as ``recipe.distill`` says.
        taught: What is learned from it.

    Raises:
        InputError: Recipe, labels, processes or checkpoint don't go together, or the training has gone wrong.
    """
    check_run(recipe, multilabel)
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"multilabel": multilabel, "data": data}
    if teacher is None:
        classifier = Classifier(model.train(), recipe, num_classes, **options)
    else:
        classifier = taught(model.train(), recipe, num_classes, teacher=teacher, **options)
    progress = read_progress(folder, data) if resume else None
    world = Processes.of_torchrun()
    train_loader, val_loader = _loaders(train_set, val_set, recipe, world, progress)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if recipe.compile:
        model.compile()
    callbacks: list[Callback] = [RichProgressBar() if sys.stderr.isatty() else LineProgress()]
    callbacks.append(AfterEpoch(after_epoch or (lambda: None)))
    averaging = None
    if recipe.ema is not None:  # after AfterEpoch: it swaps the averaged weights in for validation, and out at its end
        averaging = WeightAveraging(use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        callbacks.append(averaging)
    if checkpoints:
        callbacks += checkpoint_callbacks(folder, recipe.checkpoint_steps)
    start = time.perf_counter()
    with quiet_lightning(), interruptible():
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            accelerator="auto",
            devices=world.local,
            num_nodes=world.nodes,
            strategy="ddp" if world.processes > 1 else "auto",
            use_distributed_sampler=False,  # EpochBatches shares the images out
            precision=recipe.precision,
            gradient_clip_val=recipe.optimizer.clip_norm,
            accumulate_grad_batches=recipe.accumulate,
            logger=new_loggers(folder, recipe, progress),
            plugins=[WholeCheckpoints()],
            callbacks=callbacks,
            enable_checkpointing=checkpoints,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            log_every_n_steps=50,
        )
        with plain_attention(model, trainer):
            trainer.fit(
                classifier,
                train_loader,
                val_loader,
                ckpt_path=progress.path if progress else None,
                weights_only=True,
            )
        if averaging is not None:  # Lightning leaves this out where a run that has ended is gone on with
            averaging.on_train_end(trainer, classifier)
    damaged = _from_all_processes(classifier.damaged)
    if recipe.compile:
        model._compiled_call_impl = None
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    model.cpu().eval()
    return Fitted(
        accuracy=classifier.history[-1][classifier.score_name],
        seconds=time.perf_counter() - start,
        history=classifier.history,
        damaged=tuple(damaged.values()),
        metric="mean average precision" if multilabel else "accuracy",
    )


def check_run(recipe: Recipe, multilabel: bool) -> None:
    """What can be known before anything is written.

    Raises:
        InputError: Labels and loss don't go together, a logger is not installed, or a batch can't be shared out.
    """
    if multilabel and recipe.loss != "sigmoid":
        raise InputError("these images have several labels, or none: use --loss sigmoid")
    for name, wanted in (("tensorboard", recipe.tensorboard), ("wandb", recipe.wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise InputError(f"the recipe logs to {name}, which is not installed: pip install {name}")
    EpochBatches(
        0, recipe.batch_size, shuffle=True, processes=Processes.of_torchrun().processes, parts=recipe.accumulate
    )


class Processes(NamedTuple):
    """All ``processes``, this one's ``rank`` among them, and ``local`` of them on each of ``nodes`` machines."""

    processes: int = 1
    rank: int = 0
    local: int = 1
    nodes: int = 1

    @classmethod
    def of_torchrun(cls) -> Processes:
        """What torchrun says in the environment; one process without it."""
        count, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        return cls(count, rank, local, count // local)


def _loaders(
    train_set: Dataset[Any], val_set: Dataset[Any], recipe: Recipe, world: Processes, progress: Progress | None
) -> list[DataLoader[Any]]:
    share: dict[str, Any] = {"rank": world.rank, "processes": world.processes, "parts": recipe.accumulate}
    start = (progress.epoch, progress.parts) if progress else (0, 0)
    batches = [
        (
            train_set,
            EpochBatches(_length(train_set), recipe.batch_size, shuffle=True, seed=recipe.seed, start=start, **share),
        ),
        (val_set, EpochBatches(_length(val_set), recipe.batch_size, shuffle=False, **share)),
    ]
    return [
        DataLoader(
            Seeded(dataset),
            batch_sampler=sampler,
            num_workers=recipe.workers,
            persistent_workers=recipe.workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
        )
        for dataset, sampler in batches
    ]


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]


def new_loggers(folder: Path, recipe: Recipe, progress: Progress | None) -> list[Logger]:
    """metrics.csv, with what it had of a run that goes on, and whatever else the recipe names."""
    path = folder / "metrics.csv"
    kept: list[dict[str, Any]] = list(progress.history) if progress else []
    if progress and path.exists():  # the rows of an epoch are in the history, those of steps only there
        with path.open(newline="") as file:
            steps = [row for row in csv.DictReader(file) if not row.get("train_loss")]
        kept += [{k: v for k, v in row.items() if v} for row in steps if int(row["step"]) < progress.steps]
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    if Processes.of_torchrun().rank == 0:
        table.experiment.metrics = sorted(kept, key=lambda row: int(row["step"]))  # it deletes the old file
    loggers: list[Logger] = [table]
    if recipe.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="", version=""))
    if recipe.wandb:
        loggers.append(WandbLogger(project="tokenlearner", name=folder.name, save_dir=folder))
    return loggers


def _from_all_processes(damaged: dict[str, Damaged]) -> dict[str, Damaged]:
    """The union over the processes, which have nothing more to tell one another."""
    if not torch.distributed.is_initialized():
        return damaged
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, damaged)
    torch.distributed.destroy_process_group()
    return {path: entry for part in found for path, entry in part.items()}


@contextmanager
def plain_attention(model: nn.Module, trainer: L.Trainer) -> Iterator[None]:
    """On a CPU in 16 bits, timm's attention as two products: the backward pass of the fused one takes twice as long."""
    fused: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False) is True]
    slow = trainer.strategy.root_device.type == "cpu" and trainer.precision != "32-true"
    for module in fused if slow else ():
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


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
        metric=fitted.metric,
        inputs="clips" if len(input_size) == 4 else "images",
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
        if not trainer.is_global_zero:
            return
        if done % max(1, total // 10) and done != total:
            return
        assert isinstance(pl_module, Classifier)
        name, value = pl_module.score_name.removeprefix("val_"), pl_module.scores[pl_module.score_name]
        print(f"  epoch {done}/{total}  {name} {value:.1%}", file=sys.stderr, flush=True)


class AfterEpoch(Callback):
    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        pl_module.check_epoch()  # a model gone wrong must not be saved over the last good one
        if trainer.is_global_zero:
            self.action()


class quiet_lightning(warnings.catch_warnings):  # noqa: N801 - reads as the context manager it is
    """Keeps Lightning's advice (more workers, tips, hardware lists) out of the way of the progress bar."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # the model is saved next to its log
        warnings.filterwarnings("ignore", message="Checkpoint directory")  # one file, written over
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # of a run that was moved
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
