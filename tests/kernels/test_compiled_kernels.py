"""What the interpreter can't see: whether Triton's compiler takes the kernels, for Hopper, which needs no GPU."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenlearner.kernels import fuser, learner, logits

SIZES = {"D": 192, "N": 64, "C": 64, "H": 64, "S": 16, "P": 256, "RESIDUAL": True}
FLOAT32 = ("sums_ptr", "b1_ptr", "bias_ptr", "tops_ptr", "totals_ptr")
for kernel in (logits._fold, learner._learn, learner._join, fuser._fuse):
    names = kernel.arg_names
    kinds = {name: "constexpr" if name in SIZES else "fp32" if name == "eps" else "i32" for name in names}
    kinds |= {name: "*fp32" if name in FLOAT32 else "*bf16" for name in names if name.endswith("_ptr")}
    constants = {(i,): SIZES[name] for i, name in enumerate(names) if name in SIZES}
    even = [i for i, name in enumerate(names) if name.endswith(("_ptr", "_stride")) or name == "hidden"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
    ptx = compiled.asm["ptx"]
    print(kernel.__name__, "wgmma" in ptx, "cp.async" in ptx, compiled.metadata.shared)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper(tmp_path):
    """Those with a product run it on the tensor cores, with loads that go on beside it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {name: row for name, *row in map(str.split, done.stdout.splitlines())}
    assert set(rows) == {"_fold", "_learn", "_join", "_fuse"}
    for name in ("_learn", "_fuse"):
        wgmma, asynchronous, shared = rows[name]
        assert (wgmma, asynchronous) == ("True", "True")
        assert int(shared) <= 227 * 1024 // 2  # so that two programs fit on a multiprocessor
