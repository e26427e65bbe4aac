"""One run as data: everything `tokenlearner train` can be told, with its defaults.

Plain dataclasses without imports, so that the command line's ``--help`` is quick. A YAML or TOML file holds the same
fields; nested ones are written ``optimizer.lr`` on the command line.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

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
    """Linear warm-up before the schedule."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls after the warm-up."""
    min_lr: float = 1e-6
    """Where the schedule ends."""
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
    mixup: float = 0.0
    """α of mixup; 0 for none. With cutmix too, every batch takes one of the two at random."""
    cutmix: float = 0.0
    """α of cutmix; 0 for none."""
    crop: Literal["resized", "shifted"] = "resized"
    """resized: scale's share of the picture, at full size. shifted: the picture as it is evaluated, moved by up to an
    eighth of its sides."""


@dataclass
class ClipRecipe:
    frames: int | None = None
    """Frames of a clip; the model's own when not given."""
    fps: float | None = None
    """Frames a second a clip shows, whatever the video's own rate; when not given those of the model it starts from,
    else 12.5."""
    tubelet: int | None = None
    """Frames of a tubelet; the model's own when not given."""
    short_side: int | None = None
    """Pixels frames are decoded at, before they are cropped; the model's own when not given."""
    views: tuple[int, int] = (1, 1)
    """Windows of a clip, and crops of each, that are scored after every epoch."""
    label_by: Literal["video", "window"] = "video"
    """Whether a training clip of a timed list is of all classes of its video, or of those seen in its window."""
    module: str | None = None
    """Of X(2+1)D: what its last three blocks have in the middle, such as "Conv2D + TokenLearner". When not given,
    TokenLearner, or with tokens 0 the backbone's own convolutions."""


@dataclass
class DistillRecipe:
    teacher: str | None = None
    """A saved model's folder, or the name of one with weights, that this one is trained towards."""
    labels: float = 1.0
    """Weight of the loss on the labels beside what follows."""
    logits: float = 1.0
    """Weight of the distance between the two models' probabilities."""
    temperature: float = 1.0
    """Softens the probabilities that are compared."""
    features: float = 0.0
    """Weight of 1 - cosine between the features that their heads read."""


@dataclass
class Recipe:
    model: str | None = None
    """A timm VisionTransformer, or a model of clips such as vivit_small_patch16x2_224 or x2plus1d_m. When not given,
    the model init names (with its TokenLearner, unless tokens, at, kind, fuser or extra_layers say otherwise), else
    vit_tiny_patch16_224, or vivit_tiny_patch16x2_224 for videos."""
    pretrained: bool = False
    """Start from timm's weights for that model (needs its hub)."""
    init: str | None = None
    """Start from other weights: a saved model's folder, or a timm name whose weights are fetched. The head is new where
    the classes differ; positions are interpolated to image_size. An image model's weights are inflated for clips."""
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
    maps: Literal["random", "clusters"] = "random"
    """How the maps of a new TokenLearner of kind mlp start: at random, or each at a cluster of the trained host's
    features (of other kinds at random in any case)."""
    elastic: bool = False
    """Train on a random number of the tokens in every step, so that set_num_tokens can take fewer of them later."""
    mix: Literal["slice", "clip"] = "slice"
    """Of clips: whether a fuser mixes the tokens of one slice, or of the whole clip."""
    over: Literal["slice", "neighbours", "window"] = "slice"
    """Of clips: learn tokens from one slice, from one with a look at its neighbours, or from a window of slices."""
    window: int | None = None
    """Slices that over="neighbours" looks at (3) or that share their tokens (2)."""
    epochs: int = 30
    batch_size: int = 64
    """Images an optimizer step sees, over all processes and parts."""
    accumulate: int = 1
    """Parts a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    loss: Literal["cross_entropy", "sigmoid"] = "cross_entropy"
    """sigmoid takes each class for itself, as images with several labels need it; a new head's biases start at -10."""
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
    compile: bool = False
    """Compile the model with torch.compile."""
    grad_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what it needs, to save memory."""
    checkpoint_steps: int = 1000
    """Optimizer steps between two checkpoints within an epoch; there is one after every epoch in any case."""
    tensorboard: bool = False
    """Log to TensorBoard beside metrics.csv, if it is installed."""
    wandb: bool = False
    """Log to Weights & Biases beside metrics.csv, if it is installed."""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    augment: AugmentRecipe = field(default_factory=AugmentRecipe)
    clip: ClipRecipe = field(default_factory=ClipRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)


@dataclass
class CompressOptimizer(OptimizerRecipe):
    lr: float = 5e-4
    """Peak learning rate."""
    warmup_epochs: float = 0.5
    """Linear warm-up before the schedule."""


@dataclass
class CompressAugment(AugmentRecipe):
    auto_augment: str | None = None
    """timm's policy string; none for crops and flips only."""
    color_jitter: float = 0.0
    crop: Literal["resized", "shifted"] = "shifted"
    """resized: scale's share of the picture, at full size. shifted: the picture as it is evaluated, moved by up to an
    eighth of its sides."""


@dataclass
class CompressDistill(DistillRecipe):
    features: float = 1.0
    """Weight of 1 - cosine between the features that their heads read."""


