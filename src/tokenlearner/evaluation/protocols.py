"""The protocols of `tokenlearner evaluate` by name, each with the images it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tokenlearner.data.clip_sources import Listing, holds_videos
from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.images import OnError, find_images
from tokenlearner.data.sources import read_parts
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import Images, check_inputs, evaluate, images_to_score
from tokenlearner.evaluation.clips import VIEWS, Views, clips_to_score, takes_clips
from tokenlearner.evaluation.fewshot import few_shot
from tokenlearner.evaluation.multilabel import evaluate_multilabel
from tokenlearner.evaluation.real import evaluate_real, read_real_labels
from tokenlearner.inspection.speed import usable_device

Protocol = Literal["top1", "map", "real", "fewshot"]


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
    device: str | torch.device = "cpu",
    views: Views = VIEWS,
    listing: Listing | None = None,
) -> dict[str, Any]:
    """Scores ``model``, saved in ``folder``, on ``data`` by one protocol; the result is ready for JSON.

    "top1" and "map" score ``images`` of DATA: "top1" where each has one class, "map" where it has any number. "fewshot"
    draws its training images from DATA's training part and scores on its evaluation part; where DATA has no such parts,
    half of every class is for training and half for scoring. A model of clips is scored on videos, by "top1" or "map",
    in so many ``views`` of each; ``listing`` is what a list of videos does not say itself.

    Raises:
        InputError: Data or options that don't fit the protocol, or a device that is not there.
    """
    device = usable_device(device)
    if takes_clips(model):
        return _score_clips(
            model,
            *clips_to_score(model, folder, data, images, listing),
            protocol=protocol,
            views=views,
            batch_size=batch_size,
            workers=workers,
            on_error=on_error,
            device=device,
        )
    if protocol == "real":
        if real_labels is None:
            raise InputError("protocol 'real' needs ReaL's labels: give --real-labels real.json")
        labels = read_real_labels(real_labels)
        result = evaluate_real(
            model, find_images(data), labels, batch_size=batch_size, on_error=on_error, device=device
        )
        return {"protocol": protocol, **result.to_dict()}
    if protocol == "fewshot":
        images_of_data, val = read_parts(data)
        train, test = images_of_data.split(0.5, seed) if val is None else (images_of_data, val)
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
            device=device,
        )
        return {"protocol": protocol, **shot.to_dict()}
    check_inputs(model, data.exists() and holds_videos(data, listing))
    chosen, which = images_to_score(model, folder, data, images)
    by = evaluate_multilabel if protocol == "map" else evaluate
    scored = by(model, chosen, which=which, batch_size=batch_size, workers=workers, on_error=on_error, device=device)
    return {"protocol": protocol, **scored.to_dict()}


def _score_clips(
    model: nn.Module, clips: LabelledClips, which: str, *, protocol: Protocol, **options: Any
) -> dict[str, Any]:
    if protocol not in ("top1", "map"):
        raise InputError(f"protocol {protocol!r} is for images, and the model takes clips: score with top1 or map")
    by = evaluate_multilabel if protocol == "map" else evaluate
    scored = by(model, clips, which=which, **options)
    missing = [str(file) for file in clips.missing]
    return {"protocol": protocol, **scored.to_dict(), "missing": {"count": len(missing), "files": missing}}
