"""A model as a graph in one file, for batches of any size."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenlearner.errors import InputError
from tokenlearner.insertion.huggingface_folder import output_of, takes_frames_first
from tokenlearner.insertion.saving import Preprocessing

Format = Literal["onnx", "pt2"]
Precision = Literal["fp32", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
SUFFIXES: dict[str, str] = {"onnx": ".onnx", "pt2": ".pt2"}
OUTPUT_NAME = "logits"
OPSET = 20  # the first with Gelu; LayerNormalization is older
OPSETS = range(18, 26)  # those that torch writes without converting, and that onnxruntime reads

# A protobuf ends at 2 GiB; the graph beside the weights takes some MB.
MOST_ONNX_BYTES = 2**31 - 2**25


class Deployed(nn.Module):
    """A model as it is exported: inputs and outputs in float32, weights and arithmetic in ``precision``.

    It takes images (b, c, h, w) or clips (b, c, t, h, w) and gives one tensor, also where the model is of transformers:
    of what that returns the logits, else the embedding, the pooled output or the last hidden state.

    With fp16 the file takes and gives float32 all the same, so that it replaces an fp32 file without a change to the
    code around it, and probabilities are not computed of rounded outputs. What the model keeps in float32 on purpose
    (TokenLearner's maps and sums) stays so.

    Args:
        model: Stays as it is; a copy on the CPU, in eval mode, is what this holds.
        precision: ``"fp32"`` or ``"fp16"``.

    Raises:
        InputError: A weight that float16 can't hold.
    """

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        self.frames_first = takes_frames_first(model)
        self.takes_clips = self.frames_first or bool(getattr(model, "takes_clips", False))
        self.preprocessing = Preprocessing.of(model)
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        if precision == "fp32":
            return
        finite = {name for name, t in self.model.state_dict().items() if t.isfinite().all()}
        self.model.half()
        for name, t in self.model.state_dict().items():
            if name in finite and not t.isfinite().all():
                largest = torch.finfo(torch.float16).max
                raise InputError(f"{name} has numbers beyond {largest:.0f}, float16's largest: use precision='fp32'")

    def forward(self, x: Tensor) -> Tensor:
        return self.output(x)[1]

    def output(self, x: Tensor) -> tuple[str, Tensor]:
        """The output for ``x`` and its name, ``"logits"`` where there are classes."""
        x = x.to(self.dtype)
        y = self.model(rearrange(x, "b c t h w -> b t c h w") if self.frames_first else x)
        if isinstance(y, Tensor):
            return OUTPUT_NAME if getattr(self.model, "num_classes", None) != 0 else "features", y.float()
        name, found = output_of(y)
        return name, found.float()


def check_request(model: nn.Module, format: str, precision: str, opset: int | None) -> None:  # noqa: A002
    """Raises ``InputError`` for what can't be exported, before anything is done. Arguments as ``export_model``'s."""
    if format not in SUFFIXES:
        raise InputError(f"format is 'onnx' or 'pt2', not {format!r}")
    if precision not in DTYPES:
        raise InputError(f"precision is 'fp32' or 'fp16', not {precision!r}")
    if opset is not None and format != "onnx":
        raise InputError(f"opset={opset} is a version of ONNX's operators, and format is {format!r}: leave it out")
    if opset is not None and opset not in OPSETS:
        raise InputError(f"opset is {OPSETS[0]} to {OPSETS[-1]}, not {opset!r}")
    if any(_is_compiled(module) for module in model.modules()):
        raise InputError("the model or a part of it is compiled: export the model that was given to torch.compile")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("a TorchScript model can't be exported: export the model it was made of")
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    if any(t.is_meta for t in tensors):
        raise InputError("the model is on the meta device, so it has no weights to export")
    if format != "onnx":
        return
    size = sum(t.numel() * (DTYPES[precision] if t.is_floating_point() else t.dtype).itemsize for t in tensors)
    if size > MOST_ONNX_BYTES:
        smaller = "precision='fp16' or " if size / 2 <= MOST_ONNX_BYTES and precision == "fp32" else ""
        raise InputError(
            f"the weights take {size / 2**30:.1f} GiB in {precision}, and one ONNX file holds less than 2: "
            f"use {smaller}format='pt2'"
        )
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"format='onnx' needs the package {package}, which is not there: pip install onnx onnxscript "
                "onnxruntime, or use format='pt2'"
            ) from error


def write_graph(
    model: Deployed,
    path: Path,
    example: Tensor,
    *,
    format: Format,  # noqa: A002
    input_name: str,
    output_name: str = OUTPUT_NAME,
    opset: int | None = None,
) -> dict[str, int]:
    """Writes ``model`` to ``path`` and returns how many of each operator its graph has, the most frequent first.

    Where each operator stands in whose source file is left out: that is half an ONNX file, and names local folders.

    Args:
        model: What to write.
        path: The file; an existing one is overwritten.
        example: An input of the shape to export for. The batch is left open, and all else is fixed.
        format: ``"onnx"`` or ``"pt2"``.
        input_name, output_name: ONNX's names of the input and the output.
        opset: Of ONNX; 20 when None.

    Raises:
        InputError: The model has no graph that is the same for all inputs and batch sizes.
    """
    with _quiet():
        try:
            with torch.no_grad():
                program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            if format == "pt2":
                return _write_program(program, path)
            return _write_onnx(program, path, input_name, output_name, opset or OPSET)
        except InputError:
            raise
        except Exception as error:  # of whatever torch could not trace or translate
            lines = [line.strip() for line in str(_first_cause(error)).splitlines() if line.strip()]
            said = " ".join(lines[:2])[:300]
            raise InputError(
                f"this {type(model.model).__name__} can't be exported to {format}: {type(error).__name__}: {said}"
            ) from error


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` returned, or ``module.compile()`` was called."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def _write_program(program: torch.export.ExportedProgram, path: Path) -> dict[str, int]:
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    for node in nodes:
        for note in ("stack_trace", "from_node"):
            node.meta.pop(note, None)
    program.example_inputs = None  # zeros, of a long clip many megabytes
    torch.export.save(program, path)
    return _by_frequency(str(node.target) for node in nodes if node.op == "call_function")


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, input_name: str, output_name: str, opset: int
) -> dict[str, int]:
    exported: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=[input_name],
        output_names=[output_name],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
        external_data=False,
    )
    for node in exported.model.graph.all_nodes():
        kept = {key: value for key, value in node.metadata_props.items() if key == "namespace"}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
    exported.save(path, external_data=False)
    importlib.import_module("onnx").checker.check_model(path, full_check=True)
    return _by_frequency(node.op_type for node in exported.model.graph.all_nodes())


def _by_frequency(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda entry: (-entry[1], entry[0])))


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's reports of an export off the terminal; whoever wants them calls torch.onnx.export."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # torch 2.13's own
            yield
    finally:
        logging.disable(level)
