"""The application, and the options that several commands have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter, Token

from tokenlearner import __version__
from tokenlearner.data.listing import Listing

app = App(
    name="tokenlearner",
    help="Learn a few tokens from a feature map and run every later layer of a vision transformer on those.\n\n"
    "Example: `tokenlearner demo`",
    version=__version__,
    default_parameter=Parameter(negative_iterable=()),  # no --optimizer.empty-betas
    suppress_keyboard_interrupt=False,  # main says that it stopped
    help_format="markdown",
)


def input_shape(_: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """``3 224 224`` or ``3,224,224``; for clips four numbers."""
    numbers = [number for token in tokens for number in token.value.split(",")]
    if len(numbers) not in (3, 4) or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"--input-size requires 3 numbers, or 4 for clips, not {' '.join(numbers)}")
    return tuple(map(int, numbers))


RecipeFile = Annotated[
    Path | None, Parameter(name="--recipe", help="YAML or TOML file; options given here override it.")
]
FrameFps = Annotated[float | None, Parameter(help="Folders of pictures are videos of so many frames a second.")]
Listed = Annotated[Listing, Parameter(name="*", group="Videos")]
Views = Annotated[
    tuple[int, int], Parameter(help="Of a video: windows, and crops of each, whose outputs are averaged.")
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON document instead of a table.")]
OnError = Annotated[
    Literal["skip", "raise"], Parameter(help="Damaged files: name, count and skip them, or stop at the first.")
]
Kind = Literal["conv", "mlp", "conv1", "gate", "grid", "dense", "average"]
Fuser = Literal["fuser", "unpool", "reproject"]
