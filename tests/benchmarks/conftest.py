"""Makes ``peers`` importable, as it is for the scripts beside it, with its shapes checked."""

import os
import sys
from pathlib import Path

import jaxtyping

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

if os.environ.get("TOKENLEARNER_SHAPE_CHECKS", "1") == "1":
    jaxtyping.install_import_hook(["peers"], "beartype.beartype")
