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
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.elastic import insert_again, set_num_tokens
from tokenlearner.insertion.hosting import build_host, describe_host
from tokenlearner.insertion.insert import insertion_of, learners
from tokenlearner.insertion.spec import Insertion

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_ENTRIES: dict[str, Any] = {"host": dict, "insertion": dict | None, "preprocessing": dict | None, "labels": list | None}


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes the model's input. ``mean`` and ``std`` are for pixel values in [0, 1].

    For a model of clips this is about each of their ``frames``, of which a clip shows ``fps`` a second.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    frames: int | None = None
    """Of a clip; None for a model of images."""
    fps: float | None = None

    @property
    def model_input(self) -> tuple[int, ...]:
        """The shape of one input: (c, h, w), or (c, t, h, w) for clips."""
        channels, *sides = self.input_size
        return (channels, *sides) if self.frames is None else (channels, self.frames, *sides)

    @classmethod
    def of(cls, model: nn.Module) -> Preprocessing | None:
        """What the model carries: its own, or its timm configuration at the size the model has; None if neither."""
        own = getattr(model, "preprocessing", None)
        embed = getattr(model, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        frames = getattr(model, "num_frames", None) if getattr(model, "takes_clips", False) else None
        if isinstance(own, Preprocessing):
            if size and getattr(embed, "strict_img_size", False):  # set_input_size may have been called since
                return replace(own, input_size=(own.input_size[0], *size), frames=frames or own.frames)
            return own
        config = getattr(model, "pretrained_cfg", None) or {}
        if not config.get("mean"):
            return None
        size, channels = size or config["input_size"][1:], getattr(model, "in_chans", 3)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if channels == 1:  # timm's configuration is that of the colour model
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return cls(
            input_size=(channels, *size),
            mean=mean,
            std=std,
            interpolation=config.get("interpolation") or "bicubic",
            crop_pct=config.get("crop_pct") or 0.875,
            crop_mode=config.get("crop_mode") or "center",
            frames=frames,
        )

    def transform(self) -> Callable[[Any], Tensor]:
        """The evaluation transform: RGB PIL image → normalised tensor of ``input_size``, grey for one channel.

        Of a model of clips it prepares one frame.

        Raises:
            InputError: The model takes neither one nor three channels.
        """
        from torchvision.transforms import Compose, Grayscale

        prepare = self._created()
        if self.input_size[0] == 1:
            return Compose([Grayscale(1), prepare])
        if self.input_size[0] != 3:
            raise InputError(f"pictures have 1 or 3 channels, and the model takes {self.input_size[0]}")
        return prepare

    def resizing(self) -> list[Callable[[Any], Any]]:
        """The steps of :meth:`transform` that bring a PIL image to the input's height and width, an image still."""
        return self._created(normalize=False).transforms[:-1]  # the last makes it a tensor

    def _created(self, **options: Any) -> Any:
        from timm.data import create_transform

        settings = {key: value for key, value in asdict(self).items() if key not in ("frames", "fps")}
        return create_transform(**settings, **options, is_training=False)

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
    """Writes ``model`` to ``folder`` and returns the folder; one loaded from a folder of transformers as these do.

    Each file appears whole or not at all. ``preprocessing`` and ``labels`` (names of the outputs, in order) default to
    what the model carries as ``model.preprocessing`` and ``model.label_names``, or to its timm configuration.

    Raises:
        InputError: The model can't be described so that it can be built again (no ViT of timm, changed by hand, or
            other than a VisionTransformer and not made by ``timm.create_model``), has no weights, or the number of
            labels is off.
    """
    folder = Path(folder)
    if getattr(model, "wraps_host", False):
        model.save_pretrained(folder, labels or ())  # type: ignore[operator]
        return folder
    labels = list(labels) if labels is not None else list(getattr(model, "label_names", None) or [])
    _check_labels(labels, model)
    if any(t.is_meta for t in model.state_dict().values()):
        raise InputError("the model is on the meta device, so it has no weights to save")
    spec, preparation = insertion_of(model), preprocessing or Preprocessing.of(model)
    from tokenlearner import __version__

    insertion = spec.to_dict() if spec else None
    used = None if spec else _used_tokens(model)
    built = {"host": describe_host(model, lambda host: _build(host, insertion, used)), "insertion": insertion}
    config = {
        "format": FORMAT,
        "versions": {"tokenlearner": __version__, "timm": timm.__version__, "torch": torch.__version__},
        **built,
        **({"used_tokens": used} if used else {}),
        "preprocessing": asdict(preparation) if preparation else None,
        "labels": labels or None,
    }
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    # The weights file says what it was saved from: an edited num_heads or at would fit the shapes of its tensors too.
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in built.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        {
            folder / WEIGHTS: safetensors.torch.save(state, metadata=metadata),
            folder / CONFIG: json.dumps(config, indent=2).encode(),
        }
    )
    return folder