@dataclass
class CompressRecipe(Recipe):
    """A :class:`Recipe` with the defaults of ``compress``: short, and towards the model as it was.

    What was tried is in ``docs/log.md``.
    """

    maps: Literal["random", "clusters"] = "clusters"
    epochs: int = 5
    label_smoothing: float = 0.0
    optimizer: CompressOptimizer = field(default_factory=CompressOptimizer)
    augment: CompressAugment = field(default_factory=CompressAugment)
    distill: CompressDistill = field(default_factory=CompressDistill)


def check_recipe(recipe: Recipe) -> None:
    """Refuses numbers that make no sense, before anything is read or written.

    Raises:
        InputError: Names the field, what it must be and what it is.
    """
    least_values = {"epochs": 1, "batch_size": 1, "accumulate": 1, "workers": 0, "seed": 0, "checkpoint_steps": 1}
    for name, least in least_values.items():
        if getattr(recipe, name) < least:
            raise InputError(f"{name} must be at least {least}, not {getattr(recipe, name)}")
    if recipe.seed >= 2**32:
        raise InputError(f"seed must be below 2^32, not {recipe.seed}")
    if recipe.ema is not None and not 0 <= recipe.ema < 1:
        raise InputError(f"ema must be at least 0 and below 1, not {recipe.ema}; none for no averaging")
    for name, value in (("label_smoothing", recipe.label_smoothing), ("drop_path", recipe.drop_path)):
        if not 0 <= value < 1:
            raise InputError(f"{name} must be at least 0 and below 1, not {value}")
    for name, value in (("augment.mixup", recipe.augment.mixup), ("augment.cutmix", recipe.augment.cutmix)):
        if not 0 <= value < float("inf"):
            raise InputError(f"{name} must be 0 or above, not {value}")
    distill = recipe.distill
    for name, weight in (("labels", distill.labels), ("logits", distill.logits), ("features", distill.features)):
        if not 0 <= weight < float("inf"):
            raise InputError(f"distill.{name} must be 0 or above, not {weight}")
    if not 0 < distill.temperature < float("inf"):
        raise InputError(f"distill.temperature must be above 0, not {distill.temperature}")
    clip = recipe.clip
    for name, count in (("frames", clip.frames), ("tubelet", clip.tubelet), ("short_side", clip.short_side)):
        if count is not None and count < 1:
            raise InputError(f"clip.{name} must be at least 1, not {count}")
    if clip.fps is not None and not 0 < clip.fps < float("inf"):
        raise InputError(f"clip.fps must be above 0, not {clip.fps}")
    if min(clip.views) < 1:
        raise InputError(f"clip.views must be at least one window and one crop, not {clip.views}")
    if recipe.batch_size % recipe.accumulate:
        raise InputError(f"batch_size {recipe.batch_size} can't be computed in {recipe.accumulate} equal parts")
    if recipe.pretrained and recipe.init:
        raise InputError("pretrained and init both say which weights to start from; give one of them")


def load_recipe(path: str | Path | None = None, **overrides: object) -> Recipe:
    """Reads a recipe from YAML or TOML, then applies ``overrides`` (dotted names such as ``{"optimizer.lr": 1e-3}``).

    Raises:
        InputError: The file or a key in it is not understood; names the nearest known key.
    """
    from tokenlearner.training.recipe_files import parse_recipe

    return parse_recipe(path, overrides)


def recipe_from_dict(values: Mapping[str, Any]) -> Recipe:
    """The recipe ``dataclasses.asdict`` and JSON made ``values`` of."""
    parts: dict[str, Any] = {name: _tuples(value) for name, value in values.items()}
    for name, kind in (
        ("optimizer", OptimizerRecipe),
        ("augment", AugmentRecipe),
        ("clip", ClipRecipe),
        ("distill", DistillRecipe),
    ):
        parts[name] = kind(**{key: _tuples(value) for key, value in parts.get(name, {}).items()})
    return Recipe(**parts)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# What may change when a run goes on: none of it changes a number.
_FREE = {"workers", "tensorboard", "wandb", "checkpoint_steps", "compile", "grad_checkpointing"}


def resumed_recipe(of_run: Recipe, given: Recipe) -> Recipe:
    """The recipe to go on by: the run's own, with what of ``given`` is not a default and may change.

    Raises:
        InputError: ``given`` has something else that is neither the run's nor the default.
    """
    default = flat_recipe(Recipe())
    there, here = flat_recipe(of_run), flat_recipe(given)
    for name, value in here.items():
        known = [(type(other[name]), other[name]) for other in (default, there)]  # at=1 is a layer and at=1.0 the end
        if name not in _FREE and (type(value), value) not in known:
            raise InputError(f"{name} is {there[name]} there and {value} here; leave it out, or start another run")
    return replace(of_run, **{name: here[name] for name in _FREE if here[name] != default[name]})


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every field by the name it has on the command line, such as ``optimizer.lr``."""
    flat: dict[str, Any] = {}
    for part in fields(recipe):
        value = getattr(recipe, part.name)
        if isinstance(value, OptimizerRecipe | AugmentRecipe | ClipRecipe | DistillRecipe):
            flat |= {f"{part.name}.{key}": entry for key, entry in asdict(value).items()}
        else:
            flat[part.name] = value
    return flat
