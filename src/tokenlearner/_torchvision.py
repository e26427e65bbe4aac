"""Lets torchvision, and timm with it, be imported where torchvision's compiled operators can't be loaded.

A torchvision wheel built for another torch (the CPU build, say) can't load its ``_C`` library, and then fails at
import: it registers fake kernels for ``torchvision::nms``, an operator nobody has declared. Declaring the schemas first
cures it; nothing here calls them. Where the real operators load this does nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []  # a torch.library.Library takes its operators along when it is collected


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Runs once, when something first imports torchvision, and finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


def declare_missing_operators() -> None:
    """Declares torchvision's two operators with fake kernels, unless its own library loads."""
    import torch

    package = importlib.machinery.PathFinder.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return
    library = importlib.machinery.PathFinder.find_spec("_C", list(package.submodule_search_locations))
    try:
        torch.ops.load_library(library.origin if library and library.origin else "")
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            declared.define(schema)
        _libraries.append(declared)


def install() -> None:
    """Arranges for the check to run at torchvision's first import; costs nothing before that."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
