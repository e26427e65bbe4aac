"""Shared by all tests: the torchvision cure first, shape checks on the core, one thread for each worker."""

import os

import tokenlearner._torchvision

tokenlearner._torchvision.install()

if os.environ.get("TOKENLEARNER_SHAPE_CHECKS", "1") == "1":
    from jaxtyping import install_import_hook

    install_import_hook(["tokenlearner.core", "tokenlearner.insertion"], "beartype.beartype")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


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
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
