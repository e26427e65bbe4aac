"""A folder of videos or pictures to a folder of tokens: in shards, and again from where it stopped."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenlearner.data.decode import DamagedImage
from tokenlearner.data.images import Damaged, OnError, damaged_entries
from tokenlearner.data.streaming import Pictures, StreamSource, find_sources
from tokenlearner.data.token_files import TokenFormat, TokenType, needed_pyarrow, read_metadata, token_file
from tokenlearner.errors import InputError
from tokenlearner.evaluation.clips import takes_clips
from tokenlearner.evaluation.predict import nothing_read
from tokenlearner.evaluation.tokens import Layer, Precision, check_streaming, inserted_alone, rate_of, stream_tokens
from tokenlearner.insertion.insert import host_of
from tokenlearner.inspection.speed import usable_device

ALL_FRAMES = "all"  # in a file's metadata, where no rate was asked for
_SAME = ("weights", "insertion", "layer", "fps", "frame_fps", "precision", "dtype")  # in all files of a folder
_SUFFIXES = {"safetensors": ".parquet", "parquet": ".safetensors"}  # of the other format


def write_tokens(
    model: nn.Module,
    source: str | Path,
    out: str | Path,
    *,
    name: str = "",
    layer: Layer = "last",
    format: TokenFormat = "safetensors",  # noqa: A002
    dtype: TokenType = "float16",
    fps: float | None = None,
    frame_fps: float | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    precision: Precision = "float32",
    on_error: OnError = "skip",
    progress: Callable[[float, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the tokens of every video and picture folder in ``source`` to a file each in ``out``; returns the summary.

    Files are named as what they are of, in the same subfolders: ``a/walk.mp4`` becomes ``a/walk.safetensors``, and
    keeps its ``.mp4`` where there is another ``walk``. :func:`token_file` says what is in them, :func:`stream_tokens`
    what a row is. Each appears whole or not at all. Memory does not grow with the length of a video.

    Args:
        model: See :func:`stream_tokens`, as for ``layer``, ``fps``, ``batch_size``, ``device`` and ``precision``.
        source: A video, a picture, or a folder of them.
        out: A new or empty folder; with ``resume`` one that has files of earlier runs. Shards may share it.
        name: What the files' metadata call the model.
        dtype: Of the tokens in the files, to which they are rounded.
        frame_fps: Folders of pictures are videos of so many frames a second.
        shard: (i, n), i from 1 to n: only the i-th of all sources and every n-th after it, in the order of their names.
        resume: Leaves out what has its file already, after a look that it was made in the same way.
        on_error: Damaged videos, and damaged pictures of a folder: name, count and skip them, or stop at the first.
        progress: Is called with how many sources are done, parts of one included, and how many there are.

    Raises:
        InputError: A model without such tokens, options that don't fit, files in ``out``, nothing that could be read, a
            token too large for float16, or damage with ``on_error="raise"``.
    """
    start, out = time.perf_counter(), Path(out)
    spec = inserted_alone(model)
    check_streaming(batch_size, precision)
    _check_options(format, dtype, shard, frame_fps)
    options: dict[str, Any] = {
        "layer": layer,
        "fps": fps,
        "batch_size": batch_size,
        "device": usable_device(device),
        "precision": precision,
        "on_error": on_error,
    }
    sources = output_names(_sources(model, Path(source), frame_fps), Path(source), f".{format}")
    mine = sorted(sources.items(), key=lambda entry: entry[1])[shard[0] - 1 :: shard[1]]
    rates = [rate_of(model, this, fps) for this, _ in mine]
    if resume:
        _refuse_other_format(out, [file for _, file in mine], format)
    else:
        _refuse_files(out, [file for _, file in mine] if shard[1] > 1 else None)
    made = {
        "format": "pt",
        "model": name,
        "weights": fingerprint(model),
        "insertion": spec.describe(),
        "layer": layer,
        "tokens": str(spec.tokens),
        "dtype": dtype,
        "precision": precision,
        "frame_fps": "" if frame_fps is None else f"{frame_fps:g}",
    }
    files: list[dict[str, Any]] = []
    damaged: list[Damaged] = []
    present = 0
    for done, ((this, file), rate) in enumerate(zip(mine, rates)):
        about = {
            **made,
            "source": str(this),
            "extent": extent(this),
            "fps": ALL_FRAMES if rate is None else f"{rate:g}",
        }
        if resume and (out / file).exists():
            _check_same(out / file, about)
            present += 1
            continue
        try:
            with token_file(out / file, format, dtype, about) as writer:
                for rows in stream_tokens(model, this, **options):
                    damaged += rows.damaged
                    if not len(rows.tokens):
                        continue
                    writer.write(rows)
                    if progress is not None:
                        progress(done + rows.share, len(mine))
        except DamagedImage as error:
            if on_error == "raise":
                raise
            damaged.append(_named_by(this, error))
        else:
            files += [{"file": file, "source": str(this), "rows": writer.rows}] if writer.rows else []
    if mine and not files and not present:
        raise nothing_read(damaged)
    return {
        "output": str(out),
        "files": files,
        "rows": sum(entry["rows"] for entry in files),
        "tokens": spec.tokens,
        "dim": host_of(model).dim,
        "layer": layer,
        "already_there": present,
        "of_other_shards": len(sources) - len(mine),
        "damaged": damaged_entries(damaged),
        "seconds": time.perf_counter() - start,
    }


