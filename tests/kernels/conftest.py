"""Where the kernels run: on the GPU if there is one, else on the CPU under Triton's interpreter.

The interpreter is chosen by the environment, and has to be before anything imports Triton.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    """For tests that run a kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported before its interpreter could be chosen; run tests/kernels alone")
    return "cpu"
