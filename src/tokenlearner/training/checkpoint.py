"""Checkpoints that are whole or not there, and where a killed run goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tokenlearner.errors import InputError

FOLDER, NAME = "checkpoints", "last"


class WholeCheckpoints(TorchCheckpointIO):
    """Writes beside the last checkpoint and then takes its place, so that a kill leaves one of the two whole.

    Lightning's own goes through the system's folder for temporary files, and a move from there is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")  # the same every time: what a kill leaves is written over
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class Progress(NamedTuple):
    """How far a checkpoint's run had come: ``parts`` of batches are done of ``epoch``; ``steps`` in all."""

    path: Path
    epoch: int
    parts: int
    steps: int
    history: list[dict[str, float]]


class WithinEpoch(ModelCheckpoint):
    """After whole optimizer steps only, since a checkpoint does not hold the gradients of some parts of a batch; and
    not after an epoch's last, from where Lightning would go on with the next epoch, without validation.
    """

    @property
    def state_key(self) -> str:
        return type(self).__name__  # without the number of steps, which may change when a run goes on

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def checkpoint_callbacks(folder: Path, steps: int) -> list[ModelCheckpoint]:
    """One after every epoch and one after every ``steps`` optimizer steps, each in the last one's place."""
    common: dict[str, Any] = {
        "dirpath": folder / FOLDER,
        "filename": NAME,
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    return [
        WithinEpoch(every_n_train_steps=steps, save_on_train_epoch_end=False, **common),
        ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **common),
    ]


def last_checkpoint(folder: Path) -> Path:
    return folder / FOLDER / f"{NAME}.ckpt"


def read_progress(folder: Path, data: str) -> Progress | None:
    """Where the run in ``folder`` had come to, or None if it was stopped before its first checkpoint.

    Raises:
        InputError: The checkpoint is damaged, or of a run on other data.
    """
    path = last_checkpoint(folder)
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        loop, ours, steps = saved["loops"]["fit_loop"], saved["tokenlearner"], int(saved["global_step"])
        epoch = int(loop["epoch_progress"]["current"]["processed"])
        batches = loop["epoch_loop.batch_progress"]
        parts = 0 if batches["is_last_batch"] else int(batches["current"]["processed"])
        history = list(ours["history"])
    except Exception as error:  # pickle, zip and dictionary errors of whatever the file holds
        raise InputError(
            f"{path} is no checkpoint of a training run ({error}); delete it to start from the beginning"
        ) from error
    if ours["data"] != data:
        raise InputError(
            f"the run in {folder} was on other data than it is given now; --resume needs the same images, in the same "
            "places"
        )
    return Progress(path, epoch, parts, steps, history)
