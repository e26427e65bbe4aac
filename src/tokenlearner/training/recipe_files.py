"""Recipe files and dotted overrides, read by cyclopts both for the command line and for :func:`load_recipe`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts.config import Toml, Yaml

from tokenlearner.errors import InputError
from tokenlearner.training.recipe import (
    ClipRecipe,
    CompressDistill,
    CompressRecipe,
    DistillRecipe,
    OptimizerRecipe,
    Recipe,
)


def layer_index_or_share(_: Any, tokens: Sequence[Token]) -> int | float:
    """``6`` is a layer, ``1.0`` a share: the written form decides, where cyclopts' union would round 0.5 to 0."""
    text = tokens[0].value
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise ValueError(f"at is a layer, such as 6, or a share of the depth, such as 0.5, not {text!r}")


def whole_number(_: Any, tokens: Sequence[Token]) -> int:
    """Cyclopts would round, and ``--tokens 0.5``, meant for ``--at``, quietly train a model without a TokenLearner."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"a whole number is needed, not {tokens[0].value!r}") from None


TokensArgument = Annotated[int, Parameter(converter=whole_number)]
AtArgument = Annotated[int | float, Parameter(converter=layer_index_or_share)]


@dataclass
class CommandLineRecipe(Recipe):
    """The recipe with what cyclopts must know about it; training itself needs no cyclopts."""

    tokens: TokensArgument = 8
    """Tokens the TokenLearner learns; 0 trains the plain model."""
    at: AtArgument = 0.5
    """Where: an int is a layer index, a float a share of the depth, rounded down."""


_SET = Parameter(parse=False, show=False)  # by compress


@dataclass
class _CompressDistill(CompressDistill):
    teacher: Annotated[str | None, _SET] = None


@dataclass
class _CompressClip(ClipRecipe):
    frames: Annotated[int | None, _SET] = None
    tubelet: Annotated[int | None, _SET] = None
    module: Annotated[str | None, _SET] = None


@dataclass
class CommandLineCompressRecipe(CompressRecipe, CommandLineRecipe):
    """What ``compress`` lets one choose."""

    model: Annotated[str | None, _SET] = None
    init: Annotated[str | None, _SET] = None
    pretrained: Annotated[bool, _SET] = False
    image_size: Annotated[int | None, _SET] = None
    drop_path: Annotated[float, _SET] = 0.0
    clip: _CompressClip = field(default_factory=_CompressClip)
    distill: _CompressDistill = field(default_factory=_CompressDistill)


_GROUP = Parameter(name="*", group="Recipe (also from --recipe FILE)")
RecipeArgument = Annotated[CommandLineRecipe, _GROUP]
CompressRecipeArgument = Annotated[CommandLineCompressRecipe, _GROUP]


def config_reader(path: str | Path) -> Callable[..., None]:
    """The cyclopts reader for a recipe file, by its ending.

    Raises:
        InputError: No such file, or neither YAML nor TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no recipe file {path}")
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise InputError(f"recipe {path} must be a .yaml, .yml or .toml file")
    reader = (Toml if path.suffix == ".toml" else Yaml)(path, must_exist=True)
    try:
        reader.config  # noqa: B018 - reads the file now, where its own error can be told from others
    except Exception as error:
        raise InputError(f"{path} is not readable: {' '.join(str(error).split())}") from error
    # As if no command had been given: cyclopts would leave out fields that are called as a command is (tokens, maps).
    return lambda app, commands, arguments: reader(app, (), arguments)


def parse_recipe(path: str | Path | None, overrides: Mapping[str, object]) -> Recipe:
    app = App(config=[config_reader(path)] if path else None, result_action="return_value")

    @app.default
    def take(*, recipe: RecipeArgument = CommandLineRecipe()) -> Recipe:  # noqa: B008 - cyclopts reads it
        return recipe

    arguments: list[str] = []
    for name, value in overrides.items():
        option = f"--{name.replace('_', '-')}"
        arguments += [option, *map(str, value)] if isinstance(value, list | tuple) else [f"{option}={value}"]
    try:
        recipe = app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise InputError(" ".join(str(error).split())) from error
    return plain_recipe(recipe)


def plain_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the command line's annotations, so that one from Python and one parsed compare equal."""
    plain = Recipe(**vars(recipe))
    plain.optimizer = OptimizerRecipe(**asdict(recipe.optimizer))  # compress has defaults of its own for these
    plain.clip = ClipRecipe(**asdict(recipe.clip))
    plain.distill = DistillRecipe(**asdict(recipe.distill))
    if str(plain.augment.auto_augment).lower() == "none":  # where a word is allowed, cyclopts takes none for one
        plain.augment = replace(plain.augment, auto_augment=None)
    return plain
