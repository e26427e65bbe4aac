"""The LightningModule: one classifier, trained by cross-entropy."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
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

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self._note_damaged(batch)
        if not len(batch.labels):
            return None
        loss = F.cross_entropy(self.model(batch.images), batch.labels, label_smoothing=self.recipe.label_smoothing)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._note_damaged(batch)
        if not len(batch.labels):
            return
        logits = self.model(batch.images)
        self.accuracy(logits, batch.labels)
        size = len(batch.labels)
        self.log("val_loss", F.cross_entropy(logits, batch.labels), batch_size=size)
        self.log("val_accuracy", self.accuracy, prog_bar=True, batch_size=size)

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics.get("train_loss")
        if loss is not None and not torch.isfinite(loss):
            raise InputError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}; lower optimizer.lr "
                f"(now {self.recipe.optimizer.lr}), lengthen optimizer.warmup_epochs or set optimizer.clip_norm"
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
