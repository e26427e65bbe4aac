"""Tokens of one video or picture folder in a file, written as they come: safetensors, or rows of Parquet.

A file is whole once it has its name. What is held in memory does not grow with the tokens: safetensors' header has
their number, so they wait in a temporary file until it is known; Parquet is written in groups of rows.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import safetensors

from tokenlearner.data.images import Damaged
from tokenlearner.errors import InputError

TokenFormat = Literal["safetensors", "parquet"]
TokenType = Literal["float16", "float32"]
_ROW_GROUP = 1 << 24  # bytes of tokens that are gathered before they are written


class TokenRows(NamedTuple):
    """Tokens of some frames that follow each other, a row each."""

    tokens: np.ndarray
    """(n, s, d), float32."""
    seconds: tuple[float | None, ...]
    names: tuple[str, ...]
    """Of the files that the rows are pictures of; empty strings for frames of a video."""
    numbers: tuple[int, ...]
    """Places among the frames that were read, which damaged pictures count for too."""
    damaged: tuple[Damaged, ...]
    """Pictures that were to be rows here."""
    share: float
    """How much of the source has been read, from 0 to 1; of no meaning without a row."""


class TokenFile(Protocol):
    """A file that is being written."""

    rows: int

    def write(self, rows: TokenRows) -> None:
        """Adds rows of one (s, d)."""

    def finish(self) -> Path:
        """Completes the file, and returns where it lies."""

    def close(self) -> None:
        """Lets go of what is open."""


@contextmanager
def token_file(
    path: Path,
    format: TokenFormat,  # noqa: A002
    dtype: TokenType,
    metadata: Mapping[str, str],
) -> Iterator[TokenFile]:
    """A file to write rows to, which has its name when the block has ended well and some were written.

    A safetensors file has ``tokens`` (n, s, d), and ``times`` (n,) in float64 where rows have times; its metadata has
    besides ``metadata`` the list ``files``, as JSON, where rows are pictures. A Parquet file has the columns ``file``,
    ``frame``, ``time`` and ``tokens``, a list of s lists of d.

    Raises:
        InputError: pyarrow is missing, or a token is too large for float16.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.writing-*"):  # by a process that was killed
        shutil.rmtree(left)
    text = {key: _printable(value) for key, value in metadata.items()}
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.writing-", dir=path.parent) as unfinished:
        file: TokenFile = _FILES[format](Path(unfinished), dtype, text)
        try:
            yield file
            if file.rows:
                whole = file.finish()
                _sync(whole)
                whole.replace(path)
        finally:
            file.close()


def read_metadata(path: Path) -> dict[str, str]:
    """What ``path`` says of how it was made.

    Raises:
        InputError: It is no file of tokens.
    """
    try:
        if path.suffix == ".parquet":
            found = needed_pyarrow().parquet.read_schema(path).metadata or {}
            return {key.decode(): value.decode() for key, value in found.items()}
        with safetensors.safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is no file of tokens ({error}): remove it, and give --resume again") from error


def needed_pyarrow() -> Any:
    """pyarrow; ``InputError`` where it is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise InputError("Parquet is written with pyarrow, which is missing: pip install 'tokenlearner[parquet]'")
    importlib.import_module("pyarrow.parquet")
    return importlib.import_module("pyarrow")


class _Safetensors:
    def __init__(self, folder: Path, dtype: TokenType, metadata: Mapping[str, str]) -> None:
        self.folder, self.dtype, self.metadata = folder, dtype, metadata
        self.rows = 0
        self.shape: tuple[int, ...] = ()
        self.times, self.names = array("d"), list[str]()
        self.raw = (folder / "tokens").open("wb")

    def write(self, rows: TokenRows) -> None:
        self.rows, self.shape = self.rows + len(rows.tokens), rows.tokens.shape[1:]
        self.raw.write(_as_type(rows.tokens, self.dtype).astype({"float16": "<f2", "float32": "<f4"}[self.dtype]).data)
        self.times.extend(second for second in rows.seconds if second is not None)
        self.names.extend(name for name in rows.names if name)

    def finish(self) -> Path:
        self.raw.close()
        times = np.asarray(self.times, "<f8").tobytes()
        end = len(times) + (self.folder / "tokens").stat().st_size
        kind = {"float16": "F16", "float32": "F32"}[self.dtype]
        header: dict[str, Any] = {
            "__metadata__": {
                **self.metadata,
                **({"files": json.dumps([_printable(name) for name in self.names])} if self.names else {}),
            },
            "tokens": {"dtype": kind, "shape": [self.rows, *self.shape], "data_offsets": [len(times), end]},
        }
        if times:  # in front, where 8-byte numbers are aligned whatever the tokens' size
            header["times"] = {"dtype": "F64", "shape": [self.rows], "data_offsets": [0, len(times)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        whole = self.folder / "whole"
        with whole.open("wb") as file, (self.folder / "tokens").open("rb") as raw:
            file.write(len(text).to_bytes(8, "little") + text + times)
            shutil.copyfileobj(raw, file)
        return whole

    def close(self) -> None:
        self.raw.close()


class _Parquet:
    def __init__(self, folder: Path, dtype: TokenType, metadata: Mapping[str, str]) -> None:
        self.arrow = needed_pyarrow()
        self.folder, self.dtype, self.metadata = folder, dtype, metadata
        self.rows = self.waiting_bytes = 0
        self.waiting: list[Any] = []
        self.writer: Any = None

    def write(self, rows: TokenRows) -> None:
        arrow, (n, s, d) = self.arrow, rows.tokens.shape
        tokens = _as_type(rows.tokens, self.dtype)
        lists = arrow.array(tokens.reshape(-1))
        for length in (d, s):
            lists = arrow.FixedSizeListArray.from_arrays(lists, length)
        source = self.metadata.get("source", "")
        files = [_printable(f"{source}/{name}" if name else source) for name in rows.names]
        columns = {
            "file": arrow.array(files, arrow.string()),
            "frame": arrow.array(rows.numbers, arrow.int64()),
            "time": arrow.array(rows.seconds, arrow.float64()),
            "tokens": lists,
        }
        self.waiting.append(arrow.table(columns))
        self.rows += n
        self.waiting_bytes += tokens.nbytes
        if self.waiting_bytes >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        table = self.arrow.concat_tables(self.waiting)
        if self.writer is None:
            schema = table.schema.with_metadata(dict(self.metadata))
            self.writer = self.arrow.parquet.ParquetWriter(self.folder / "whole", schema, use_dictionary=["file"])
        self.writer.write_table(table.replace_schema_metadata(dict(self.metadata)))
        self.waiting, self.waiting_bytes = [], 0

    def finish(self) -> Path:
        if self.waiting:
            self._flush()
        self.close()
        return self.folder / "whole"

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


_FILES: dict[str, type[_Safetensors] | type[_Parquet]] = {"safetensors": _Safetensors, "parquet": _Parquet}


def _as_type(tokens: np.ndarray, dtype: TokenType) -> np.ndarray:
    largest = float(np.abs(tokens).max(initial=0.0))
    if dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise InputError(f"the tokens reach {largest:.3g}, and float16 ends at 65504: use float32")
    return np.ascontiguousarray(tokens, dtype)


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()  # file names may not be UTF-8


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
