"""The LightningModule: one classifier, its loss, its score, and what a killed run needs to go on."""

from __future__ import annotations

import importlib
import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from tokenlearner.data.images import Batch, Damaged
from tokenlearner.errors import InputError
from tokenlearner.evaluation.clips import logits_of
from tokenlearner.evaluation.multilabel import MeanAveragePrecision
from tokenlearner.insertion.elastic import most_tokens, note_elastic, set_num_tokens
from tokenlearner.training.losses import Targets, loss_of
from tokenlearner.training.optim import build_optimizer, build_schedule
from tokenlearner.training.recipe import Recipe
from tokenlearner.training.sampling import draw_tokens, seed_step


class Mean:
    """Of a loss over images, kept where the losses are. (torchmetrics' MeanMetric ignores the weights if it is to let
    infinite losses through.)
    """

    def __init__(self) -> None:
        self.total, self.images = torch.zeros(()), 0

    def add(self, loss: Tensor, images: int) -> None:
        self.total = self.total.to(loss.device) + loss.detach().float() * images
        self.images += images


class Classifier(L.LightningModule):
    """Trains ``model`` on :class:`Batch` es.

    Logs ``train_loss``, ``val_loss`` and ``val_accuracy`` (0 to 1) every epoch, over all images of all processes;
    ``val_map`` instead of the accuracy for multi-label data. ``history`` has these as a row per epoch, with the step
    and the learning rate; ``damaged`` has the files that could not be decoded, each once.

    With ``recipe.elastic`` every optimizer step is on a random number of the model's tokens, the first ones, the same
    in all processes; between steps, and so wherever the model is scored or saved, it has all of them. Its insertion
    notes that.

    Args:
        data: What identifies the training data; a checkpoint of a run on other data is refused.

    Raises:
        InputError: ``recipe.elastic`` for a model that can't take fewer tokens.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, num_classes: int, *, multilabel: bool = False, data: str = ""
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.data = data
        augment = recipe.augment
        self.targets = Targets(
            num_classes,
            multilabel=multilabel,
            mixup=augment.mixup,
            cutmix=augment.cutmix,
            label_smoothing=recipe.label_smoothing,
        )
        self.most_tokens = most_tokens(model) if recipe.elastic else None
        if recipe.elastic:
            note_elastic(model)
        self.score_name = "val_map" if multilabel else "val_accuracy"
        self.score: Metric = MeanAveragePrecision() if multilabel else MulticlassAccuracy(num_classes, average="micro")
        self.train_loss, self.val_loss = Mean(), Mean()
        self.scores: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.damaged: dict[str, Damaged] = {}

    def on_train_start(self) -> None:
        if self.most_tokens is not None and self.recipe.compile:  # each number of tokens is a graph or two of its own
            config: Any = importlib.import_module("torch._dynamo.config")
            config.recompile_limit = max(config.recompile_limit, 4 * self.most_tokens + 8)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self.recipe.seed, self.current_epoch, batch_idx, self.global_rank)
        if self.most_tokens is not None:
            step = batch_idx // self.recipe.accumulate
            set_num_tokens(self.model, draw_tokens(self.recipe.seed, self.current_epoch, step, self.most_tokens))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.most_tokens is not None:  # not before: a checkpointed layer runs again in the backward pass
            set_num_tokens(self.model, self.most_tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self._note_damaged(batch)
        size = len(batch.labels)
        if not size:
            # Other processes wait for this one's gradients; alone, Lightning skips the step.
            return _zero_loss(self.model) if self.trainer.world_size > 1 else None
        loss = self.loss(*self.targets(batch.images, batch.labels))
        self.train_loss.add(loss, size)
        self.log("loss", loss, prog_bar=True, on_step=True, on_epoch=False)
        return loss

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        """What a training step minimises, of images and their target distributions."""
        return loss_of(self.model(images), targets, self.recipe.loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._note_damaged(batch)
        size = len(batch.labels)
        if not size:
            return
        logits = logits_of(self.model, batch.images)
        hard = batch.labels if batch.labels.is_floating_point() else F.one_hot(batch.labels, logits.shape[-1])
        self.val_loss.add(loss_of(logits.float(), hard.float(), self.recipe.loss), size)
        self.score.update(logits.float(), batch.labels.long())

    def on_validation_epoch_start(self) -> None:
        self.val_loss = Mean()  # a validation that was cut off must not count twice
        self.score.reset()

    def on_train_epoch_end(self) -> None:
        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        values = {"train_loss": self._mean(self.train_loss)[0], **self.scores, "lr": rate}
        values = {name: torch.tensor(value).item() for name, value in values.items()}  # as the loggers round them
        self.history.append({"epoch": self.current_epoch, "step": self.global_step - 1, **values})
        self.train_loss = Mean()
        self.log_dict(values, on_step=False, on_epoch=True)

    def check_epoch(self) -> None:
        """Computes the scores of the epoch and ends a run that has gone wrong; every process comes here.

        Raises:
            InputError: No image could be decoded, or the loss is no longer finite.
        """
        (train_loss, trained), (val_loss, scored) = self._mean(self.train_loss), self._mean(self.val_loss)
        for part, images in (("training", trained), ("held-out", scored)):
            if not images:
                first = next(iter(self.damaged.values()), None)
                reason = f"; the first damaged file: {first.path}: {first.reason}" if first else ""
                raise InputError(f"none of the {part} images could be decoded{reason}")
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            raise InputError(
                f"the loss is no longer finite in epoch {self.current_epoch + 1}; lower optimizer.lr (now "
                f"{self.recipe.optimizer.lr}), lengthen optimizer.warmup_epochs or set optimizer.clip_norm"
            )
        self.scores = {"val_loss": val_loss, self.score_name: float(self.score.compute())}
        if math.isnan(self.scores[self.score_name]):
            raise InputError("none of the held-out images has a class, so there is nothing to score")
        self.log(self.score_name, self.scores[self.score_name], prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.recipe.optimizer)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(optimizer, self.recipe.optimizer, steps, steps / max(1, self.recipe.epochs))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's schedulers count updates themselves

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total, images = self._total(self.train_loss)  # of the epoch under way
        checkpoint["tokenlearner"] = {
            "data": self.data,
            "history": self.history,
            "damaged": [tuple(damaged) for damaged in self.damaged.values()],
            "train_loss": [total, images],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["tokenlearner"]
        self.history = list(saved["history"])
        self.damaged = {path: Damaged(path, reason) for path, reason in saved["damaged"]}
        self.train_loss = Mean()
        if self.global_rank == 0:  # it was of all processes together
            total, self.train_loss.images = saved["train_loss"]
            self.train_loss.total = torch.tensor(total)

    def _mean(self, mean: Mean) -> tuple[float, int]:
        """Over all processes: the mean, and of how many images."""
        total, images = self._total(mean)
        return total / max(images, 1), images

    def _total(self, mean: Mean) -> tuple[float, int]:
        both = torch.stack([mean.total.to(self.device), torch.tensor(float(mean.images), device=self.device)])
        total, images = self.trainer.strategy.reduce(both, reduce_op="sum").tolist()
        return total, int(images)

    def _note_damaged(self, batch: Batch) -> None:
        for damaged in batch.damaged:
            self.damaged.setdefault(damaged.path, damaged)


def _zero_loss(model: nn.Module) -> Tensor:
    """Nothing to learn from, with a gradient of zero for every parameter."""
    return torch.stack([p.sum() for p in model.parameters() if p.requires_grad]).sum() * 0.0
