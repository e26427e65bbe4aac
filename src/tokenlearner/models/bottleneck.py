"""The bottleneck transformer block of arXiv 2106.11297 and the space-time modules it was compared with.

A block is 1×1×1 expand → middle → 1×1×1 project with a residual around (an inverted bottleneck), and only the middle
differs: ``MODULES`` says what each of tables 11 and 12 is made of. Feature maps are (b, d, t, h, w) as convolutions
take them. Each part of a middle is followed by BatchNorm and ReLU, as BoTNet has it after its attention.

What the paper leaves open, read so that its printed cost comes out (:func:`module_rows` counts it):

* attention projects queries and keys 432 → 128 and values 432 → 432, and has no output projection and no positions;
* the fuser is the official one (LayerNorms, β an MLP 64 wide) with M over all S·T tokens of the clip, and the linear
  layer after the reshape acts on each token;
* the MLP-Mixer sees one token per frame, the frame's mean, mixes them over time and channels at their own width, and
  gives its output to every position: the printed 0.38 M and less than 0.1 GFLOPs leave room for no more positions.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from timm.layers import DropPath
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

from tokenlearner.core.alpha import Grid, RecomputeSafeBatchNorm3d
from tokenlearner.core.fuser import TokenFuser
from tokenlearner.core.learner import Kind, TokenLearner
from tokenlearner.core.vector import VectorAttention
from tokenlearner.errors import InputError
from tokenlearner.inspection.cost import Cost, cost
from tokenlearner.models.paper_row import paper_row

Clip = Float[Tensor, "b d t h w"]

KEY_DIM = 128

# Rows of tables 11 and 12: the parts of a middle, in order.
MODULES: Mapping[str, tuple[str, ...]] = {
    "Joint space-time MHSA": ("joint",),
    "Conv2D + Joint space-time MHSA": ("conv2d", "joint"),
    "TokenLearner": ("tokenlearner",),
    "Conv2D + TokenLearner": ("conv2d", "tokenlearner"),
    "Conv2D + Conv1D": ("conv2d", "conv1d"),
    "Conv2D + MLPMixer": ("conv2d", "mixer"),
    "Conv2D + Temporal transformer": ("conv2d", "temporal"),
    "Spatial + Temporal transformer": ("spatial", "temporal"),
    "Conv2D + Spatial + Temporal transformer": ("conv2d", "spatial", "temporal"),
    "SpatialT + TokenLearner": ("spatial", "tokenlearner"),
}

# What tables 11 and 12 print for each, at 64 frames of 8×8 and width 432: GFLOPs, two per multiply-add, and parameters
# in 10⁶; then table 10's whole models.
_PRINTED = {
    "Joint space-time MHSA": (22.0, 0.3),
    "Conv2D + Joint space-time MHSA": (35.8, 1.98),
    "TokenLearner": (3.4, 0.81),
    "Conv2D + TokenLearner": (17.2, 2.49),
    "Conv2D + Conv1D": (18.3, 2.24),
    "Conv2D + MLPMixer": (13.8, 2.06),
    "Conv2D + Temporal transformer": (16.5, 1.98),
    "Spatial + Temporal transformer": (5.5, 0.59),
    "Conv2D + Spatial + Temporal transformer": (19.2, 2.27),
    "SpatialT + TokenLearner": (6.2, 1.11),
}
_PRINTED_MODELS = {
    "Backbone X(2+1)D-M": (532, "Conv2D + Conv1D"),
    "disjoint space+time transformer": (493, "Spatial + Temporal transformer"),
    "TokenLearner": (487, "TokenLearner"),
}
_NOTES = {
    "joint": "multiply-adds alone: what is missing is what eight heads' softmax takes, at six operations per weight",
    "tokenlearner": (
        "α conv1, a linear layer per token, relation MLP 128→24→24 (the width is the one number fitted), M over "
        "the clip, β an MLP 64 wide; elementwise work of the vector attention, 0.105 GFLOPs, is not counted"
    ),
    "mixer": "the mixer sees one token per frame",
}
_MODEL_NOTE = "both layers of the head before pooling, three blocks of the last stage swapped"

# Which positions attend to each other.
_SEQUENCES = {
    "joint": "b d t h w -> b (t h w) d",
    "spatial": "b d t h w -> (b t) (h w) d",
    "temporal": "b d t h w -> (b h w) t d",
}


class Attention(nn.Module):
    """Multi-head self-attention with narrow queries and keys and no output projection. (b, n, d) → (b, n, d).

    Args:
        dim: Channels d, and width of the values.
        key_dim: Width of queries and keys, over all heads.
        num_heads: Heads; must divide both widths.
    """

    def __init__(self, dim: int, key_dim: int = KEY_DIM, num_heads: int = 8) -> None:
        super().__init__()
        if dim % num_heads or key_dim % num_heads:
            raise InputError(f"num_heads must divide dim and key_dim, and {num_heads} does not: {dim}, {key_dim}")
        self.num_heads = num_heads
        self.q = nn.Linear(dim, key_dim, bias=False)
        self.k = nn.Linear(dim, key_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        split = functools.partial(rearrange, pattern="b n (e c) -> b e n c", e=self.num_heads)
        out = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))
        return rearrange(out, "b e n c -> b n (e c)")


class SpaceTimeAttention(nn.Module):
    """Attention over a clip: ``over`` is ``"joint"`` (all positions), ``"spatial"`` (a frame's) or ``"temporal"``."""

    def __init__(self, dim: int, over: str, key_dim: int = KEY_DIM, num_heads: int = 8) -> None:
        super().__init__()
        self.over = over
        self.attention = Attention(dim, key_dim, num_heads)

    def forward(self, x: Clip) -> Clip:
        there, back = _SEQUENCES[self.over].split(" -> ")
        t, h, w = x.shape[2:]
        out = self.attention(rearrange(x, f"{there} -> {back}"))
        return rearrange(out, f"{back} -> {there}", t=t, h=h, w=w)

    def extra_repr(self) -> str:
        return f"over={self.over!r}"


class TokenTransformer(nn.Module):
    """TokenLearner → linear → attention over the clip's S·T tokens → TokenFuser, which adds to the input.

    Args:
        dim: Channels d.
        num_frames: Frames T; M of the fuser is S·T × S·T, so clips of another length don't fit.
        num_tokens: Tokens S per frame.
        kind: TokenLearner's form of α, any of its seven.
        grid: (h, w), for ``kind="dense"`` only.
        attention: ``"vector"`` (the paper's) or ``"mhsa"``.
        key_dim: Width of queries and keys; with ``"vector"`` also of their relation.
        num_heads: Heads of ``"mhsa"``.
        num_weights: Weights per pair of tokens of ``"vector"``.
    """

    def __init__(
        self,
        dim: int,
        num_frames: int,
        num_tokens: int = 8,
        kind: Kind = "conv1",
        grid: Grid | None = None,
        attention: Literal["vector", "mhsa"] = "vector",
        key_dim: int = KEY_DIM,
        num_heads: int = 8,
        num_weights: int = 24,
    ) -> None:
        super().__init__()
        if attention not in ("vector", "mhsa"):
            raise InputError(f"attention is 'vector' or 'mhsa', not {attention!r}")
        self.learner = TokenLearner(dim, num_tokens, kind, grid)
        self.linear = nn.Linear(dim, dim)
        self.attention: nn.Module = (
            VectorAttention(dim, relation_dim=key_dim, num_weights=num_weights)
            if attention == "vector"
            else Attention(dim, key_dim, num_heads)
        )
        self.fuser = TokenFuser(dim, num_tokens, num_frames=num_frames)

    def forward(self, x: Clip) -> Clip:
        t = x.shape[2]
        if t != self.fuser.num_frames:
            raise InputError(f"built for clips of {self.fuser.num_frames} frames, and got {t} in {tuple(x.shape)}")
        X = rearrange(x, "b d t h w -> b t h w d")
        Z = rearrange(self.learner(X.flatten(0, 1)), "(b t) s d -> b (t s) d", t=t)
        out = self.fuser(self.attention(self.linear(Z)).to(X.dtype), X)
        return rearrange(out, "b t h w d -> b d t h w")


class FrameMixer(nn.Module):
    """MLP-Mixer over one token per frame, the frame's mean; every position of the frame adds the outcome."""

    def __init__(self, dim: int, num_frames: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.over_time = nn.Sequential(nn.Linear(num_frames, num_frames), nn.GELU(), nn.Linear(num_frames, num_frames))
        self.over_channels = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.num_frames = num_frames

    def forward(self, x: Clip) -> Clip:
        if x.shape[2] != self.num_frames:
            raise InputError(f"built for clips of {self.num_frames} frames, and got {x.shape[2]} in {tuple(x.shape)}")
        y = reduce(x, "b d t h w -> b t d", "mean")
        y = y + self.over_time(self.norm1(y).transpose(1, 2)).transpose(1, 2)
        y = y + self.over_channels(self.norm2(y))
        return x + rearrange(y, "b t d -> b d t 1 1")


class FrameBoT(nn.Module):
    """BoTNet's attention, within each frame: relative positions, all projections of the full width."""

    def __init__(self, dim: int, grid: Grid, num_heads: int = 4) -> None:
        super().__init__()
        self.attention = BottleneckAttn(dim, feat_size=grid, num_heads=num_heads)

    def forward(self, x: Clip) -> Clip:
        if tuple(x.shape[3:]) != (self.attention.pos_embed.height, self.attention.pos_embed.width):
            raise InputError(f"the relative positions are of another grid than {x.shape[3]}×{x.shape[4]}")
        out = self.attention(rearrange(x, "b d t h w -> (b t) d h w"))
        return rearrange(out, "(b t) d h w -> b d t h w", t=x.shape[2])


class Bottleneck(nn.Module):
    """1×1×1 expand (or narrow) → middle → 1×1×1 project, residual around, ReLU. (b, d, t, h, w).

    The last BatchNorm starts at zero, so that a new block is its shortcut. The shortcut is a strided 1×1×1 convolution
    where the shape changes.

    Args:
        in_dim, width, out_dim: Channels before, inside and after.
        middle: From ``width`` channels to as many.
        stride: The spatial stride that ``middle`` has.
        drop_path: Probability that a clip takes the shortcut alone, in training.
    """

    def __init__(
        self, in_dim: int, width: int, out_dim: int, middle: nn.Module, stride: int = 1, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.expand = conv_norm(in_dim, width, (1, 1, 1))
        self.middle = middle
        self.project = conv_norm(width, out_dim, (1, 1, 1), act=False, zero=True)
        changes = stride != 1 or in_dim != out_dim
        self.shortcut = conv_norm(in_dim, out_dim, (1, 1, 1), stride, act=False) if changes else nn.Identity()
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Clip) -> Clip:
        return F.relu(self.shortcut(x) + self.drop_path(self.project(self.middle(self.expand(x)))))


def middle(
    name: str,
    width: int = 432,
    *,
    num_frames: int = 64,
    stride: int = 1,
    key_dim: int = KEY_DIM,
    num_heads: int = 8,
    **options: Any,
) -> nn.Sequential:
    """The module of a row of tables 11 and 12, as it stands between expansion and projection.

    Args:
        name: A key of ``MODULES``.
        width: Channels it works on.
        num_frames: Frames of a clip; the mixer and TokenLearner's fuser have weights for each.
        stride: Spatial stride, of the Conv2D; modules that don't begin with one refuse it.
        key_dim, num_heads: Of all attention there is.
        options: More of TokenTransformer, for the modules that have a TokenLearner.

    Raises:
        InputError: No such module, or one that can't take the stride or the options.
    """
    if name not in MODULES:
        raise InputError(f"no module {name!r}; there are {', '.join(map(repr, MODULES))}")
    parts = MODULES[name]
    if stride != 1 and parts[0] != "conv2d":
        raise InputError(f"{name!r} has no convolution to take stride {stride}")
    if options and "tokenlearner" not in parts:
        raise InputError(f"{name!r} has no TokenLearner to take {', '.join(options)}")
    layers: list[nn.Module] = []
    for part in parts:
        if part == "conv2d":
            layers.append(conv_norm(width, width, (1, 3, 3), stride))
        elif part == "conv1d":
            layers.append(conv_norm(width, width, (3, 1, 1)))
        elif part == "tokenlearner":
            transformer = TokenTransformer(width, num_frames, key_dim=key_dim, num_heads=num_heads, **options)
            layers.append(_normed(transformer, width))
        elif part == "mixer":
            layers.append(_normed(FrameMixer(width, num_frames), width))
        else:
            layers.append(_normed(SpaceTimeAttention(width, part, key_dim, num_heads), width))
    return nn.Sequential(*layers)


def bottleneck(
    name: str,
    in_dim: int,
    width: int = 432,
    out_dim: int | None = None,
    *,
    stride: int = 1,
    drop_path: float = 0.0,
    **options: Any,
) -> Bottleneck:
    """The block around a module.

    Args:
        name: A key of ``MODULES``.
        in_dim, width, out_dim: Channels before, inside and after; after as before unless given.
        stride, drop_path: As :class:`Bottleneck` takes them.
        options: ``num_frames`` and whatever else :func:`middle` takes.
    """
    out_dim = in_dim if out_dim is None else out_dim
    return Bottleneck(in_dim, width, out_dim, middle(name, width, stride=stride, **options), stride, drop_path)


def bot_block(dim: int = 2048, width: int = 512, *, grid: Grid, num_heads: int = 4) -> Bottleneck:
    """BoTNet's block (arXiv 2101.11605), 2048 → 512 → 2048, on the frames of a clip with that grid."""
    return Bottleneck(dim, width, dim, _normed(FrameBoT(width, grid, num_heads), width))


def module_rows() -> list[dict[str, Any]]:
    """Every cost that tables 10 to 12 print, and the same counted here.

    Keys as in :func:`tokenlearner.models.paper.paper_rows`; ``unit`` is ``GFLOPs``, two per multiply-add, or
    ``M parameters``, and ``fits`` allows 5 % where there is an attention without TokenLearner and 2 % elsewhere.
    Norms, activations and softmax are not counted.
    """
    rows = []
    for name, (gflops, parameters) in _PRINTED.items():
        counted, parts, model = _count_module(name), MODULES[name], f"middle({name!r})"
        tolerance = 0.05 if {"joint", "spatial", "temporal"} & {*parts} and "tokenlearner" not in parts else 0.02
        note = "; ".join(_NOTES[part] for part in parts if part in _NOTES)
        table = "table11_12_modules_64_frames_two_flops_per_mac"
        rows.append(paper_row(table, name, "GFLOPs", gflops, counted.flops / 1e9, tolerance, model, note))
        rows.append(paper_row(table, name, "M parameters", parameters, counted.parameters / 1e6, tolerance, model))
    for name, (gflops, module) in _PRINTED_MODELS.items():
        flops, model = _count_model(module).flops / 1e9, f"X2Plus1D({module!r})"
        rows.append(paper_row("table10_avid", name, "GFLOPs", gflops, flops, 0.02, model, _MODEL_NOTE))
    return rows


@functools.cache
def _count_module(name: str) -> Cost:
    """At the size tables 11 and 12 are for, built without numbers."""
    with torch.device("meta"):
        return cost(middle(name), (432, 64, 8, 8))


@functools.cache
def _count_model(module: str) -> Cost:
    """At the size table 10 fits, built without numbers."""
    from tokenlearner.models.x2plus1d import X2Plus1D  # which is made of these blocks

    with torch.device("meta"):
        return cost(X2Plus1D(module), (3, 64, 256, 256))


def conv_norm(
    in_dim: int,
    out_dim: int,
    kernel: tuple[int, int, int],
    stride: int = 1,
    *,
    act: bool = True,
    zero: bool = False,
) -> nn.Sequential:
    """Convolution over (t, h, w), padded by half its kernel, with spatial stride; BatchNorm; ReLU if ``act``."""
    t, h, w = kernel
    conv = nn.Conv3d(in_dim, out_dim, kernel, (1, stride, stride), (t // 2, h // 2, w // 2), bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    norm = RecomputeSafeBatchNorm3d(out_dim)
    if zero:
        nn.init.zeros_(norm.weight)
    return nn.Sequential(conv, norm, *([nn.ReLU()] if act else []))


def _normed(part: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(part, RecomputeSafeBatchNorm3d(width), nn.ReLU())
