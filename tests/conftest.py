"""Shared by all tests: the torchvision cure first, shape checks on the core, one thread for each worker."""

import os
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest

import tokenlearner  # noqa: F401 - first: lets torchvision and timm be imported where its operators can't be loaded

# Shapes in signatures are checked while the tests run; set TOKENLEARNER_SHAPE_CHECKS=0 to run as users do.
if os.environ.get("TOKENLEARNER_SHAPE_CHECKS", "1") == "1":
    jaxtyping.install_import_hook(["tokenlearner.core", "tokenlearner.insertion"], "beartype.beartype")

import torch

from command_line import Ran, exit_code

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels run on the CPU then; read when Triton is imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def reference_dir() -> Path:
    """Outputs of the official implementation, copied from Scenic runs; see tests/data/README.md."""
    return Path(__file__).parent / "data"


@pytest.fixture
def without_shape_checks():
    """Turns jaxtyping's wrappers off: torch.compile and torch.export can't trace through them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run(capsys, monkeypatch) -> Callable[..., Ran]:
    """A command of the console script, by its arguments, and what it left."""

    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["tokenlearner", *map(str, arguments)])
        code = exit_code(*arguments)
        return Ran(code, *capsys.readouterr())

    return call
