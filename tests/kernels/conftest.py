"""Where the kernels run: on the GPU if there is one, else on the CPU under Triton's interpreter."""

import os

import pytest
import torch


@pytest.fixture
def device() -> str:
    """For tests that run a kernel."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    assert os.environ["TRITON_INTERPRET"] == "1", "there is no GPU, and the interpreter was switched off"
    return "cpu"
