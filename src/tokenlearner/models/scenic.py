"""Official parameters: what Scenic's TokenLearner ViT was trained to, as a model of this package.

Every size is read off the arrays. Scenic's ViT is timm's ``VisionTransformer`` under other names, with LayerNorm's
ε = 1e-6 and the tanh form of GELU (Flax's defaults), no class token, and the mean over tokens after the last norm. Its
video model is our ``ViViT`` in the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import EinopsError, rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokenlearner.core.alpha import LAYER_NORM_EPS, Grid
from tokenlearner.core.learner import Kind
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert
from tokenlearner.insertion.spec import resolve_at
from tokenlearner.models.flax_files import read_parameters
from tokenlearner.models.vivit import ViViT
from tokenlearner.models.weights import some

Arrays = Mapping[str, Tensor]

_LEARNERS: dict[str, Kind] = {"TokenLearnerModule": "conv", "TokenLearnerModuleV11": "mlp"}  # v1.0 and v1.1
_ATTENTION = "MultiHeadDotProductAttention_0"


def load_scenic(
    source: Mapping[str, Any] | str | Path, *, at: int | float | None = None, grid: Grid | None = None
) -> nn.Module:
    """Builds the model whose Flax parameters ``source`` holds; in eval mode, on the CPU, in float32.

    It takes images as (b, c, h, w), a video model clips as (b, c, t, h, w), and can be saved, loaded and trained like
    any other. Parameters don't say how pixels were scaled: give :func:`tokenlearner.save` a ``preprocessing``. A ViT
    without TokenLearner loads as well.

    Args:
        source: A flat mapping from names such as ``Transformer/encoderblock_0/LayerNorm_0/scale`` to arrays, nested
            dictionaries, or the path of an ``.npz`` or a Flax msgpack file. Names may start with ``params/``.
        at: Where the TokenLearner is, as in :func:`tokenlearner.insert`. Needed without a TokenFuser; with one, the
            number of modules tells.
        grid: (h, w) of the position embedding where it is not square. The official v1.0 takes every input for a
            square; here it sees the grid as it is. Needed for a video model: (h, w) of one slice, since the number of
            positions does not tell time from space.

    Raises:
        InputError: A parameter is missing, unexpected or of a shape that does not fit, or belongs to a model with a
            class token; or ``at`` or ``grid`` is needed, or contradicts the parameters.
    """
    arrays = read_parameters(source)
    names = _Names.of(arrays)
    table = [*_entries(names, at=0)]  # the official names don't depend on `at`
    _refuse_others(arrays, [name for entry in table for name in entry.official])

    index = _resolve(names, at)
    model = _build(arrays, names, index, grid)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    state = {}
    for entry in _entries(names, index):
        state[entry.ours] = value = entry.convert([arrays[name] for name in entry.official], entry.official)
        if value.shape != shapes[entry.ours]:
            raise InputError(
                f"{' and '.join(entry.official)} make {tuple(value.shape)}, and the model that the other parameters "
                f"describe needs {shapes[entry.ours]}"
            )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


@dataclass(frozen=True)
class _Names:
    """What the names of the parameters alone tell, and whether there is time in them."""

    layers: int
    learners: int
    fusers: int
    learner: str = ""
    """Name of the TokenLearner's class."""
    video: bool = False
    """Whether the patches are tubelets. Told by a shape, but as decisive as a name."""

    @classmethod
    def of(cls, arrays: Arrays) -> _Names:
        if "cls" in arrays:
            raise InputError(
                "the parameters have a class token (cls), and TokenLearner's official models end in a mean"
            )
        found = [name for name in _LEARNERS if _count(arrays, name)]
        if len(found) > 1:
            raise InputError(f"the parameters have both {' and '.join(found)}, and a model has one of them")
        learner = found[0] if found else ""
        counts = _count(arrays, "encoderblock"), _count(arrays, learner) if learner else 0, _count(arrays, "TokenFuser")
        kernel = arrays.get("embedding/kernel")
        return cls(*counts, learner, video=kernel is not None and kernel.ndim == 5)


@dataclass(frozen=True)
class _Entry:
    """One parameter of ours, and of which official ones it is made."""

    ours: str
    official: tuple[str, ...]
    make: Callable[..., Tensor]

    def convert(self, values: list[Tensor], names: tuple[str, ...]) -> Tensor:
        try:
            return self.make(*values).contiguous()
        except (EinopsError, RuntimeError):
            shapes = ", ".join(str(tuple(value.shape)) for value in values)
            raise InputError(f"{' and '.join(names)}: can't be of shape {shapes}") from None


