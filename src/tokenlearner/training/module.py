"""The LightningModule: one classifier, trained by cross-entropy."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from tokenlearner.data.images import Batch, Damaged
from tokenlearner.errors import InputError
from tokenlearner.training.optim import build_optimizer, build_schedule
from tokenlearner.training.recipe import Recipe


class Classifier(L.LightningModule):
    """Trains ``model`` on :class:`Batch` es; logs ``train_loss``, ``val_loss`` and ``val_accuracy`` (0 to 1).

    ``damaged`` collects the files that could not be decoded, each once.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.damaged: dict[str, Damaged] = {}
        self.trained = self.scored = 0  # images of this epoch
        self.losses: Tensor | float = 0.0  # their batches' losses, added up

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self._note_damaged(batch)
        if not len(batch.labels):
            return None
        loss = F.cross_entropy(self.model(batch.images), batch.labels, label_smoothing=self.recipe.label_smoothing)
        self.trained += len(batch.labels)
        self.losses = self.losses + loss.detach()
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._note_damaged(batch)
        if not len(batch.labels):
            return
        logits = self.model(batch.images)
        self.accuracy(logits, batch.labels)
        size = len(batch.labels)
        loss = F.cross_entropy(logits, batch.labels)
        self.scored += size
        self.losses = self.losses + loss
        self.log("val_loss", loss, batch_size=size)
        self.log("val_accuracy", self.accuracy, prog_bar=True, batch_size=size)

    def on_train_epoch_start(self) -> None:
        self.trained = self.scored = 0
        self.losses = 0.0

    def on_validation_epoch_end(self) -> None:
        self.check_epoch()

    def check_epoch(self) -> None:
        """Ends a run that has gone wrong.

        Raises:
            InputError: No image could be decoded, or the loss is no longer finite.
        """
        for part, images in (("training", self.trained), ("held-out", self.scored)):
            if not images:
                first = next(iter(self.damaged.values()), None)
                reason = f"; the first damaged file: {first.path}: {first.reason}" if first else ""
                raise InputError(f"none of the {part} images could be decoded{reason}")
        if not math.isfinite(float(self.losses)):
            raise InputError(
                f"the loss is no longer finite in epoch {self.current_epoch + 1}; lower optimizer.lr (now "
                f"{self.recipe.optimizer.lr}), lengthen optimizer.warmup_epochs or set optimizer.clip_norm"
            )

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.recipe.optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, self.recipe.optimizer, steps, steps / max(1, self.recipe.epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's schedulers count updates themselves

    def _note_damaged(self, batch: Batch) -> None:
        for damaged in batch.damaged:
            self.damaged.setdefault(damaged.path, damaged)
