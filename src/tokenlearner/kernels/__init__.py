"""Triton kernels for the learner and the fuser, used where a model is told to and where they can serve.

Nothing here is imported by the rest of the package, and without Triton or a GPU everything runs as it does without it.
"""

from tokenlearner.kernels.switch import obstacle, use

__all__ = ["obstacle", "use"]
