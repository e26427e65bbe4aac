"""The protocols of `tokenlearner evaluate` by name, each with the images it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from tokenlearner.data.images import OnError, find_images, find_splits, scan_class_folders
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import Images, evaluate, images_to_score
from tokenlearner.evaluation.fewshot import few_shot
from tokenlearner.evaluation.real import evaluate_real, read_real_labels

Protocol = Literal["top1", "real", "fewshot"]


def score(
    model: nn.Module,
    folder: Path,
    data: Path,
    *,
    protocol: Protocol = "top1",
    images: Images = "auto",
    real_labels: Path | None = None,
    shots: int = 5,
    l2: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 2,
    on_error: OnError = "skip",
) -> dict[str, Any]:
    """Scores ``model``, saved in ``folder``, on ``data`` by one protocol; the result is ready for JSON.

    "fewshot" draws its training images from DATA's train folder and scores on its val folder; where DATA has no such
    folders, half of every class is for training and half for scoring.

    Raises:
        InputError: Data or options that don't fit the protocol.
    """
    if protocol == "real":
        if real_labels is None:
            raise InputError("protocol 'real' needs ReaL's labels: give --real-labels real.json")
        labels = read_real_labels(real_labels)
        result = evaluate_real(model, find_images(data), labels, batch_size=batch_size, on_error=on_error)
        return {"protocol": protocol, **result.to_dict()}
    if protocol == "fewshot":
        train_folder, val_folder = find_splits(data)
        train = scan_class_folders(train_folder)
        if val_folder is None:
            train, test = train.split(0.5, seed)
        else:
            test = scan_class_folders(val_folder, train.classes)
        shot = few_shot(
            model,
            train,
            test,
            shots=shots,
            l2=l2,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            on_error=on_error,
        )
        return {"protocol": protocol, **shot.to_dict()}
    chosen, which = images_to_score(model, folder, data, images)
    accuracy = evaluate(model, chosen, which=which, batch_size=batch_size, workers=workers, on_error=on_error)
    return {"protocol": protocol, **accuracy.to_dict()}
