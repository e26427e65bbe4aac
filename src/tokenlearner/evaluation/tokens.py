"""The S tokens of every picture, frame or slice, in place of what a head would make of them.

There are two places to take them from. ``"last"``, the default, is after the last layer and the norm that follows it:
what a head, or a language model that is to see, reads. ``"learned"`` is what the TokenLearner puts out: the layers
after it are not run, so they cost nothing, and have added nothing. Prefix tokens (cls, registers) are in neither.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from tokenlearner.data.decode import DamagedImage
from tokenlearner.data.images import Damaged, OnError
from tokenlearner.data.streaming import Frame, Pictures, StreamSource, read_frames
from tokenlearner.data.token_files import TokenRows
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import needed_preprocessing
from tokenlearner.evaluation.clips import clip_transform, takes_clips
from tokenlearner.insertion.hosts import host_of
from tokenlearner.insertion.insert import insertion_of, learners
from tokenlearner.insertion.layers import is_compiled, split_prefix, tokens_first
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.insertion.spec import Insertion
from tokenlearner.inspection.speed import usable_device

Layer = Literal["learned", "last"]
Precision = Literal["float32", "bf16"]


class _Reached(Exception):  # noqa: N818 - it is no error
    """The layer whose tokens are wanted was reached, so nothing after it need run."""


def tokens_of(
    model: nn.Module, x: Float[Tensor, "b c *frames height width"], layer: Layer = "last"
) -> Float[Tensor, "b *slices s d"]:
    """The S tokens of each image, or of each slice (with ``over="window"``, each window of slices) of each clip.

    The model runs as far as the layer and no further, in the mode it is in; gradients flow.

    Args:
        model: With a TokenLearner that was inserted without a fuser: a model of timm, of transformers (with the
            wrapper that opens its folders), or a ViViT.
        x: Images or clips, prepared as the model takes them.
        layer: ``"last"``: after the last layer and, where the host has one for all its tokens, the norm after it (CaiT,
            CLIP of transformers and hosts that norm what they have pooled have none). ``"learned"``: as the
            TokenLearner puts them out.

    Raises:
        InputError: The model has no such tokens, or ``layer`` is neither.
    """
    spec = inserted_alone(model)
    if layer not in ("learned", "last"):
        raise InputError(f"layer is 'learned' or 'last', not {layer!r}")
    host = host_of(model)
    layers, norm = host.layers(), host.after_layers()
    found: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(tokens_first(args, kwargs)[0][0])
        raise _Reached

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    if layer == "learned":  # after the insertion's own hook, so what the layer is given are the tokens
        carrier = layers[spec.at] if spec.at < len(layers) else norm
        handle = carrier.register_forward_pre_hook(keep_input, with_kwargs=True)
    else:
        last = norm if any(module is norm for module in model.modules()) else layers[-1]
        handle = last.register_forward_hook(keep_output)
    try:
        model(x)
    except _Reached:
        pass
    finally:
        handle.remove()
    tokens = split_prefix(found[0], host.num_prefix_tokens)[1]
    return tokens if host.slices() is None else rearrange(tokens, "b (t s) d -> b t s d", s=spec.tokens)


def inserted_alone(model: nn.Module) -> Insertion:
    """What is inserted in ``model``, whose later layers all run on its tokens.

    Raises:
        InputError: No TokenLearner, or one whose tokens do not reach the last layer; or the model is compiled.
    """
    if any(is_compiled(module) for module in model.modules()):
        raise InputError("the model is compiled and would not stop at a layer: give it as it was before")
    spec, name = insertion_of(model), type(getattr(model, "model", model)).__name__
    if spec is None and learners(model):
        raise InputError(
            f"the TokenLearners of {name} are inside blocks that put the tokens back on the grid, so there are no S "
            "tokens in the end: give a model into which a TokenLearner was inserted"
        )
    if spec is None:
        raise InputError(f"{name} has no TokenLearner: give a model with one, such as insert(model, num_tokens=8)")
    if spec.fuser is not None:
        raise InputError(
            f"{name} has {spec.describe()}: a fuser puts the tokens back on the grid, so there are no S tokens in the "
            "end; give a model into which a TokenLearner was inserted without one"
        )
    return spec


class _Inputs(NamedTuple):
    """What the model is given at once, and the frames it was made of, without their pixels."""

    x: Tensor
    frames: list[Frame]
    damaged: list[Damaged]


@torch.inference_mode()
def stream_tokens(
    model: nn.Module,
    source: StreamSource,
    *,
    layer: Layer = "last",
    fps: float | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    precision: Precision = "float32",
    on_error: OnError = "skip",
) -> Iterator[TokenRows]:
    """The tokens of ``source`` in its order, a batch at a time, however long it is.

    A model of images sees each frame or picture by itself: a row each. A model of clips sees windows of its own length
    that follow each other without a gap; each slice of a window is a row (with ``over="window"``, several slices), at
    the time of its first frame. The last window is filled up with its last frame, and slices of nothing else are left
    out. The model is moved to ``device``, in eval mode, and stays there.

    Args:
        model: As :func:`tokens_of` takes it, with its preprocessing.
        source: A video file, a folder of its frames, or pictures, as :func:`find_sources` finds them.
        layer: See :func:`tokens_of`.
        fps: Frames a second that are taken. None takes all, or of clips as many as the model was trained with.
        batch_size: Images, or frames of clips (but whole clips), that the model is given at once.
        device: As :func:`usable_device` takes it.
        precision: ``"bf16"`` computes under autocast. Tokens are float32 either way.
        on_error: Whether a picture that can't be decoded is left out and named in the rows, or raises. A frame of a
            model of clips always does.

    Raises:
        InputError: A model without such tokens or preprocessing, options out of range, pictures that are no video for a
            model of clips; as ``DamagedImage`` or ``DamagedVideo``, what can't be decoded.
    """
    check_streaming(batch_size, precision)
    inserted_alone(model)
    preprocessing, device, fps = needed_preprocessing(model), usable_device(device), rate_of(model, source, fps)
    model.to(device).eval()
    if takes_clips(model):
        inputs = _stacked(_windows(source, preprocessing, fps), max(1, batch_size // (preprocessing.frames or 1)))
    else:
        inputs = _stacked(_pictures(source, preprocessing, fps, on_error), batch_size)
    for x, frames, damaged in inputs:
        if not frames:
            yield TokenRows(np.empty((0, 0, 0), np.float32), (), (), (), tuple(damaged), 0.0)
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = tokens_of(model, x.to(device), layer)
        rows = rearrange(tokens, "b t s d -> (b t) s d") if tokens.ndim == 4 else tokens
        first = frames[:: x.shape[0] * x.shape[2] // len(rows)] if tokens.ndim == 4 else frames
        yield TokenRows(
            rows[: len(first)].float().cpu().numpy(),
            tuple(frame.seconds for frame in first),
            tuple(frame.name for frame in first),
            tuple(frame.number for frame in first),
            tuple(damaged),
            frames[-1].share,
        )


def check_streaming(batch_size: int, precision: str) -> None:
    """``InputError`` where :func:`stream_tokens` can't run so."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}")
    if precision not in ("float32", "bf16"):
        raise InputError(f"precision is 'float32' or 'bf16', not {precision!r}")