def _entries(names: _Names, at: int) -> Iterator[_Entry]:
    def single(ours: str, official: str, make: Callable[..., Tensor] = lambda x: x) -> _Entry:
        return _Entry(ours, (official,), make)

    def norm(ours: str, official: str) -> list[_Entry]:
        return [single(f"{ours}.weight", f"{official}/scale"), single(f"{ours}.bias", f"{official}/bias")]

    def dense(ours: str, official: str) -> list[_Entry]:
        return [
            single(f"{ours}.weight", f"{official}/kernel", lambda W: rearrange(W, "i o -> o i")),
            single(f"{ours}.bias", f"{official}/bias"),
        ]

    def conv(ours: str, official: str, axes: str = "h w") -> _Entry:
        return single(f"{ours}.weight", f"{official}/kernel", lambda W: rearrange(W, f"{axes} i o -> o i {axes}"))

    yield conv("patch_embed.proj", "embedding", "t h w" if names.video else "h w")
    yield single("patch_embed.proj.bias", "embedding/bias")
    yield single("pos_embed", "Transformer/posembed_input/pos_embedding")
    for i in range(names.layers):
        ours, official = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        yield from norm(f"{ours}.norm1", f"{official}/LayerNorm_0")
        yield from _attention(f"{ours}.attn", f"{official}/{_ATTENTION}")
        yield from norm(f"{ours}.norm2", f"{official}/LayerNorm_1")
        for j in (0, 1):
            yield from dense(f"{ours}.mlp.fc{j + 1}", f"{official}/MlpBlock_0/Dense_{j}")
    for i in range(names.learners):
        ours, official = f"blocks.{at + i}.token_learner.alpha", f"Transformer/{names.learner}_{i}"
        yield from norm(f"{ours}.norm", f"{official}/LayerNorm_0")
        if _LEARNERS[names.learner] == "conv":
            yield from (conv(f"{ours}.convs.{j}", f"{official}/Conv_{j}") for j in range(4))
        else:
            for j in (0, 1):
                yield from dense(f"{ours}.fc{j + 1}", f"{official}/token_masking/Dense_{j}")
    for i in range(names.fusers):
        ours, official = f"blocks.{at + i}.token_fuser", f"Transformer/TokenFuser_{i}"
        yield from norm(f"{ours}.norm1", f"{official}/fuser_mix_norm1")
        yield from dense(f"{ours}.mix", f"{official}/Dense_0")
        yield from norm(f"{ours}.norm2", f"{official}/fuser_mix_norm2")
        yield from norm(f"{ours}.beta.norm", f"{official}/LayerNorm_0")
        for j in (0, 1):
            yield from dense(f"{ours}.beta.fc{j + 1}", f"{official}/token_masking/Dense_{j}")
    yield from norm("norm", "Transformer/encoder_norm")
    yield from dense("head", "output_projection")


def _attention(ours: str, official: str) -> list[_Entry]:
    """Flax keeps queries, keys and values apart, each with its heads on an axis; timm has them in one matrix."""

    def together(part: str, pattern: str) -> _Entry:
        names = tuple(f"{official}/{which}/{part}" for which in ("query", "key", "value"))
        return _Entry(
            f"{ours}.qkv.{'weight' if part == 'kernel' else 'bias'}",
            names,
            lambda *qkv: rearrange(torch.stack(qkv), pattern),
        )

    return [
        together("kernel", "qkv d heads c -> (qkv heads c) d"),
        together("bias", "qkv heads c -> (qkv heads c)"),
        _Entry(f"{ours}.proj.weight", (f"{official}/out/kernel",), lambda W: rearrange(W, "heads c d -> d (heads c)")),
        _Entry(f"{ours}.proj.bias", (f"{official}/out/bias",), lambda b: b),
    ]


