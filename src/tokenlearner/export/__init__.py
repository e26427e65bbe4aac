"""A trained model as one file that runs without this package: ONNX, or PyTorch's own exported program."""

from tokenlearner.export.exporting import export_model

__all__ = ["export_model"]