def load(folder: str | Path) -> nn.Module:
    """Builds the model saved in ``folder``: host, insertion, weights; in eval mode, on the CPU.

    A folder of transformers, with its processor, is loaded too: see ``insertion/huggingface_folder.py``.

    The model carries ``model.preprocessing`` and ``model.label_names`` (each None if not known).

    Raises:
        InputError: A file is missing or damaged, or config and weights don't belong together; says what differs.
    """
    folder = Path(folder)
    from tokenlearner.insertion.huggingface_folder import is_pretrained, open_pretrained

    if is_pretrained(folder):
        return open_pretrained(folder)
    config = read_config(folder)
    model = _build(config["host"], config["insertion"], config.get("used_tokens"))
    state, saved_from = _read_weights(folder)
    if mismatch := _mismatch(model.state_dict(), state):
        raise InputError(f"{folder / WEIGHTS} does not fit {CONFIG}: {mismatch}")
    for key, saved in saved_from.items():
        if changed := _changes(saved or {}, config[key] or {}):
            raise InputError(f"{folder / WEIGHTS} does not fit {CONFIG}: the {key} was saved with {changed}")
    _take_dtype(model, state)
    model.load_state_dict(state, assign=True)
    _compute_buffers(model)
    values, labels = config["preprocessing"], config["labels"]
    _check_labels(labels or [], model)
    model.preprocessing = Preprocessing.from_dict(values) if values else None  # type: ignore[assignment]
    model.label_names = tuple(labels) if labels else None  # type: ignore[assignment]
    return model.eval()


def _build(host: dict[str, Any], insertion: Mapping[str, Any] | None, used_tokens: int | None) -> nn.Module:
    """The model without numbers. ``used_tokens`` is that of a host with TokenLearners of its own."""
    with torch.device("meta"):
        model = build_host(host)
        spec = None if insertion is None else _insertion(insertion, model)
        try:
            if spec is not None:
                insert_again(model, spec)
            if used_tokens is not None:
                set_num_tokens(model, used_tokens)
        except (TypeError, ValueError) as error:
            raise InputError(f"{CONFIG}: the insertion does not fit the host: {error}") from error
    return model


def _used_tokens(model: nn.Module) -> int | None:
    """How many tokens a model with TokenLearners of its own uses, where :func:`set_num_tokens` said so."""
    return next((learner.used_tokens for learner in learners(model).values()), None)


def _take_dtype(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Makes a model without numbers one of the weights' dtype, for the buffers that are not among the weights."""
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())


def _compute_buffers(model: nn.Module) -> None:
    """Fills what no file holds because it follows from the arguments: rotations, indices of relative positions.

    Raises:
        InputError: A module has such a buffer and no way to compute it.
    """
    for module in model.modules():
        missing = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in missing:
            module._buffers[name] = torch.empty_like(cast(Tensor, module._buffers[name]), device="cpu")
        if missing and not hasattr(module, "init_non_persistent_buffers"):
            raise InputError(f"{type(module).__name__} does not say how its {', '.join(missing)} is computed")
        if missing:
            cast(Callable[[], None], module.init_non_persistent_buffers)()


def _check_labels(labels: Sequence[str], model: nn.Module) -> None:
    outputs = getattr(model, "num_classes", None)
    if labels and outputs is not None and len(labels) != outputs:
        raise InputError(f"the model has {outputs} outputs, but {len(labels)} labels were given")


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the host and insertion they were saved from."""
    path = folder / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file is no dictionary
        return state, {key: json.loads(metadata[key]) for key in ("host", "insertion") if key in metadata}
    except FileNotFoundError:
        raise InputError(f"{folder} has no {WEIGHTS}; a saved model is a folder with {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says: ``host`` (for ``build_host``), ``insertion``, ``preprocessing`` and ``labels``.

    Raises:
        InputError: No such file, or not as this version writes it.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a saved model: it has no {CONFIG}")
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        found = config.get("format") if isinstance(config, dict) else None
        raise InputError(f"{path} has format {found!r}; this version of tokenlearner reads format {FORMAT}")
    for key, kinds in _ENTRIES.items():
        if not isinstance(config.get(key, ...), kinds):
            raise InputError(f"{path} has no entry {key!r} as this version writes it, so what was saved can't be told")
    return config


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error


def _insertion(values: Mapping[str, Any], model: nn.Module) -> Insertion:
    try:
        spec = Insertion(**values)
    except TypeError as error:
        raise InputError(f"{CONFIG}: the insertion is not understood: {error}") from error
    depth = len(getattr(model, "blocks", ()))  # an X2Plus1D has none
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


def _changes(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first entries that differ, in words; a host's arguments count one by one."""
    before, now = ({**values, **values.get("arguments", {})} for values in (saved, found))
    changed = [key for key in {**before, **now} if key != "arguments" and before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)!r}, not {now.get(key)!r}" for key in changed[:3])


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def refuse_file(folder: Path, holds: str) -> None:
    """``InputError`` where a file is in the place of the folder that is to hold something: before it is computed."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder for {holds}")


def config_has(folder: str | Path, entry: str) -> bool:
    """Whether ``folder`` has a ``config.json`` with this entry, by which one can tell who wrote it."""
    path = Path(folder) / CONFIG
    config = read_json(path) if path.is_file() else None
    return isinstance(config, dict) and entry in config


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Writes each file so that it is there whole or not at all, and none of them before all are on the disk."""
    temporaries: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporaries[path] = Path(temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
        for path, temporary_path in temporaries.items():
            temporary_path.replace(path)
    finally:
        for temporary_path in temporaries.values():
            temporary_path.unlink(missing_ok=True)
