"""Parameters of a Flax model out of a mapping, an ``.npz`` or a msgpack file, as one flat {name: tensor}.

Only reading: what the names mean is in ``scenic.py``.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenlearner.errors import InputError

# Where the parameters are in what Scenic saves: of a model, with optax, and with the older flax.optim.
_PREFIXES = ("params/", "param/", "optimizer/target/params/", "optimizer/target/")


def read_parameters(source: Mapping[str, Any] | str | Path) -> dict[str, Tensor]:
    """The parameters in ``source`` in float32, by their names without a leading ``params/``.

    A source without such a prefix is parameters and nothing else; one with it may hold a run's other state too.

    Raises:
        InputError: The file is missing, damaged or of another kind, or a parameter is no array of numbers.
    """
    flat = _flat(source if isinstance(source, Mapping) else _read_file(Path(source)))
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in flat):
            flat = {name.removeprefix(prefix): leaf for name, leaf in flat.items() if name.startswith(prefix)}
            break
    return {name: _tensor(name, leaf) for name, leaf in flat.items()}


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays.files}
        content = _read_msgpack(path)
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is neither an .npz nor a msgpack file that can be read: {error}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} is neither an .npz nor a msgpack file of named parameters")
    return content


def _read_msgpack(path: Path) -> Any:
    try:
        msgpack: Any = importlib.import_module("msgpack")
    except ImportError:
        raise InputError(f"{path} is no .npz, and reading it as msgpack needs msgpack: pip install msgpack") from None
    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False)
    except msgpack.exceptions.UnpackException as error:
        raise ValueError(error) from error


def _extension(code: int, data: bytes) -> Any:
    """Flax's types: 1 is an array, written as msgpack of (shape, dtype name, bytes); 3 is a scalar, written alike."""
    msgpack: Any = importlib.import_module("msgpack")
    if code not in (1, 3):
        return None  # 2 is a complex number; no parameter is one
    shape, dtype, buffer = msgpack.unpackb(data, raw=True)
    if dtype == b"bfloat16":  # unknown to numpy: the upper half of a float32
        return (np.frombuffer(buffer, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(buffer, np.dtype(dtype.decode())).reshape(shape)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tensor(name: str, leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf.detach().to("cpu", torch.float32, copy=True)
    try:
        array = np.array(leaf, dtype=np.float32)  # a copy: a file's buffer is read-only
    except (TypeError, ValueError):
        raise InputError(f"the parameter {name} is no array of numbers but {type(leaf).__name__}") from None
    return torch.from_numpy(array)
