"""Whether an exported file computes what the model does: differences on noise and on pictures, and the same top-1."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from tokenlearner.errors import InputError
from tokenlearner.insertion.saving import Preprocessing

BATCHES = (1, 2, 5)  # of noise: one, the number traced with, and one that neither divides
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}  # largest difference as a share of the largest output
CLOSE = {"fp32": 1e-6, "fp16": 8e-3}  # two outputs this near, some eight roundings, have no order
AGREEMENT = 0.99

STAND_INS = "crops of scikit-learn's two photos, and its handwritten digits"
_STAND_IN_PICTURES, _STAND_IN_CLIPS = 32, 4


@dataclass(frozen=True)
class Difference:
    """How far two functions' outputs are apart on the same ``inputs``."""

    inputs: int
    largest_absolute: float
    scale: float
    """The largest output of the first, by size."""
    largest_relative: float
    """``largest_absolute`` as a share of ``scale``."""
    agreeing: int
    """Inputs with the same top-1, of the ``counted``."""
    counted: int
    """Inputs whose two largest outputs are apart; 0 where the outputs are no classes."""

    @property
    def agreement(self) -> float | None:
        return self.agreeing / self.counted if self.counted else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "top1_agreement": self.agreement}


@torch.no_grad()
def difference(
    one: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    batches: Iterable[Tensor],
    *,
    close: float,
    classes: bool,
) -> Difference:
    """Runs both on all ``batches`` (b, …).

    Args:
        one: The reference.
        other: What is compared with it.
        batches: The inputs; there is at least one.
        close: Inputs whose two largest outputs of ``one`` differ by this share of the scale or less don't count for
            top-1: rounding may swap them.
        classes: Whether outputs are of classes, so that there is a top-1.
    """
    expected, found = [], []
    for x in batches:
        expected.append(one(x))
        found.append(other(x))
    Y, other_Y = torch.cat(expected), torch.cat(found)
    if Y.shape != other_Y.shape:
        raise InputError(f"the exported file gives outputs of shape {tuple(other_Y.shape)}, the model {tuple(Y.shape)}")
    scale, apart = float(Y.abs().max()), float((Y - other_Y).abs().max())
    counted = agreeing = 0
    if classes and Y.ndim == 2 and Y.shape[1] > 1:
        first, second = Y.topk(2, dim=1).values.unbind(1)
        clear = first - second > close * scale
        counted = int(clear.sum())
        agreeing = int((Y.argmax(dim=1) == other_Y.argmax(dim=1))[clear].sum())
    relative = apart / scale if scale else math.inf if apart else 0.0
    return Difference(len(Y), apart, scale, relative, agreeing, counted)


def check_difference(found: Difference, precision: str, what: str, top1: bool) -> None:
    """Raises ``InputError`` where a file of that precision is further from the model than rounding takes it.

    Args:
        found: Of the file from the model.
        precision: ``"fp32"`` or ``"fp16"``.
        what: The inputs, in words.
        top1: Whether the share with the same top-1 is looked at too.
    """
    if not math.isfinite(found.scale):
        raise InputError(f"the model's own outputs on {what} are not finite, so no file can be compared with them")
    allowed, advice = TOLERANCE[precision], ": use precision='fp32'" if precision == "fp16" else ""
    if not found.largest_relative <= allowed:  # not-a-number is no small difference
        raise InputError(
            f"the exported file is off by {found.largest_absolute:.3g} on {what}, where the model's outputs reach "
            f"{found.scale:.3g}: {found.largest_relative:.2g} of that, and {precision} may have {allowed:g}; "
            f"it was not kept{advice}"
        )
    if top1 and found.agreement is not None and found.agreement < AGREEMENT:
        raise InputError(
            f"the exported file has the model's top-1 on {found.agreeing} of {found.counted} clear cases among {what}, "
            f"and {AGREEMENT:.0%} is asked for; it was not kept{advice}"
        )


def noise(shape: tuple[int, ...]) -> Iterator[Float[Tensor, "b c *t h w"]]:
    """Batches of standard normal inputs of ``shape`` (c, *t, h, w), the same each time."""
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        yield torch.randn(batch, *shape, generator=generator)


def stand_ins(preprocessing: Preprocessing, batch_size: int) -> Iterator[Float[Tensor, "b c *t h w"]]:
    """Prepared pictures, or clips panned over them, from what scikit-learn has on board; the same each time.

    Raises:
        InputError: The model takes neither one nor three channels.
    """
    prepare, frames = preprocessing.transform(), preprocessing.frames
    count, steps = (_STAND_IN_PICTURES, 1) if frames is None else (_STAND_IN_CLIPS, frames)
    batch = []
    for pictures in _pictures(count, steps):
        prepared = [prepare(picture) for picture in pictures]
        batch.append(prepared[0] if frames is None else torch.stack(prepared, dim=1))
        if len(batch) == batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _pictures(count: int, steps: int) -> Iterator[list[Image.Image]]:
    """``count`` times ``steps`` pictures: crops that move over a photo, and consecutive digits."""
    from sklearn.datasets import load_digits, load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    digits = [Image.fromarray((image * (255 / 16)).astype("uint8")).convert("RGB") for image in load_digits().images]
    draw = random.Random(0)
    for i in range(count):
        if i % 2:
            start = draw.randrange(len(digits) - steps)
            yield digits[start : start + steps]
            continue
        photo = photos[i // 2 % len(photos)]
        side = draw.randint(96, min(photo.size))
        top, across = draw.randint(0, photo.height - side), photo.width - side
        left = draw.randint(0, across)
        places = [left + (across - left) * step // steps for step in range(steps)]
        yield [photo.crop((place, top, place + side, top + side)) for place in places]
