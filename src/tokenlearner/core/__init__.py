"""The paper's equations as modules. Knows no host, data, configuration or files."""

from tokenlearner.core.fuser import Reproject, TokenFuser, Unpool
from tokenlearner.core.learner import KINDS, TokenLearner
from tokenlearner.core.spacetime import NeighbourTokenLearner, WindowTokenLearner
from tokenlearner.core.vector import VectorAttention

__all__ = [
    "KINDS",
    "NeighbourTokenLearner",
    "Reproject",
    "TokenFuser",
    "TokenLearner",
    "Unpool",
    "VectorAttention",
    "WindowTokenLearner",
]