def rate_of(model: nn.Module, source: StreamSource, fps: float | None) -> float | None:
    """Frames a second that are taken of ``source`` where ``fps`` is asked for; None for all of them.

    Raises:
        InputError: It is not above 0, ``source`` has no times and needs some, or a model of clips does not say its
            rate.
    """
    clips = takes_clips(model)
    if fps is not None and not 0 < fps < math.inf:
        raise InputError(f"fps is {fps}: give the frames a second, above 0")
    if isinstance(source, Pictures) and (clips or fps is not None):
        wanted = "the model takes clips" if clips else f"{fps:g} a second of them are wanted"
        raise InputError(
            f"{source} holds pictures, and {wanted}: say with --frame-fps how many of them are a second of a video"
        )
    if not clips:
        return fps
    preprocessing = needed_preprocessing(model)
    rate = preprocessing.fps if fps is None else fps
    if rate is None or preprocessing.frames is None:
        raise InputError(
            "the model does not say how many frames its clips have, and how many a second: save it again with "
            "preprocessing=Preprocessing(..., frames=..., fps=...), or give --fps where only the latter is missing"
        )
    return rate


def _pictures(
    source: StreamSource, preprocessing: Preprocessing, fps: float | None, on_error: OnError
) -> Iterator[tuple[Tensor, list[Frame]] | Damaged]:
    """Every frame as a model of images takes it."""
    prepare = preprocessing.transform()
    for frame in read_frames(source, fps):
        if not isinstance(frame, Damaged):
            yield prepare(Image.fromarray(frame.pixels)), [_without_pixels(frame)]
        elif on_error == "raise":
            raise DamagedImage(frame.path, frame.reason)
        else:
            yield frame


def _windows(
    source: StreamSource, preprocessing: Preprocessing, fps: float | None
) -> Iterator[tuple[Tensor, list[Frame]]]:
    """Clips as a model of clips takes them, one after the other, the last one filled up."""
    transform, length = clip_transform(preprocessing), preprocessing.frames or 1
    frames = _sound(read_frames(source, fps, short_side=transform.short_side))
    while window := list(islice(frames, length)):
        pixels = [frame.pixels for frame in window]
        pixels += [pixels[-1]] * (length - len(pixels))
        yield transform(torch.from_numpy(np.stack(pixels))), [_without_pixels(frame) for frame in window]


def _sound(frames: Iterator[Frame | Damaged]) -> Iterator[Frame]:
    for frame in frames:
        if isinstance(frame, Damaged):
            raise DamagedImage(frame.path, frame.reason)
        yield frame


def _without_pixels(frame: Frame) -> Frame:
    return frame._replace(pixels=np.empty(0, np.uint8))


def _stacked(inputs: Iterator[tuple[Tensor, list[Frame]] | Damaged], number: int) -> Iterator[_Inputs]:
    """``number`` inputs at a time, damaged ones among them."""
    while some := list(islice(inputs, number)):
        sound = [entry for entry in some if not isinstance(entry, Damaged)]
        yield _Inputs(
            torch.stack([x for x, _ in sound]) if sound else torch.empty(0),
            [frame for _, frames in sound for frame in frames],
            [entry for entry in some if isinstance(entry, Damaged)],
        )
