"""What a pass holds in memory at most."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``run`` holds at once in tensors beyond those that were there before.

    So weights and inputs are not in it; activations, what operators need in between, gradients and outputs are. On
    the CPU these are the requests to PyTorch's allocator, exact to the byte; what libraries (oneDNN, MKL) take for
    themselves is not seen. On a GPU they are the blocks of the caching allocator, of multiples of 512 bytes, without
    what it keeps in reserve.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library would greet on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in memory), default=0)  # the profiler leaves out older blocks that go
