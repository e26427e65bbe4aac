"""A trained model to one file that runs without this package, proven to compute the same before it counts as there."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.export.comparing import (
    BATCHES,
    STAND_INS,
    Difference,
    check_difference,
    difference,
    noise,
    stand_ins,
)
from tokenlearner.export.comparing import CLOSE as CLOSE_OUTPUTS
from tokenlearner.export.running import open_file
from tokenlearner.export.tracing import (
    OPSET,
    OUTPUT_NAME,
    SUFFIXES,
    Deployed,
    Format,
    Precision,
    check_request,
    write_graph,
)
from tokenlearner.insertion.insert import insertion_of, remove
from tokenlearner.insertion.saving import Preprocessing, refuse_file
from tokenlearner.inspection.speed import measure_speed

PREPROCESSING = "preprocessing.json"
FORMAT = 1  # of preprocessing.json

ROUNDS, SECONDS_PER_ROUND = 9, 0.2
_TOGETHER = {"images": 8, "clips": 1}  # in a batch of real inputs, and of what is timed
_COLOURS = {1: "grey", 3: "RGB"}
_SLOW = 0.5  # seconds for one image: then fewer rounds, one image at a time


def export_model(
    model: nn.Module,
    output: str | Path,
    *,
    format: Format = "onnx",  # noqa: A002
    precision: Precision = "fp32",
    inputs: Sequence[Path] | None = None,
    opset: int | None = None,
    measure: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes ``model`` to ``output`` as one file that runs without this package; returns a summary, ready for JSON.

    The folder gets ``model.onnx`` (one file, weights included, so below 2 GiB) or ``model.pt2`` (for
    ``torch.export.load``), and beside it ``preprocessing.json``, which says all that a caller of the file needs: shapes
    and names, how a picture or a clip becomes the input, the labels, and the file's checksum. Both appear whole and
    last: the file was loaded again before, and compared with the model on noise in batches of 1, 2 and 5 and on
    pictures. The batch is open; the size of images, and the length of clips, are the model's. A folder is for one
    export: a second one replaces ``preprocessing.json``.

    Inputs and outputs are float32 in either precision. Clips are (b, c, t, h, w), also those of transformers' models.
    Without a head, the output is what a reader of the model takes: see :class:`~tokenlearner.export.tracing.Deployed`.

    Args:
        model: As ``tokenlearner.load`` or ``tokenlearner.models.open_trained`` gives it. It stays as it is.
        output: The folder, made if it is not there.
        format: ``"onnx"``, run by onnxruntime and most else, or ``"pt2"``, PyTorch's exported program.
        precision: ``"fp32"``, or ``"fp16"`` for weights and arithmetic in float16, of half the size and for graphics
            cards: processors mostly convert back to float32.
        inputs: Pictures, or videos where the model takes clips, or folders of them, to compare on; all of them are
            used, of a video one view. Without, 32 pictures or 4 clips of scikit-learn's.
        opset: Version of ONNX's operators, 18 to 25; 20 when None.
        measure: Whether to time the file against that of the host without its TokenLearner, in turns, with
            ``torch.get_num_threads()`` threads.
        log: Gets a line for each step.

    Raises:
        InputError: The model can't be exported, or the file differs from it by more than rounding; nothing new is in
            the folder then. Also for packages that are missing, and inputs that can't be read.
    """
    start, output = time.perf_counter(), Path(output)
    if getattr(model, "wraps_host", False):
        model = model.model  # type: ignore[assignment]
    check_request(model, format, precision, opset)
    refuse_file(output, "the model and what describes it")
    reference = Deployed(model, "fp32")
    preprocessing = _preprocessing_of(reference)
    kind = "images" if preprocessing.frames is None else "clips"
    files = None if inputs is None else _find(reference, preprocessing, inputs)
    opset = (opset or OPSET) if format == "onnx" else None
    spec, threads = insertion_of(model), torch.get_num_threads()
    example, channels = torch.zeros(2, *preprocessing.model_input), preprocessing.input_size[0]
    output_name, output_shape = _output(reference, example)
    labels = list(getattr(model, "label_names", None) or []) or None

    def write(part: Deployed, path: Path) -> dict[str, int]:
        return write_graph(part, path, example, format=format, input_name=kind, output_name=output_name, opset=opset)

    deployed = reference if precision == "fp32" else Deployed(model, precision)
    log(
        f"exporting {type(model).__name__}{f' with {spec.describe()}' if spec else ''} to {format}"
        f"{f' (opset {opset})' if opset else ''}, {precision}"
    )
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as folder:
        path = Path(folder) / f"model{SUFFIXES[format]}"
        operators, host_operators, speed = write(deployed, path), None, None
        exported = open_file(path, threads)
        comparison = _compare(reference, exported, preprocessing, files, precision, output_name == OUTPUT_NAME, log)
        if measure:
            timed = {"TokenLearner" if spec else type(model).__name__: exported}
            if spec:
                host_path = Path(folder) / f"host{path.suffix}"
                host_operators = write(Deployed(remove(copy.deepcopy(model)), precision), host_path)
                timed = {"host": open_file(host_path, threads), **timed}
            speed = _measure(timed, preprocessing, threads, "onnxruntime" if format == "onnx" else "torch", log)
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        description: dict[str, Any] = {
            "format": FORMAT,
            "file": path.name,
            "sha256": checksum,
            "bytes": path.stat().st_size,
            "precision": precision,
            "opset": opset,
            "input": _described(kind, ["batch", *preprocessing.model_input]),
            "output": _described(output_name, ["batch", *output_shape]),
            "preprocessing": {
                "pixels": f"{_COLOURS.get(channels, f'{channels} channels')}, 0 to 1",
                **asdict(preprocessing),
            },
            "labels": labels if output_name == OUTPUT_NAME else None,
            "model": type(model).__name__,
            "insertion": spec.to_dict() if spec else None,
            "versions": _versions(model, format),
        }
        written = path.with_name(PREPROCESSING)
        written.write_text(json.dumps(description, indent=2), encoding="utf-8")
        for part in (path, written):
            _to_disk(part)
        for part in (path, written):
            part.replace(output / part.name)
    log(f"wrote {path.name} ({description['bytes'] / 1e6:.1f} MB) and {PREPROCESSING} to {output}")
    return {
        "folder": str(output),
        **description,
        "operators": operators,
        "host_operators": host_operators,
        "comparison": comparison,
        "speed": speed,
        "seconds": time.perf_counter() - start,
    }


