"""What was inserted into a host, as plain data that travels with the model and into its ``config.json``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tokenlearner.core.learner import Kind, Pool

FuserKind = Literal["fuser", "unpool", "reproject"]
Mix = Literal["slice", "clip"]
Over = Literal["slice", "neighbours", "window"]
FUSERS: tuple[str, ...] = ("fuser", "unpool", "reproject")


@dataclass(frozen=True)
class Insertion:
    """One insertion. ``at`` is resolved to a layer index and ``host_depth`` is the host's own number of layers.

    ``window`` is the number used, never a default to be looked up; None only for ``over="slice"``. ``elastic`` is
    whether the model was trained on random numbers of its tokens, and ``used_tokens`` how many of the ``num_tokens`` it
    uses since :func:`set_num_tokens`, None for all.
    """

    num_tokens: int
    at: int
    host_depth: int
    kind: Kind = "mlp"
    fuser: FuserKind | None = None
    extra_layers: int = 0
    pool: Pool | None = None
    hidden_dim: int = 64
    dropout: float = 0.0
    mix: Mix = "slice"
    over: Over = "slice"
    window: int | None = None
    elastic: bool = False
    used_tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_insert_arguments(self) -> dict[str, Any]:
        """The keyword arguments with which :func:`insert` does the same again on the same host."""
        not_arguments = ("host_depth", "elastic", "used_tokens")
        return {name: value for name, value in asdict(self).items() if name not in not_arguments}

    @property
    def tokens(self) -> int:
        """The tokens that layers run on, per image, slice or window."""
        return self.used_tokens or self.num_tokens

    def describe(self) -> str:
        fused = f" with {self.fuser} in every layer" if self.fuser else ""
        fused += ", mixed over the clip" if self.mix == "clip" else ""
        extra = f" and {self.extra_layers} extra layers" if self.extra_layers else ""
        over = {
            "slice": "",
            "neighbours": f" over {self.window} neighbouring slices",
            "window": f" per window of {self.window} slices",
        }[self.over]
        place = f"before layer {self.at} of {self.host_depth}"
        tokens = str(self.num_tokens) if self.used_tokens is None else f"{self.used_tokens} of {self.num_tokens}"
        tokens += " elastic tokens" if self.elastic else " tokens"
        return f"{tokens} ({self.kind}){over} {place}{fused}{extra}"


def resolve_at(at: int | float, depth: int, layers: int) -> int:
    """The layer index ``at`` means on a host of ``depth`` own layers, ``layers`` with the extra ones.

    A float is a share of ``depth``, rounded down; an int is the index itself.
    """
    if isinstance(at, bool) or not isinstance(at, int | float):
        raise ValueError(f"at is a layer index (int) or a share of the depth (float in [0, 1]), not {at!r}")
    if isinstance(at, float):
        if not 0.0 <= at <= 1.0:
            raise ValueError(
                f"at={at} is a float, so a share of the depth in [0, 1]; for layer {at:.0f} give the int {at:.0f}"
            )
        return math.floor(at * depth + 1e-9)  # 0.29 · 100 is 28.999…96 in floating point
    if not 0 <= at <= layers:
        raise ValueError(f"at={at} is outside the host's {layers} layers; give 0 to {layers}")
    return at
