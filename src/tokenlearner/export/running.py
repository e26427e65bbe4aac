"""An exported file loaded again, as something that is called like the model it was made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class OnnxFile(nn.Module):
    """An ONNX file in onnxruntime, on the CPU.

    Args:
        path: The file.
        threads: With how many it runs.
    """

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        onnxruntime = importlib.import_module("onnxruntime")  # an extra, and without types
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input_name = self.session.get_inputs()[0].name

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input_name: x.contiguous().numpy()})[0])


class ProgramFile(nn.Module):
    """A .pt2 file in torch, on the CPU."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        # No child: an exported program refuses eval(), being made for one mode.
        self.call: Callable[[Tensor], Tensor] = torch.export.load(path).module().__call__

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def open_file(path: Path, threads: int) -> nn.Module:
    """The file as a module; ``threads`` are onnxruntime's, and torch's are set by ``torch.set_num_threads``."""
    return OnnxFile(path, threads) if path.suffix == ".onnx" else ProgramFile(path)