def _preprocessing_of(model: Deployed) -> Preprocessing:
    preprocessing, clips = model.preprocessing, model.takes_clips
    if preprocessing is None or clips != (preprocessing.frames is not None):
        what = "clips" if clips else "images"
        arguments = "Preprocessing(..., frames=..., fps=...)" if clips else "Preprocessing(...)"
        raise InputError(
            f"the model does not say how its {what} are prepared, and whoever runs the file has to know: "
            f"set model.preprocessing = {arguments}"
        )
    return preprocessing


def _find(model: Deployed, preprocessing: Preprocessing, paths: Sequence[Path]) -> list[Any]:
    from tokenlearner.evaluation.predict import find_inputs

    if not paths:
        raise InputError("inputs is empty: give files or folders, or None for pictures of scikit-learn's")
    if preprocessing.frames is not None and preprocessing.fps is None:
        raise InputError(
            "the model does not say how many frames a second its clips show, so none can be cut from videos: "
            "set model.preprocessing = Preprocessing(..., fps=...), or give no videos"
        )
    return find_inputs(model, [Path(path) for path in paths])


def _compare(
    reference: Deployed,
    exported: nn.Module,
    preprocessing: Preprocessing,
    files: list[Any] | None,
    precision: Precision,
    classes: bool,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Both comparisons, passed, as the summary has them."""
    kind, close = "images" if preprocessing.frames is None else "clips", CLOSE_OUTPUTS[precision]
    random = difference(reference, exported, noise(preprocessing.model_input), close=close, classes=classes)
    check_difference(random, precision, "noise", top1=False)
    log(f"noise in batches of {', '.join(map(str, BATCHES))}: {_said(random)}")
    document: dict[str, Any] = {"noise": random.to_dict(), "real": None}
    damaged: list[Any] = []
    if files is not None:
        source, batches = f"the {kind} given", _decoded(reference, files, _TOGETHER[kind], damaged)
    elif preprocessing.input_size[0] in (1, 3):
        source, batches = STAND_INS, stand_ins(preprocessing, _TOGETHER[kind])
    else:
        log(f"no {kind} with {preprocessing.input_size[0]} channels at hand, so compared on noise alone")
        return document
    real = difference(reference, exported, batches, close=close, classes=classes)
    check_difference(real, precision, source, top1=True)
    log(f"{real.inputs} {kind} ({source}): {_said(real)}")
    document["real"] = {"source": source, **real.to_dict()}
    if files is not None:
        from tokenlearner.data.images import damaged_entries

        document["real"]["damaged"] = damaged_entries(damaged)
    return document


def _decoded(model: nn.Module, files: list[Any], batch_size: int, damaged: list[Any]) -> Iterator[Tensor]:
    """The files as the model takes them, of a video one view; those that can't be read go to ``damaged``."""
    from tokenlearner.data.images import Damaged
    from tokenlearner.evaluation.predict import batches, nothing_read

    readable = 0
    for _, x, reasons in batches(model, files, batch_size, "skip", views=(1, 1)):
        damaged += [Damaged(str(file), reason) for file, reason in reasons.items()]
        readable += len(x)
        if len(x):
            yield x.flatten(0, 1) if x.ndim == 6 else x
    if not readable:
        raise nothing_read(damaged)


def _said(found: Difference) -> str:
    top1 = f", the same top-1 on {found.agreeing} of {found.counted} clear cases" if found.counted else ""
    return f"off by {found.largest_relative:.1e} of the largest output{top1}"


def _measure(
    files: dict[str, nn.Module],
    preprocessing: Preprocessing,
    threads: int,
    runtime: str,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Times the files in turns; the ratio is to the first."""
    kind = "images" if preprocessing.frames is None else "clips"
    batch = torch.randn(_TOGETHER[kind], *preprocessing.model_input, generator=torch.Generator().manual_seed(0))
    rounds, first = ROUNDS, next(iter(files.values()))
    with torch.no_grad():
        first(batch[:1])
        start = time.perf_counter()
        first(batch[:1])
    if time.perf_counter() - start > _SLOW:
        batch, rounds = batch[:1], 3
    speeds = measure_speed(files, batch, rounds=rounds, seconds_per_round=SECONDS_PER_ROUND)
    entries = [
        {"name": s.name, f"{kind}_per_second": s.images_per_second, "spread": s.spread, "ratio": s.ratio}
        for s in speeds
    ]
    said = [f"{s.name} {s.images_per_second:.1f} {kind}/s" for s in speeds]
    times = f", ×{speeds[-1].ratio:.2f}" if len(speeds) > 1 else ""
    log(f"{runtime}, threads: {threads}, batches of {len(batch)}: {', '.join(said)}{times}")
    return {
        "runtime": runtime,
        "device": "cpu",
        "threads": threads,
        "batch_size": len(batch),
        "rounds": rounds,
        "files": entries,
    }


def _described(name: str, shape: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": "float32"}


@torch.no_grad()
def _output(model: Deployed, example: Tensor) -> tuple[str, tuple[int, ...]]:
    """The output's name and its shape without the batch."""
    try:
        name, y = model.output(example[:1])
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the model does not run on an input of shape {tuple(example.shape[1:])}, which its preprocessing says: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return name, tuple(y.shape[1:])


def _versions(model: nn.Module, format: Format) -> dict[str, str]:  # noqa: A002
    from tokenlearner import __version__

    host = "transformers" if hasattr(model, "input_modalities") else "timm"
    others = ("torch", host, *(("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()))
    return {"tokenlearner": __version__} | {name: importlib.metadata.version(name) for name in others}


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
