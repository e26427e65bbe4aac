"""Table 5's baseline: a ViT that halves its grid by plain mean pooling, as TokenLearner does by learning.

"2×2 pool at 9 and 18" names the grid that is left: 32×32 positions, 8×8 from layer 9 on, 2×2 from layer 18 on.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner.core.alpha import Grid
from tokenlearner.errors import InputError
from tokenlearner.insertion.layers import GridRecord, NoteGrid, join_prefix, refuse_masks, split_prefix


class GridPool(nn.Module):
    """Mean over ``side`` × ``side`` cells of the grid; they overlap by a position where ``side`` does not divide it."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b m d"]:
        if min(grid) < self.side:
            raise ValueError(f"a grid of {grid[0]}×{grid[1]} can't be pooled to {self.side}×{self.side}")
        X = rearrange(x, "b (h w) d -> b d h w", h=grid[0], w=grid[1])
        return rearrange(F.adaptive_avg_pool2d(X, self.side), "b d h w -> b (h w) d")

    def extra_repr(self) -> str:
        return f"side={self.side}"


class PoolTokens:
    """Forward pre-hook: pools the grid tokens entering ``module`` by its ``grid_pool``; prefix tokens pass around.

    ``grid`` is that of an earlier pooling, or the record of what the patch embedding saw.
    """

    def __init__(self, num_prefix_tokens: int, grid: Grid | GridRecord) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = grid

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        refuse_masks(args[1:], kwargs)
        prefix, X = split_prefix(args[0], self.num_prefix_tokens)
        grid = self.grid.read(args[0], X.shape[1]) if isinstance(self.grid, GridRecord) else self.grid
        return (join_prefix(prefix, module.grid_pool(X, grid)), *args[1:]), kwargs  # type: ignore[operator]


class PooledViT(VisionTransformer):
    """A VisionTransformer whose grid is mean-pooled before some layers. Adds no parameters and renames none.

    Args:
        pooling: (layer, side) pairs: before that layer the grid becomes side × side.
        arguments: VisionTransformer's own.

    Raises:
        InputError: The layers are not in ascending order, or outside the depth.
    """

    def __init__(self, *args: Any, pooling: tuple[tuple[int, int], ...] = (), **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.pooling = tuple((int(at), int(side)) for at, side in pooling)
        layers = [at for at, _ in self.pooling]
        if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < len(self.blocks):
            last = len(self.blocks) - 1
            raise InputError(f"pooling is (layer, side) pairs with ascending layers from 0 to {last}, not {pooling!r}")
        record = GridRecord()
        self.patch_embed.register_forward_hook(NoteGrid(record))
        grid: Grid | GridRecord = record
        for at, side in self.pooling:
            self.blocks[at].grid_pool = GridPool(side)
            self.blocks[at].register_forward_pre_hook(PoolTokens(self.num_prefix_tokens, grid), with_kwargs=True)
            grid = (side, side)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in timm, with ``output_fmt="NLC"``: the layers have grids of different sizes."""
        if (args[4] if len(args) > 4 else kwargs.get("output_fmt", "NCHW")) == "NCHW":
            raise ValueError("forward_intermediates: the layers' grids differ in size; use output_fmt='NLC'")
        return super().forward_intermediates(x, *args, **kwargs)
