"""A trained model by the folder it was saved in, or by its name."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import timm
from torch import nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.saving import Preprocessing, config_has, load

_OF_TIMM = ("hf-hub:", "hf_hub:", "local-dir:")  # how timm is told where a model is


def open_trained(source: str | Path, **options: Any) -> nn.Module:
    """The model saved in the folder ``source``, by this package, timm's ``save_for_hf`` or transformers, or the one
    that timm, this package or Hugging Face's hub (names such as ``google/vit-base-patch16-224``, of transformers, or
    ``hf-hub:timm/vit_base_patch16_224.augreg_in1k``) has weights of under that name.

    In eval mode, on the CPU, with ``preprocessing`` and ``label_names`` (None if not known). ``options`` go to
    ``timm.create_model``.

    Raises:
        InputError: Neither a folder nor a name, weights nobody has published or that can't be fetched.
    """
    name, path = str(source), Path(source)
    if name.startswith(_OF_TIMM):
        return _of_timm(name, **options)
    if path.is_file():
        raise InputError(
            f"{name} is a file: give the folder of a saved model; of a checkpoint of timm's, `tokenlearner compress "
            f"{name} DATA --host NAME` makes one"
        )
    if path.is_dir():
        return _of_timm(f"local-dir:{name}", **options) if is_of_timm(path) else load(path)
    tried = ""
    if name.count("/") == 1 and not Path(name).parent.exists():  # else it is a folder, with a slip in its name
        folder, tried = _fetched(name)
        if folder is not None:
            return load(folder)
    if not timm.is_model(name.split(".")[0]):
        known = [
            entry for pattern in ("tokenlearner_*", "vivit_*", "x2plus1d_*") for entry in timm.list_pretrained(pattern)
        ]
        near = difflib.get_close_matches(name, [*known, *(entry.split(".")[0] for entry in known)], n=1)
        raise InputError(
            f"there is no folder {name}, and no model of that name{tried}; give a saved model's folder or a name such "
            f"as {(near or known or ['vit_base_patch16_224'])[0]}"
        )
    return _of_timm(name, **options)


def is_of_timm(folder: str | Path) -> bool:
    """Whether ``folder`` has the ``config.json`` that timm's ``save_for_hf`` and ``push_to_hf_hub`` write."""
    return config_has(folder, "architecture")


def _of_timm(name: str, **options: Any) -> nn.Module:
    try:
        model: Any = timm.create_model(name, pretrained=True, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the weights of {name} could not be fetched or used ({type(error).__name__})") from error
    model.preprocessing = Preprocessing.of(model)
    if (rate := _frames_a_second(model)) is not None:
        model.preprocessing = replace(model.preprocessing, fps=rate)
    labels = getattr(model, "label_names", None) or (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    model.label_names = tuple(labels) if labels and len(labels) == model.num_classes else None
    return model.eval()


def _fetched(name: str) -> tuple[str | None, str]:
    """The folder where the hub's files of a model of transformers have been put, or None and why there is none."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]), ""
    except Exception as error:  # no such name, no network, no room
        return None, f" could be fetched from the hub ({type(error).__name__})"


def _frames_a_second(model: Any) -> float | None:
    """Of clips, which timm's configuration has no place for: the weights file says it, as our studies write it."""
    file = (getattr(model, "pretrained_cfg", None) or {}).get("file")
    if not file or not getattr(model, "takes_clips", False):
        return None
    with safetensors.safe_open(file, framework="pt") as weights:
        preprocessing = (weights.metadata() or {}).get("preprocessing")
    return json.loads(preprocessing).get("fps") if preprocessing else None