def _refuse_others(arrays: Arrays, expected: list[str]) -> None:
    missing, unexpected = sorted(set(expected) - arrays.keys()), sorted(arrays.keys() - set(expected))
    problems = [f"{some(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
    problems += [f"{some(unexpected)} {'is' if len(unexpected) == 1 else 'are'} not expected"] if unexpected else []
    if problems:
        raise InputError("these are not the parameters of an official model: " + "; ".join(problems))


def _resolve(names: _Names, at: int | float | None) -> int:
    """The layer index the TokenLearner goes to."""
    if not names.layers:
        raise InputError("the parameters have no layers (Transformer/encoderblock_0)")
    if names.fusers > names.layers or (names.learners != names.fusers and (names.fusers or names.learners > 1)):
        raise InputError(
            f"there are {names.layers} layers, {names.learners} TokenLearners and {names.fusers} TokenFusers, and a "
            "model has one learner, or a learner and a fuser in each of its last layers"
        )
    if not names.learners:
        if at is not None:
            raise InputError(f"at={at} places a TokenLearner, and these parameters have none")
        return 0
    if at is None and not names.fusers:
        raise InputError(
            f"one {names.learner} does not tell its layer: give at=, from 0 to {names.layers - 1} (the paper has it at "
            f"{names.layers // 2} or {names.layers * 3 // 4})"
        )
    told = names.layers - names.fusers
    try:
        index = told if at is None else resolve_at(at, names.layers, names.layers - 1)
    except ValueError as error:
        raise InputError(str(error)) from error
    if names.fusers and index != told:
        raise InputError(
            f"at={at}, but of {names.layers} layers the last {names.fusers} have a TokenFuser: at is {told}"
        )
    if index == names.layers:
        raise InputError(f"at={at} is after the last layer, where the official code puts no TokenLearner")
    return index


def _build(arrays: Arrays, names: _Names, at: int, grid: Grid | None) -> nn.Module:
    """The model of these sizes without numbers."""

    def size(name: str, axis: int, axes: int) -> int:
        if arrays[name].ndim != axes:
            raise InputError(f"{name} has shape {tuple(arrays[name].shape)}, and official ones have {axes} axes")
        return arrays[name].shape[axis]

    axes = 5 if names.video else 4
    *tubelet, height, width_of_patch, channels, width = (size("embedding/kernel", i, axes) for i in range(axes))
    heads = size(f"Transformer/encoderblock_0/{_ATTENTION}/query/kernel", 1, 3)
    hidden = size("Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", 1, 2)
    if width % heads:
        raise InputError(f"{heads} heads don't divide the width {width}")
    slices, h, w = _grid(size("Transformer/posembed_input/pos_embedding", 1, 3), grid, names.video)
    frames = tubelet[0] if names.video else 1
    host = partial(ViViT, num_frames=slices * frames, tubelet_size=frames) if names.video else VisionTransformer
    with torch.device("meta"):
        model = host(
            img_size=(h * height, w * width_of_patch),
            patch_size=(height, width_of_patch),
            in_chans=channels,
            num_classes=size("output_projection/bias", 0, 1),
            embed_dim=width,
            depth=names.layers,
            num_heads=heads,
            mlp_ratio=hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            act_layer="gelu_tanh",
        )
        if not names.learners:
            return model
        first = f"Transformer/{names.learner}_0"
        if _LEARNERS[names.learner] == "mlp":
            tokens = size(f"{first}/token_masking/Dense_1/kernel", 1, 2)
        else:
            tokens = size(f"{first}/Conv_3/kernel", 3, 4)
            first = "Transformer/TokenFuser_0"  # v1.0 has no MLP of its own
        width_of_mlp = f"{first}/token_masking/Dense_0/kernel"
        return insert(
            model,
            tokens,
            at,
            _LEARNERS[names.learner],
            "fuser" if names.fusers else None,
            hidden_dim=size(width_of_mlp, 1, 2) if width_of_mlp in arrays else 64,
        )


def _grid(count: int, given: Grid | None, video: bool) -> tuple[int, int, int]:
    """Slices, h and w of a position embedding of ``count`` entries; an image is one slice."""
    found = f"the position embedding has {count} entries"
    if given is not None:
        slices = count // math.prod(given) if len(given) == 2 and min(given) > 0 else 0
        if math.prod((slices, *given)) != count or slices < 1 or (slices > 1 and not video):
            raise InputError(f"{found}, and grid={tuple(given)} is not their (h, w){' in one slice' if video else ''}")
        return slices, given[0], given[1]
    if video:
        raise InputError(f"{found} over time and space: give grid=(h, w) of one slice")
    root = math.isqrt(count)
    if root * root != count:
        raise InputError(f"{found}, which is no square: give grid=(h, w)")
    return 1, root, root


def _count(arrays: Arrays, module: str) -> int:
    """How many of a numbered module there are, by the highest number."""
    pattern = re.compile(rf"Transformer/{module}_(\d+)/")
    return max((int(match[1]) + 1 for name in arrays if (match := pattern.match(name))), default=0)
