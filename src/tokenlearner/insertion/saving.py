"""A model in a folder: ``model.safetensors`` with the weights, ``config.json`` with everything else.

The config holds the host, what was inserted into it, how images must be prepared and what the outputs are called, so a
saved model can't come back as the bare host and can't be fed wrongly scaled pictures.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.hosting import build_host, describe_host
from tokenlearner.insertion.insert import insert, insertion_of
from tokenlearner.insertion.spec import Insertion

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the model's input. ``mean`` and ``std`` are for pixel values in [0, 1]."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing | None:
        """What the model carries: its own, or its timm configuration at the size the model has; None if neither."""
        own = getattr(model, "preprocessing", None)
        if isinstance(own, Preprocessing):
            return own
        config = getattr(model, "pretrained_cfg", None) or {}
        if not config.get("mean"):
            return None
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        return cls(
            input_size=(getattr(model, "in_chans", 3), *size),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config.get("interpolation") or "bicubic",
            crop_pct=config.get("crop_pct") or 0.875,
            crop_mode=config.get("crop_mode") or "center",
        )

    def transform(self) -> Callable[[Any], Tensor]:
        """The evaluation transform: PIL image → normalised tensor of ``input_size``."""
        from timm.data import create_transform

        return create_transform(**asdict(self), is_training=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"preprocessing has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        read: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**read)


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Writes ``model`` to ``folder`` and returns the folder.

    Each file appears whole or not at all. ``preprocessing`` and ``labels`` (names of the outputs, in order) default to
    what the model carries as ``model.preprocessing`` and ``model.label_names``, or to its timm configuration.

    Raises:
        InputError: The host can't be described so that it can be built again, or the number of labels is off.
    """
    folder = Path(folder)
    labels = list(labels) if labels is not None else list(getattr(model, "label_names", None) or [])
    outputs = getattr(model, "num_classes", None)
    if labels and outputs is not None and len(labels) != outputs:
        raise InputError(f"the model has {outputs} outputs, but {len(labels)} labels were given")
    spec, preparation = insertion_of(model), preprocessing or Preprocessing.of(model)
    from tokenlearner import __version__

    config = {
        "format": FORMAT,
        "versions": {"tokenlearner": __version__, "timm": timm.__version__, "torch": torch.__version__},
        "host": describe_host(model),
        "insertion": spec.to_dict() if spec else None,
        "preprocessing": asdict(preparation) if preparation else None,
        "labels": labels or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    _write(folder / WEIGHTS, safetensors.torch.save(state, metadata={"format": "pt"}))
    _write(folder / CONFIG, json.dumps(config, indent=2).encode())
    return folder


def load(folder: str | Path) -> nn.Module:
    """Builds the model saved in ``folder``: host, insertion, weights; in eval mode, on the CPU.

    The model carries ``model.preprocessing`` and ``model.label_names`` (each None if not known).

    Raises:
        InputError: A file is missing or damaged, or config and weights don't belong together; says what differs.
    """
    folder = Path(folder)
    config = _read_config(folder)
    model = build_host(config["host"])
    if config["insertion"] is not None:
        insert(model, **_insertion(config["insertion"], model).to_insert_arguments())
    try:
        state = safetensors.torch.load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise InputError(f"{folder} has no {WEIGHTS}; a saved model is a folder with {CONFIG} and {WEIGHTS}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS} is damaged: {error}") from error
    if mismatch := _mismatch(model.state_dict(), state):
        raise InputError(f"{folder / WEIGHTS} does not fit {CONFIG}: {mismatch}")
    model.load_state_dict(state, assign=True)
    values = config["preprocessing"]
    model.preprocessing = Preprocessing.from_dict(values) if values else None  # type: ignore[assignment]
    model.label_names = tuple(config["labels"]) if config["labels"] else None  # type: ignore[assignment]
    return model.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a saved model: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise InputError(f"{path} has format {found!r}; this version of tokenlearner reads format {FORMAT}")
    for key in ("host", "insertion", "preprocessing", "labels"):
        if key not in config:
            raise InputError(f"{path} has no entry {key!r}, so what was saved can't be told")
    return config


def _insertion(values: Mapping[str, Any], model: nn.Module) -> Insertion:
    try:
        spec = Insertion(**values)
    except TypeError as error:
        raise InputError(f"{CONFIG}: the insertion {dict(values)!r} is not understood: {error}") from error
    depth = len(model.blocks)  # type: ignore[arg-type]
    if depth != spec.host_depth:
        raise InputError(
            f"{CONFIG}: the insertion was made on a host of {spec.host_depth} layers, but this one has {depth}"
        )
    return spec


def _mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{k} is {tuple(found[k].shape)}, not {tuple(expected[k].shape)}"
        for k in expected.keys() & found.keys()
        if expected[k].shape != found[k].shape
    ]
    parts = [f"the weights lack {_some(missing)}"] if missing else []
    parts += [f"the weights also have {_some(extra)}"] if extra else []
    if any(re.search(r"token_(learner|fuser)", key) for key in [*missing, *extra]):
        parts.append("so the insertion differs")
    return "; ".join([*parts, *sorted(shapes)[:3]])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _write(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
