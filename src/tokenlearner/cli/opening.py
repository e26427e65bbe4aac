"""Models by folder or timm name, for the commands that look at models rather than use them."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tokenlearner.cli.options import Fuser, Kind, input_shape
from tokenlearner.errors import InputError
from tokenlearner.training.recipe_files import AtArgument, CommandLineRecipe, plain_recipe

InputSize = Annotated[
    tuple[int, ...] | None,
    Parameter(
        help="Channels, (frames,) height, width, such as 3,32,224,224; the model's own when not given.",
        converter=input_shape,
        consume_multiple=True,
    ),
]


@dataclass(frozen=True)
class Learned:
    """The TokenLearner to put into a timm model."""

    tokens: int | None = None
    """Give the timm model a TokenLearner of so many tokens."""
    at: AtArgument = 0.5
    kind: Kind = "mlp"
    fuser: Fuser | None = None
    extra_layers: int = 0
    over: Literal["slice", "neighbours", "window"] = "slice"
    window: int | None = None


LearnedOptions = Annotated[Learned, Parameter(name="*")]


def open_model(name: str, learned: Learned, on: str) -> Any:
    """A saved folder, or a timm name built with new weights on the device ``on`` ("meta" has none)."""
    if Path(name).is_dir():
        from tokenlearner.insertion.saving import load

        if learned.tokens is not None:
            raise InputError(f"{name} is a saved model, so --tokens and what goes with it are already decided")
        return load(name)
    from tokenlearner.training.build import build_model

    if os.sep in name:
        raise InputError(f"there is no folder {name}; give a saved model's folder or a name of timm's")
    given = learned.fuser or learned.extra_layers or learned.window or learned.over != "slice"
    if learned.tokens is None and given:
        raise InputError(
            "--fuser, --extra-layers, --over and --window go with --tokens, which says that there is a TokenLearner"
        )
    recipe = CommandLineRecipe(model=name, **{**asdict(learned), "tokens": learned.tokens or 0})
    return build_model(plain_recipe(recipe), num_classes=None, on=on)


def own_input_size(model: Any) -> tuple[int, ...]:
    from tokenlearner.insertion.saving import Preprocessing

    preprocessing = Preprocessing.of(model)
    return preprocessing.model_input if preprocessing else (3, 224, 224)
