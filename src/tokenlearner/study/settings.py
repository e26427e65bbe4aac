"""What runs on pictures and on clips share: settings of the training, the recipe they make, and a model's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenlearner.inspection.cost import cost
from tokenlearner.training.recipe import OptimizerRecipe, Recipe


@dataclass(frozen=True)
class Training:
    """Settings of every study that trains."""

    epochs: int = 2
    batch_size: int = 64
    lr: float = 3e-3
    optimizer: str = "muon"
    warmup_epochs: float = 0.3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    precision: str = "bf16-mixed"

    def recipe(self, seed: int, **more: Any) -> Recipe:
        """Of these settings, and of ``more``."""
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=seed,
            precision=self.precision,  # type: ignore[arg-type]
            label_smoothing=self.label_smoothing,
            workers=0,
            optimizer=OptimizerRecipe(self.optimizer, self.lr, self.weight_decay, warmup_epochs=self.warmup_epochs),
            **more,
        )


def size_of(model: nn.Module, input_size: Sequence[int], settings: Training) -> dict[str, Any]:
    """Columns of a row: how long ``model`` was trained, and what one input (c, [t,] h, w) costs."""
    counted = cost(model, tuple(input_size))
    return {
        "epochs": settings.epochs,
        "parameters": counted.parameters,
        "macs": counted.macs,
        "tokens_per_layer": " ".join(map(str, counted.tokens)),
    }
