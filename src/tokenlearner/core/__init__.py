"""The paper's equations as modules. Knows no host, data, configuration or files."""

from tokenlearner.core.fuser import Reproject, TokenFuser, Unpool
from tokenlearner.core.learner import KINDS, TokenLearner

__all__ = ["KINDS", "Reproject", "TokenFuser", "TokenLearner", "Unpool"]
