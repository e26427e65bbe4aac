"""ViViT as the paper's video models use it: joint space-time attention over tubelets (arXiv 2103.15691, model 1).

A timm ``VisionTransformer`` whose patches have a depth in time, so everything that knows timm's class (heads, layer
groups, checkpointing, insertion, saving) knows this one. A clip is (b, c, t, h, w); its tokens run over slices, then
rows, then columns, and the position embedding is learned for each of them.

A *slice* is one step of the tubelet grid in time: 32 frames in tubelets of 2 make 16 slices. TokenLearner learns its
tokens in every slice by itself.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed, to_2tuple
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenlearner.errors import InputError

TubeletGrid = tuple[int, int, int]


class TubeletEmbed(nn.Module):
    """Clips (b, c, t, h, w) to one embedding per tubelet: (b, n, d), or (b, slices, h, w, d) for ``output_fmt="NHWC"``.

    ``grid_size`` is (slices, h, w). The other arguments are those of timm's PatchEmbed, whose place this takes.

    Raises:
        InputError: A size that the tubelets don't divide, here or in a call; in a call also another size than
            the model's where ``strict_img_size``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_frames: int = 32,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 768,
        *,
        bias: bool = True,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dynamic_img_pad:
            raise InputError("clips are not padded to whole tubelets: give sizes that the tubelets divide")
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.tubelet_size = tubelet_size
        if min(*self.patch_size, tubelet_size) < 1:
            raise InputError(f"a tubelet of {_times(self.tubelet)} (frames, height, width) is none")
        self.strict_img_size = strict_img_size
        self.flatten = output_fmt is None
        self.dynamic_img_pad = False
        self.set_input_size(img_size, num_frames=num_frames)
        self.proj = nn.Conv3d(in_chans, embed_dim, self.tubelet, self.tubelet, bias=bias, device=device, dtype=dtype)
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()

    @property
    def tubelet(self) -> TubeletGrid:
        """Frames, height and width of one."""
        return self.tubelet_size, *self.patch_size

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, *, num_frames: int | None = None) -> None:
        height, width = self.img_size if img_size is None else to_2tuple(img_size)
        frames = self.num_frames if num_frames is None else num_frames
        self.grid_size = self.dynamic_feat_size((frames, height, width))
        self.img_size: tuple[int, int] = (height, width)
        self.num_frames: int = frames
        self.num_patches = math.prod(self.grid_size)

    def feat_ratio(self) -> int:
        return max(self.patch_size)

    def dynamic_feat_size(self, size: tuple[int, int, int]) -> TubeletGrid:
        """The grid (slices, h, w) of a clip of ``size`` (frames, height, width)."""
        if min(size) < 1 or any(side % step for side, step in zip(size, self.tubelet)):
            raise InputError(
                f"clips of {_times(size)} (frames, height, width) don't divide into tubelets of {_times(self.tubelet)}"
            )
        slices, h, w = (side // step for side, step in zip(size, self.tubelet))
        return slices, h, w

    def forward(self, x: Float[Tensor, "b c t height width"]) -> Tensor:
        if x.ndim != 5:
            raise InputError(f"the model takes clips as (b, c, t, h, w), and got shape {tuple(x.shape)}")
        if x.shape[1] != self.proj.in_channels:
            raise InputError(f"the model takes {self.proj.in_channels} channels, and got shape {tuple(x.shape)}")
        frames, height, width = x.shape[2:]
        size, own = (frames, height, width), (self.num_frames, *self.img_size)
        if self.strict_img_size and size != own:
            raise InputError(
                f"the model takes clips of {_times(own)} (frames, height, width), and got {_times(size)}; "
                "set_input_size() or dynamic_img_size=True changes that"
            )
        self.dynamic_feat_size(size)
        X = self.norm(rearrange(self.proj(x), "b d t h w -> b t h w d"))
        return X.flatten(1, 3) if self.flatten else X


class ViViT(VisionTransformer):
    """Joint space-time ViViT over tubelets of ``tubelet_size`` frames.

    By default as the official models: no class token, norm, then the mean over all tokens, then the head. With
    ``class_token=True`` the head reads that token.

    Args:
        img_size, patch_size: Of one frame, as in timm.
        num_frames: Frames of a clip.
        tubelet_size: Frames of a tubelet.
        class_token, global_pool, fc_norm: As in timm; ``global_pool`` is ``"token"`` with a class token and ``"avg"``
            without, unless given.
        dynamic_img_size: Takes clips of any length and size that the tubelets divide; the position embedding is
            interpolated to each.
        arguments: VisionTransformer's own.

    Raises:
        InputError: A size that the tubelets don't divide, or a pooling without its token.
    """

    takes_clips = True
    """Told apart by this from models of images, without importing the class."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        num_frames: int = 32,
        tubelet_size: int = 2,
        *,
        class_token: bool = False,
        global_pool: str | None = None,
        fc_norm: bool | None = False,
        **arguments: Any,
    ) -> None:
        pool: Any = global_pool if global_pool is not None else "token" if class_token else "avg"
        if pool == "token" and not class_token:
            raise InputError("global_pool='token' needs class_token=True")
        if "embed_layer" in arguments:
            raise InputError("ViViT embeds tubelets, so there is no embed_layer to choose")
        super().__init__(
            img_size,
            patch_size,
            class_token=class_token,
            global_pool=pool,
            fc_norm=fc_norm,
            embed_layer=functools.partial(TubeletEmbed, num_frames=num_frames, tubelet_size=tubelet_size),
            **arguments,
        )

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return self.patch_embed.img_size

    @property
    def num_frames(self) -> int:
        """Frames of a clip."""
        return self.patch_embed.num_frames

    @property
    def tubelet_size(self) -> int:
        return self.patch_embed.tubelet_size

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
        num_frames: int | None = None,
    ) -> None:
        """Changes the size of clips, in place; the position embedding is interpolated to it.

        Raises:
            InputError: The tubelets don't divide it, or another ``patch_size``, which would need other weights.
        """
        embed = self.patch_embed
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size:
            raise InputError(f"patch_size stays {_times(embed.patch_size)}: build another model for other tubelets")
        old = embed.grid_size
        embed.set_input_size(img_size, num_frames=num_frames)
        if (positions := self._positions(old, embed.grid_size)) is not None and self.pos_embed is not None:
            self.pos_embed = nn.Parameter(positions.detach(), self.pos_embed.requires_grad)
        noted = getattr(self, "_model_args", None)  # by timm, when it created the model
        if noted is not None:
            self._model_args = {**noted, "img_size": embed.img_size, "num_frames": embed.num_frames}

    def _positions(self, old: TubeletGrid, new: TubeletGrid) -> Float[Tensor, "1 n d"] | None:
        """The position embedding at another grid; the class token's entry stays."""
        if self.pos_embed is None or old == new:
            return self.pos_embed
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        tokens, positions = self.pos_embed[:, :prefix], self.pos_embed[:, prefix:]
        return torch.cat([tokens, resample_positions(positions, old, new)], dim=1)

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = self.patch_embed.grid_size
        if x.ndim == 5:  # of any size: flattened after its grid was seen
            # Compiled once for each size: PyTorch 2.13 can't compile the interpolation's gradient for sizes left open.
            t, h, w = (operator.index(side) for side in x.shape[1:4])
            grid, x = (t, h, w), x.flatten(1, 3)
        positions = self._positions(self.patch_embed.grid_size, grid)
        tokens = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        if positions is not None and self.no_embed_class:
            x = x + positions
        x = torch.cat([*tokens, x], dim=1)
        if positions is not None and not self.no_embed_class:
            x = x + positions
        return self.pos_drop(x)

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c t height width"],
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As in timm; ``"NCHW"`` is (b, d, slices, h, w) here, and ``"NLC"`` is (b, n, d).

        Raises:
            InputError: Another ``output_fmt``, a dictionary asked for, or a mask.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt is 'NCHW' or 'NLC', not {output_fmt!r}")
        if output_dict or is_causal or attn_mask is not None:
            raise InputError("forward_intermediates of clips takes no output_dict, attn_mask or is_causal")
        taken, last = feature_take_indices(len(self.blocks), indices)
        slices, h, w = self.patch_embed.dynamic_feat_size(tuple(x.shape[2:]))
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        found = []
        for i, block in enumerate([*self.blocks][: last + 1 if stop_early else None]):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            if i in taken:
                found.append(self.norm(x) if norm else x)
        prefixes = [y[:, : self.num_prefix_tokens] for y in found]
        found = [y[:, self.num_prefix_tokens :] for y in found]
        if output_fmt == "NCHW":
            found = [rearrange(y, "b (t h w) d -> b d t h w", t=slices, h=h, w=w).contiguous() for y in found]
        intermediates = list(zip(found, prefixes)) if return_prefix_tokens and self.num_prefix_tokens else found
        return intermediates if intermediates_only else (self.norm(x), intermediates)


def resample_positions(positions: Float[Tensor, "1 n d"], old: TubeletGrid, new: TubeletGrid) -> Float[Tensor, "1 m d"]:
    """Positions of the grid ``old`` (slices, h, w) interpolated to ``new``.

    Over space as timm does for images (bicubic, antialiased), then over time on a straight line between slices; with
    the same positions in every slice, time changes nothing.
    """
    if old == new:
        return positions
    P = rearrange(positions.float(), "1 (t h w) d -> t d h w", t=old[0], h=old[1], w=old[2])
    if old[1:] != new[1:]:
        P = F.interpolate(P, size=new[1:], mode="bicubic", antialias=True)
    if old[0] != new[0]:
        lines = F.interpolate(rearrange(P, "t d h w -> (h w) d t"), size=new[0], mode="linear")
        P = rearrange(lines, "(h w) d t -> t d h w", h=new[1])
    return rearrange(P, "t d h w -> 1 (t h w) d").to(positions.dtype)


def sincos_pos_embed(grid: TubeletGrid, width: int) -> Float[Tensor, "1 n d"]:
    """Position embeddings for a grid of (slices, h, w): sines and cosines of the place, plus those of the slice; of a
    single slice the place's alone.
    """
    where = build_sincos2d_pos_embed(list(grid[1:]), width)
    if grid[0] == 1:
        return where[None]
    rates = torch.exp(torch.arange(0, width, 2) / width * -math.log(100.0))
    angles = torch.arange(grid[0])[:, None] * rates
    when = torch.cat([angles.sin(), angles.cos()], dim=1)
    return rearrange(when[:, None] + where, "t n d -> 1 (t n) d")


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))
