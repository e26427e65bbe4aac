"""One run as data: everything `tokenlearner train` can be told, with its defaults.

Plain dataclasses without imports, so that the command line's ``--help`` is quick. A YAML or TOML file holds the same
fields; nested ones are written ``optimizer.lr`` on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenlearner.errors import InputError


@dataclass
class OptimizerRecipe:
    name: str = "adamw"
    """Any optimizer of timm's create_optimizer_v2."""
    lr: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Not applied to biases, norms, position embedding and prefix tokens."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 3.0
    """Linear warm-up before the cosine."""
    min_lr: float = 1e-6
    """Where the cosine ends."""
    clip_norm: float | None = 1.0
    """Largest gradient norm; none to leave gradients alone."""
    layer_decay: float | None = None
    """Learning rate factor per layer towards the input; inserted modules keep the full rate."""


@dataclass
class AugmentRecipe:
    auto_augment: str | None = "rand-m7-mstd0.5"
    """timm's policy string; none for crops and flips only."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Share of the picture a random crop covers."""
    hflip: float = 0.5
    color_jitter: float = 0.3
    erasing: float = 0.0
    """Probability of random erasing."""


@dataclass
class Recipe:
    model: str = "vit_tiny_patch16_224"
    """A timm VisionTransformer."""
    pretrained: bool = False
    """Start from timm's weights for that model (needs its hub)."""
    image_size: int | None = None
    """Pixels a side; the model's own when not given."""
    tokens: int = 8
    """Tokens the TokenLearner learns; 0 trains the plain model."""
    at: int | float = 0.5
    """Where: an int is a layer index, a float a share of the depth, rounded down."""
    kind: Literal["conv", "mlp", "conv1", "gate", "grid", "dense", "average"] = "mlp"
    """The form of the attention maps."""
    fuser: Literal["fuser", "unpool", "reproject"] | None = None
    """Bring the tokens back to the grid in every layer from there on."""
    extra_layers: int = 0
    """Layers appended after the host's own."""
    epochs: int = 30
    batch_size: int = 64
    seed: int = 0
    label_smoothing: float = 0.1
    ema: float | None = None
    """Decay per step of an average of the weights, which is then what is scored and saved."""
    drop_path: float = 0.0
    """Stochastic depth of the host's last layer."""
    held_out: float = 0.2
    """Share of DATA kept for evaluation when it has no val folder."""
    workers: int = 2
    """Processes that decode images."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)


def check_recipe(recipe: Recipe) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1), ("workers", 0), ("seed", 0)):
        if getattr(recipe, name) < least:
            raise InputError(f"{name} must be at least {least}, not {getattr(recipe, name)}")
    if recipe.ema is not None and not 0 <= recipe.ema < 1:
        raise InputError(f"ema must be at least 0 and below 1, not {recipe.ema}; none for no averaging")


def load_recipe(path: str | Path | None = None, **overrides: object) -> Recipe:
    """Reads a recipe from YAML or TOML, then applies ``overrides`` (dotted names such as ``{"optimizer.lr": 1e-3}``).

    Raises:
        InputError: The file or a key in it is not understood; names the nearest known key.
    """
    from tokenlearner.training.recipe_files import parse_recipe

    return parse_recipe(path, overrides)
