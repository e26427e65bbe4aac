"""What insertion asks of a host, whatever library it comes from."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import nn

from tokenlearner.core.alpha import Grid
from tokenlearner.insertion.layers import GridRecord
from tokenlearner.insertion.spec import Insertion


@runtime_checkable
class Host(Protocol):
    """An adapter: knows where a family of models keeps its layers and what it hands them.

    Made anew for every call (:func:`tokenlearner.insertion.hosts.host_of`), so it keeps nothing between two of them;
    what has to stay is put on the model, in a form that survives deepcopy and pickle. An adapter that names this class
    as its base gets the answers given here for hosts that have nothing of the kind.

    Attributes:
        model: The model that ``insert`` was called with.
        dim: Channels d of a token.
        num_heads: Attention heads of a layer.
        num_prefix_tokens: Tokens in front of the patches in every layer (cls, registers, distillation).
    """

    model: Any
    dim: int
    num_heads: int
    num_prefix_tokens: int

    @staticmethod
    def fits(model: object) -> bool:
        """Whether ``model`` is of this family; looks at its class alone."""
        ...

    def check(self) -> None:
        """Refuses what would come out wrong.

        Raises:
            ValueError: With the reason.
        """
        ...

    def layers(self) -> nn.Sequential | nn.ModuleList:
        """The host's own container of layers; an entry put into it is called in that place."""
        ...

    def after_layers(self) -> nn.Module:
        """The module every token passes after the last layer; one that is not in the model where there is none."""
        ...

    def grid(self) -> Grid:
        """The (h, w) of the image size the host was built for."""
        ...

    def slices(self) -> int | None:
        """Slices of the clips the host was built for; None where it takes images."""
        return None

    def watch_grid(self, record: GridRecord) -> None:
        """Has the patch embedding note the grid of what passes in ``record``."""
        ...

    def unwatch_grid(self) -> None:
        """Undoes :meth:`watch_grid`."""
        ...

    def lose_grid(self, first: int, last: int, num_tokens: int) -> None:
        """Prepares layers ``first`` to ``last - 1`` to run on ``num_tokens`` learned tokens instead of the grid.

        For layers that hold something about positions themselves; for what they are handed there is
        :meth:`without_grid`, which is asked for after this call.
        """

    def regain_grid(self) -> None:
        """Undoes :meth:`lose_grid` in every layer."""

    @staticmethod
    def without_grid(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A layer's arguments for learned tokens, which have no place on the grid.

        ``args`` starts with the tokens (b, m, d), on the grid or learned, which stay as they are; the rest of it and
        ``kwargs`` are what else the layer was handed. Kept in hooks, so it has to survive deepcopy and pickle: a
        function of a module or class, or a partial of one.

        Raises:
            ValueError: For an argument that fits nothing but the grid and can't be left out, such as a mask.
        """
        ...

    def new_identity_layer(self, index: int) -> nn.Module:
        """A fresh layer like the host's last, to be layer ``index``, with its residual branches scaled by zero.

        Raises:
            ValueError: The host can't have more layers, or its branches can't be found.
        """
        ...

    def append_layers(self, layers: list[nn.Module]) -> None:
        """Adds ``layers`` after the host's last."""
        ...

    def truncate_layers(self, depth: int) -> None:
        """Keeps the first ``depth`` layers."""
        ...

    def guard_intermediates(self, spec: Insertion) -> None:
        """Makes the host say why later layers have no feature map, where it can be asked for one."""

    def unguard_intermediates(self) -> None:
        """Undoes :meth:`guard_intermediates`."""
