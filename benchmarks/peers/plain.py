"""Cheaper without any method: a smaller ViT, a lower resolution, fewer layers."""

from __future__ import annotations

from tokenlearner.errors import InputError
from tokenlearner.insertion.hosting import build_host, describe_host
from tokenlearner.insertion.saving import Preprocessing

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from peers.hosts import copy_of


def smaller_vit(model: nn.Module, depth: int, num_heads: int) -> VisionTransformer:
    """An untrained ViT as ``model`` is, of ``depth`` layers and ``num_heads`` heads as wide as the host's.

    The width is the heads' together; all else, preprocessing and labels too, is the host's.

    Raises:
        InputError: ``model`` is no host the peers take, or can't be described by timm's arguments.
    """
    host = copy_of(model).to("meta")
    if depth < 1 or num_heads < 1:
        raise InputError(f"a ViT has at least one layer and one head, not {depth} and {num_heads}")
    with torch.device("meta"):
        description = describe_host(host, build_host)
    sizes = {"depth": depth, "num_heads": num_heads, "embed_dim": num_heads * host.blocks[0].attn.head_dim}
    with torch.device(next(model.parameters()).device):
        smaller = build_host({**description, "arguments": {**description["arguments"], **sizes}})
    for name in ("preprocessing", "label_names"):
        if hasattr(host, name):
            setattr(smaller, name, getattr(host, name))
    return smaller


def lower_resolution(model: nn.Module, grid: tuple[int, int]) -> VisionTransformer:
    """A copy of ``model`` for images of ``grid`` patches (h, w), its position embedding interpolated as timm does.

    It takes the host's images, whatever their size, and scales them down itself, so that host and copy can be trained
    and scored on the same batches; its preprocessing is the host's.

    Raises:
        InputError: ``model`` is no host the peers take, or the grid is not within its own.
    """
    host = copy_of(model)
    full, patch = host.patch_embed.grid_size, host.patch_embed.patch_size
    if not all(1 <= side <= most for side, most in zip(grid, full)):
        raise InputError(f"the grid has to be within the host's, which is {full[0]}×{full[1]}, not {grid!r}")
    preprocessing = Preprocessing.of(host)
    if preprocessing is not None:
        host.preprocessing = preprocessing
    host.set_input_size((grid[0] * patch[0], grid[1] * patch[1]))
    host.patch_embed.strict_img_size = False  # or the package would take the small size for that of the images
    host.patch_embed.register_forward_pre_hook(ScaleDown(host.patch_embed.img_size))
    return host


class ScaleDown:
    """Forward pre-hook of a patch embedding: images become ``size`` (h, w), smoothed before they are sampled."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, module: nn.Module, args: tuple[Float[Tensor, "b c h w"]]) -> tuple[Tensor]:
        return (F.interpolate(args[0], self.size, mode="bilinear", antialias=True, align_corners=False),)


def shorten(model: nn.Module, depth: int) -> VisionTransformer:
    """A copy of ``model`` with its first ``depth`` layers, then the same norm and head.

    Raises:
        InputError: ``model`` is no host the peers take, or has not so many layers.
    """
    host = copy_of(model)
    if not 1 <= depth <= len(host.blocks):
        raise InputError(f"depth has to be 1 to {len(host.blocks)}, the host's layers, not {depth}")
    host.blocks = host.blocks[:depth]
    host.feature_info = host.feature_info[:depth]
    return host
