"""The public names and signatures, written out: a change to them is a change to this file."""

import importlib
import inspect

import pytest

import tokenlearner

NAMES = [
    "Cost",
    "InputError",
    "Insertion",
    "NeighbourTokenLearner",
    "Preprocessing",
    "Reproject",
    "TokenFuser",
    "TokenLearner",
    "Unpool",
    "WindowTokenLearner",
    "__version__",
    "attention_maps",
    "cost",
    "insert",
    "insertion_of",
    "learners",
    "load",
    "param_groups",
    "remove",
    "save",
    "set_num_tokens",
]

SIGNATURES = {
    "insert": (
        "(model: 'ModelT', num_tokens: 'int' = 8, at: 'int | float' = 0.5, kind: 'Kind' = 'mlp', "
        "fuser: 'FuserKind | None' = None, extra_layers: 'int' = 0, *, pool: 'Pool | None' = None, "
        "hidden_dim: 'int' = 64, dropout: 'float' = 0.0, mix: 'Mix' = 'slice', over: 'Over' = 'slice', "
        "window: 'int | None' = None) -> 'ModelT'"
    ),
    "remove": "(model: 'ModelT') -> 'ModelT'",
    "attention_maps": (
        "(model: 'nn.Module', images: \"Float[Tensor, 'b c *frames height width']\") "
        "-> \"dict[int, Float[Tensor, 'b *slices s h w']]\""
    ),
    "insertion_of": "(model: 'nn.Module') -> 'Insertion | None'",
    "learners": "(model: 'nn.Module') -> 'dict[int, TokenLearner]'",
    "save": (
        "(model: 'nn.Module', folder: 'str | Path', *, preprocessing: 'Preprocessing | None' = None, "
        "labels: 'Sequence[str] | None' = None) -> 'Path'"
    ),
    "load": "(folder: 'str | Path') -> 'nn.Module'",
    "set_num_tokens": "(model: 'ModelT', num_tokens: 'int') -> 'ModelT'",
    "param_groups": (
        "(model: 'nn.Module', *, weight_decay: 'float' = 0.05, layer_decay: 'float | None' = None) "
        "-> 'list[dict[str, Any]]'"
    ),
    "cost": "(model: 'nn.Module', input_size: 'tuple[int, ...]' = (3, 224, 224)) -> 'Cost'",
    "TokenLearner": (
        "(dim: 'int', num_tokens: 'int' = 8, kind: 'Kind' = 'mlp', grid: 'Grid | None' = None, *, "
        "pool: 'Pool | None' = None, hidden_dim: 'int' = 64, dropout: 'float' = 0.0) -> 'None'"
    ),
    "TokenFuser": (
        "(dim: 'int', num_tokens: 'int' = 8, *, num_frames: 'int | None' = None, beta: 'Beta' = 'mlp', "
        "hidden_dim: 'int' = 64, norm: 'bool' = True, dropout: 'float' = 0.0, residual: 'bool' = True) -> 'None'"
    ),
    "Unpool": "(*, normalize: 'bool' = False, residual: 'bool' = True) -> 'None'",
    "Reproject": "(dim: 'int', num_heads: 'int' = 8, *, residual: 'bool' = True) -> 'None'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert str(inspect.signature(getattr(tokenlearner, name))) == SIGNATURES[name]


def test_the_public_names():
    assert tokenlearner.__all__ == NAMES
    assert dir(tokenlearner) == NAMES
    assert set(tokenlearner._HOME) == set(NAMES) - {"__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name):
    value = getattr(tokenlearner, name)
    if name == "__version__":
        assert value.split(".")[:2] == ["0", "1"]
        return
    assert value.__name__ == name
    assert value.__module__.startswith("tokenlearner.")
    assert len(inspect.getdoc(value)) > 30


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_that_of_its_home(name):
    home = importlib.import_module(
        f"tokenlearner.{tokenlearner._HOME[name]}" if name in tokenlearner._HOME else "tokenlearner"
    )
    assert getattr(home, name) is getattr(tokenlearner, name)


def test_a_name_that_is_none_raises():
    with pytest.raises(AttributeError, match="module 'tokenlearner' has no attribute 'TokenLerner'"):
        _ = tokenlearner.TokenLerner


def test_errors_are_value_errors():
    """So that a caller who does not know our class still catches what the documentation calls bad input."""
    assert issubclass(tokenlearner.InputError, ValueError)
