"""TokenLearner for image and video transformers: learn a few tokens, run every later layer on those.

Names are imported when first used, so that ``import tokenlearner`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenlearner import _torchvision

_torchvision.install()

__version__ = "0.1.0"

_HOME = {
    "TokenLearner": "core",
    "NeighbourTokenLearner": "core",
    "WindowTokenLearner": "core",
    "TokenFuser": "core",
    "Unpool": "core",
    "Reproject": "core",
    "insert": "insertion",
    "remove": "insertion",
    "attention_maps": "insertion",
    "Insertion": "insertion",
    "insertion_of": "insertion",
    "learners": "insertion",
    "save": "insertion",
    "set_num_tokens": "insertion",
    "load": "insertion",
    "Preprocessing": "insertion",
    "cost": "inspection",
    "param_groups": "training.optim",
    "Cost": "inspection",
    "InputError": "errors",
}

__all__ = [
    "Cost",
    "InputError",
    "Insertion",
    "NeighbourTokenLearner",
    "Preprocessing",
    "Reproject",
    "TokenFuser",
    "TokenLearner",
    "Unpool",
    "WindowTokenLearner",
    "__version__",
    "attention_maps",
    "cost",
    "insert",
    "insertion_of",
    "learners",
    "load",
    "param_groups",
    "remove",
    "save",
    "set_num_tokens",
]

if TYPE_CHECKING:
    from tokenlearner.core import (
        NeighbourTokenLearner,
        Reproject,
        TokenFuser,
        TokenLearner,
        Unpool,
        WindowTokenLearner,
    )
    from tokenlearner.errors import InputError
    from tokenlearner.insertion import (
        Insertion,
        Preprocessing,
        attention_maps,
        insertion_of,
        learners,
        load,
        remove,
        save,
        set_num_tokens,
    )
    from tokenlearner.insertion.insert import insert
    from tokenlearner.inspection import Cost, cost
    from tokenlearner.training.optim import param_groups


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"tokenlearner.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tokenlearner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