def _check_options(
    format: str,  # noqa: A002
    dtype: str,
    shard: tuple[int, int],
    frame_fps: float | None,
) -> None:
    if format not in ("safetensors", "parquet") or dtype not in ("float16", "float32"):
        raise InputError(
            f"format is 'safetensors' or 'parquet' and dtype 'float16' or 'float32', not {format}, {dtype}"
        )
    if format == "parquet":
        needed_pyarrow()
    if frame_fps is not None and not 0 < frame_fps < float("inf"):
        raise InputError(f"frame_fps must be above 0, not {frame_fps:g}")
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"shard is {shard[0]}/{shard[1]}: give i/n, with i from 1 to n")


def _sources(model: nn.Module, source: Path, frame_fps: float | None) -> list[StreamSource]:
    """Of a model of clips the videos alone, if there are any."""
    found = find_sources(source, frame_fps)
    videos: list[StreamSource] = [entry for entry in found if not isinstance(entry, Pictures)]
    return videos if takes_clips(model) and videos else found


def _named_by(source: StreamSource, error: DamagedImage) -> Damaged:
    """Of a folder of frames the folder, with the picture that is damaged in the reason."""
    reason = error.reason if error.path == str(source) else f"{Path(error.path).name}: {error.reason}"
    return Damaged(str(source), reason)


def output_names(sources: Sequence[StreamSource], root: Path, suffix: str) -> dict[StreamSource, str]:
    """The file for each source, from the output folder on.

    ``InputError`` if two would be the same, which it takes strange names for.
    """
    whole: dict[StreamSource, str] = {}
    short: dict[StreamSource, str] = {}
    for source in sources:
        path = source if isinstance(source, Path) else source.path
        own = path.resolve().name if path.is_dir() else path.name
        inside = path.relative_to(root) if path != root else Path(own)
        whole[source] = inside.as_posix()
        short[source] = inside.as_posix() if path.is_dir() else inside.with_suffix("").as_posix()
    counts = Counter(name.casefold() for name in short.values())  # as disks compare them that know no case
    names = {source: name if counts[name.casefold()] == 1 else whole[source] for source, name in short.items()}
    first: dict[str, StreamSource] = {}
    for source, name in names.items():
        if (other := first.setdefault(name.casefold(), source)) is not source:
            raise InputError(f"{other} and {source} would both be written to {name}{suffix}: rename one of them")
    return {source: f"{name}{suffix}" for source, name in names.items()}


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that differ where any weight does."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _refuse_files(out: Path, own: Sequence[str] | None) -> None:
    """Of a shard, ``own`` are the files that can't be there; otherwise nothing can."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = [entry.name for entry in out.iterdir()] if own is None else [f for f in own if (out / f).exists()]
    except OSError as error:
        raise InputError(f"{out} can't be written to ({error.strerror}): give a folder for the tokens") from error
    if there:
        raise InputError(f"{out} already has {min(there)}: go on there with --resume, or give a new folder")


def extent(source: StreamSource) -> str:
    """What tells a video from another of its name, wherever it lies: its bytes; of a folder, its pictures."""
    if isinstance(source, Path):
        return f"{source.stat().st_size} bytes"
    return f"{len(source.frames())} pictures"


def _refuse_other_format(out: Path, files: Sequence[str], format: str) -> None:  # noqa: A002
    for file in files:
        other = (out / file).with_suffix(_SUFFIXES[format])
        if other.exists():
            raise InputError(f"{out} has {other.name}: --resume goes on with the --format a folder was begun with")


def _check_same(path: Path, wanted: dict[str, str]) -> None:
    found = read_metadata(path)
    if found.get("extent", wanted["extent"]) != wanted["extent"]:
        raise InputError(
            f"{path} is of {found.get('source')}, of {found['extent']}, not of {wanted['source']}, of "
            f"{wanted['extent']}: give another folder"
        )
    for key in _SAME:
        if found.get(key) != wanted[key]:
            raise InputError(
                f"{path} was made with {key} {found.get(key)}, not {wanted[key]}: --resume goes on with what a folder "
                "was begun with; give another folder"
            )
