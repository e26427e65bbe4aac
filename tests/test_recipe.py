"""Recipes from YAML, TOML and overrides: what comes out, and what is said about what can't."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from tokenlearner.errors import InputError
from tokenlearner.training.recipe import (
    AugmentRecipe,
    ClipRecipe,
    DistillRecipe,
    OptimizerRecipe,
    Recipe,
    check_recipe,
    flat_recipe,
    load_recipe,
    recipe_from_dict,
    resumed_recipe,
)

YAML = """
tokens: 4
at: 3
pretrained: true
optimizer: {lr: 1e-3, betas: [0.8, 0.9]}
augment:
  hflip: 0
"""
TOML = """
tokens = 4
at = 3
pretrained = true
optimizer = {lr = 1e-3, betas = [0.8, 0.9]}
[augment]
hflip = 0
"""

EVERY_FIELD = Recipe(
    model="vit_small_patch16_224",
    pretrained=True,
    init="runs/other",
    image_size=64,
    tokens=5,
    at=2,
    kind="conv",
    fuser="unpool",
    extra_layers=1,
    maps="clusters",
    elastic=True,
    mix="clip",
    over="neighbours",
    window=5,
    epochs=7,
    batch_size=9,
    accumulate=3,
    seed=11,
    loss="sigmoid",
    label_smoothing=0.2,
    ema=0.99,
    drop_path=0.1,
    held_out=0.4,
    workers=1,
    precision="bf16-mixed",
    compile=True,
    grad_checkpointing=True,
    checkpoint_steps=7,
    tensorboard=True,
    wandb=True,
    optimizer=OptimizerRecipe("lamb", 0.02, 0.03, (0.5, 0.6), 4.5, "linear", 1e-7, None, 0.75),
    augment=AugmentRecipe("augmix", (0.1, 0.9), 0.25, 0.4, 0.35, 0.8, 0.9, "shifted"),
    clip=ClipRecipe(64, 6.5, 4, 300, (4, 3), "window", "Conv2D + TokenLearner"),
    distill=DistillRecipe("runs/teacher", 0.5, 0.25, 4.0, 2.0),
)


def put(folder: Path, text: str, suffix: str = ".yaml") -> Path:
    path = folder / f"recipe{suffix}"
    path.write_text(text)
    return path


def plain(recipe: Recipe) -> bool:
    """Dataclass equality wants one class on both sides; parsing must leave nothing of the command line's own."""
    return [type(part) for part in (recipe, recipe.optimizer, recipe.augment, recipe.clip, recipe.distill)] == [
        Recipe,
        OptimizerRecipe,
        AugmentRecipe,
        ClipRecipe,
        DistillRecipe,
    ]


def flat(fields: dict) -> dict:
    """With nested fields under dotted names."""
    own = {key: value for key, value in fields.items() if not isinstance(value, dict)}
    return own | {f"{part}.{key}": fields[part][key] for part in fields.keys() - own for key in fields[part]}


def test_nothing_given_is_the_default():
    recipe = load_recipe()
    assert recipe == Recipe()
    assert plain(recipe)


@pytest.mark.parametrize(("suffix", "text"), [(".yaml", YAML), (".yml", YAML), (".toml", TOML)])
def test_overrides_win_over_the_file_which_wins_over_the_defaults(tmp_path, suffix, text):
    recipe = load_recipe(put(tmp_path, text, suffix), **{"optimizer.lr": 2e-3, "tokens": 6, "seed": 9})
    assert recipe == Recipe(
        tokens=6,
        at=3,
        pretrained=True,
        seed=9,
        optimizer=OptimizerRecipe(lr=2e-3, betas=(0.8, 0.9)),
        augment=AugmentRecipe(hflip=0.0),
    )
    assert plain(recipe)


def test_every_field_can_be_set_from_a_file_and_from_an_override(tmp_path):
    wanted = EVERY_FIELD
    fields = asdict(wanted)
    same = set(flat(asdict(Recipe())).items()) & set(flat(fields).items())
    assert not same, "a field was left out above"
    # As train writes it to recipe.json, which is YAML too.
    assert load_recipe(put(tmp_path, json.dumps(fields))) == wanted
    assert load_recipe(put(tmp_path, yaml.safe_dump(json.loads(json.dumps(fields))))) == wanted
    assert load_recipe(**flat(fields)) == wanted


@pytest.mark.parametrize("written", ["1", "1.0", "0.5", "0", "0.0", "12"])
@pytest.mark.parametrize("source", ["yaml", "toml", "text", "number"])
def test_at_stays_a_layer_or_a_share(tmp_path, source, written):
    """``1`` is layer 1 and ``1.0`` the end, so a number that changes its type changes the model."""
    value = float(written) if "." in written else int(written)
    if source == "yaml":
        recipe = load_recipe(put(tmp_path, f"at: {written}"))
    elif source == "toml":
        recipe = load_recipe(put(tmp_path, f"at = {written}", ".toml"))
    else:
        recipe = load_recipe(at=written if source == "text" else value)
    assert (recipe.at, type(recipe.at)) == (value, type(value))


NOTHING = "fuser: {0}\nimage_size: {0}\noptimizer: {{clip_norm: {0}, layer_decay: {0}}}\naugment: {{auto_augment: {0}}}"
SOMETHING = "fuser: fuser\nimage_size: 64\noptimizer: {clip_norm: 2, layer_decay: 0.5}\naugment: {auto_augment: augmix}"


@pytest.mark.parametrize("word", ["null", "none", "None", "~"])
def test_none_in_a_file(tmp_path, word):
    recipe = load_recipe(put(tmp_path, NOTHING.format(word)))
    assert recipe == Recipe(optimizer=OptimizerRecipe(clip_norm=None), augment=AugmentRecipe(auto_augment=None))


@pytest.mark.parametrize("word", [None, "none", "None"])
def test_none_as_override_undoes_what_the_file_says(tmp_path, word):
    names = ("fuser", "image_size", "optimizer.clip_norm", "optimizer.layer_decay", "augment.auto_augment")
    path = put(tmp_path, SOMETHING)
    assert load_recipe(path).fuser == "fuser"
    recipe = load_recipe(path, **dict.fromkeys(names, word))
    assert recipe == Recipe(optimizer=OptimizerRecipe(clip_norm=None), augment=AugmentRecipe(auto_augment=None))


@pytest.mark.parametrize(
    ("value", "wanted"), [(True, True), (False, False), ("true", True), ("false", False), ("no", False)]
)
def test_bools(tmp_path, value, wanted):
    opposite = put(tmp_path, f"pretrained: {str(not wanted).lower()}")
    assert load_recipe(opposite).pretrained is not wanted
    assert load_recipe(opposite, pretrained=value).pretrained is wanted


@pytest.mark.parametrize("value", [(0.2, 0.7), [0.2, 0.7]])
def test_tuples(tmp_path, value):
    for recipe in (
        load_recipe(**{"augment.scale": value}),
        load_recipe(put(tmp_path, "augment: {scale: [0.2, 0.7]}")),
        load_recipe(put(tmp_path, "[augment]\nscale = [0.2, 0.7]", ".toml")),
    ):
        assert recipe.augment.scale == (0.2, 0.7)
        assert isinstance(recipe.augment.scale, tuple)


@pytest.mark.parametrize(
    ("suffix", "text", "overrides", "key", "suggestion"),
    [
        (".yaml", "token: 4", {}, "token", "--tokens"),
        (".toml", "token = 4", {}, "token", "--tokens"),
        (None, "", {"token": 4}, "token", "--tokens"),
        (".yaml", "optimizer: {lrr: 1}", {}, "lrr", "--optimizer.lr"),
        (".toml", "[optimizer]\nlrr = 1", {}, "lrr", "--optimizer.lr"),
        (None, "", {"optimizer.lrr": 1}, "optimizer.lrr", "--optimizer.lr"),
        (".yaml", "optimzer: {lr: 1}", {}, "optimzer", "--optimizer.lr"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path, suffix, text, overrides, key, suggestion):
    path = put(tmp_path, text, suffix) if suffix else None
    with pytest.raises(InputError, match=f"{key}\\b.*Did you mean {suggestion}\\?") as caught:
        load_recipe(path, **overrides)
    assert path is None or str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", "many"),
        ("at", "half"),
        ("at", None),
        ("at", True),
        ("pretrained", "maybe"),
        ("fuser", "fusr"),
        ("kind", "attention"),
        ("precision", "8"),
        ("optimizer.lr", "fast"),
        ("optimizer.clip_norm", "much"),
    ],
)
@pytest.mark.parametrize("source", ["file", "override"])
def test_a_value_of_the_wrong_type_is_refused_and_its_key_named(tmp_path, source, name, value):
    path, overrides = None, {name: value}
    if source == "file":
        first, *rest = name.split(".")
        path, overrides = put(tmp_path, json.dumps({first: {rest[0]: value} if rest else value})), {}
    last = name.rpartition(".")[2]
    with pytest.raises(InputError, match=f"\\b({last}|{last.replace('_', '-')})\\b") as caught:
        load_recipe(path, **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("betas", [[0.5], [0.5, 0.6, 0.7], 0.5, []])
def test_a_pair_must_be_two(tmp_path, betas):
    with pytest.raises(InputError):
        load_recipe(put(tmp_path, json.dumps({"optimizer": {"betas": betas}})))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone.yaml", None, "there is no recipe file"),
        ("recipe.txt", b"tokens: 4", "must be a .yaml, .yml or .toml file"),
        ("recipe.json", b"{}", "must be a .yaml, .yml or .toml file"),
        ("recipe.yaml", b"tokens: [4", "is not readable"),
        ("recipe.yaml", b"\xff\xfe\x00", "is not readable"),
        ("recipe.toml", b"tokens = ", "is not readable"),
        ("recipe.yaml", b"just words", "must be a mapping"),
        ("recipe.yaml", b"- tokens", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_recipe_file(tmp_path):
    with pytest.raises(InputError, match="there is no recipe file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("given", ["0.5", "4.0", "four"])
def test_tokens_are_not_rounded(given):
    with pytest.raises(InputError, match=f"tokens.*whole number.*{given}"):
        load_recipe(tokens=given)


# ---- numbers that make no sense


def with_field(name: str, value: object, recipe: Recipe | None = None) -> Recipe:
    """``recipe`` with one field, by its dotted name, of another value."""
    recipe = recipe or Recipe()
    part, _, key = name.rpartition(".")
    return replace(recipe, **{part: replace(getattr(recipe, part), **{key: value})} if part else {name: value})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("epochs", 0, "epochs must be at least 1, not 0"),
        ("batch_size", 0, "batch_size must be at least 1, not 0"),
        ("accumulate", 0, "accumulate must be at least 1, not 0"),
        ("workers", -1, "workers must be at least 0, not -1"),
        ("seed", -1, "seed must be at least 0, not -1"),
        ("checkpoint_steps", 0, "checkpoint_steps must be at least 1, not 0"),
        ("ema", -0.1, "ema must be at least 0 and below 1, not -0.1; none for no averaging"),
        ("ema", 1.0, "ema must be at least 0 and below 1, not 1.0; none for no averaging"),
        ("ema", NAN, "ema must be at least 0 and below 1, not nan; none for no averaging"),
        ("label_smoothing", 1.0, "label_smoothing must be at least 0 and below 1, not 1.0"),
        ("label_smoothing", NAN, "label_smoothing must be at least 0 and below 1, not nan"),
        ("drop_path", -0.5, "drop_path must be at least 0 and below 1, not -0.5"),
        ("drop_path", 1.0, "drop_path must be at least 0 and below 1, not 1.0"),
        ("augment.mixup", -0.1, "augment.mixup must be 0 or above, not -0.1"),
        ("augment.mixup", NAN, "augment.mixup must be 0 or above, not nan"),
        ("augment.cutmix", -1.0, "augment.cutmix must be 0 or above, not -1.0"),
        ("augment.cutmix", INF, "augment.cutmix must be 0 or above, not inf"),
        ("accumulate", 3, "batch_size 64 can't be computed in 3 equal parts"),
        ("accumulate", 128, "batch_size 64 can't be computed in 128 equal parts"),
    ],
)
def test_numbers_that_make_no_sense_are_named(name, value, sentence):
    with pytest.raises(InputError) as caught:
        check_recipe(with_field(name, value))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 1),
        ("batch_size", 1),
        ("accumulate", 64),
        ("workers", 0),
        ("seed", 2**32 - 1),
        ("checkpoint_steps", 1),
        ("ema", None),
        ("ema", 0.0),
        ("ema", 0.99999),
        ("label_smoothing", 0.0),
        ("drop_path", 0.99),
        ("augment.mixup", 5.0),
        ("pretrained", True),
        ("init", "runs/other"),
    ],
)
def test_numbers_at_the_edge_make_sense(name, value):
    check_recipe(with_field(name, value))


def test_a_seed_too_large_for_numpy_is_refused_like_one_too_small():
    """Lightning ends with a traceback at 2**32."""
    with pytest.raises(InputError, match="seed"):
        check_recipe(Recipe(seed=2**32))


def test_only_one_word_on_where_weights_come_from():
    with pytest.raises(InputError, match="pretrained and init both say which weights to start from; give one of them"):
        check_recipe(Recipe(pretrained=True, init="runs/other"))


# ---- as JSON, and gone on with


@pytest.mark.parametrize("recipe", [Recipe(), EVERY_FIELD], ids=["defaults", "every field"])
def test_a_recipe_comes_back_from_json(recipe):
    back = recipe_from_dict(json.loads(json.dumps(asdict(recipe))))
    assert back == recipe
    assert plain(back)
    assert isinstance(back.augment.scale, tuple)


def test_what_an_older_recipe_lacks_is_the_default():
    assert recipe_from_dict({"tokens": 4, "augment": {"hflip": 0.0}}) == Recipe(
        tokens=4, augment=AugmentRecipe(hflip=0.0)
    )


def test_fields_have_their_names_on_the_command_line():
    assert flat_recipe(EVERY_FIELD) == flat(asdict(EVERY_FIELD))
    assert {"tokens", "optimizer.lr", "augment.mixup"} < flat_recipe(Recipe()).keys()
    assert not {"optimizer", "augment"} & flat_recipe(Recipe()).keys()
    assert load_recipe(**flat_recipe(EVERY_FIELD)) == EVERY_FIELD


FREE = ("workers", "tensorboard", "wandb", "checkpoint_steps", "compile", "grad_checkpointing")


def test_a_run_goes_on_by_its_own_recipe():
    for of_run in (Recipe(), EVERY_FIELD):
        assert resumed_recipe(of_run, Recipe()) == of_run
        assert resumed_recipe(of_run, of_run) == of_run


@pytest.mark.parametrize("name", sorted(flat_recipe(EVERY_FIELD).keys() - set(FREE)))
def test_what_would_change_the_numbers_may_not_change(name):
    """Even where the run has the default; ``given`` has one field of its own at a time."""
    wanted = flat_recipe(EVERY_FIELD)[name]
    there = flat_recipe(Recipe())[name]
    with pytest.raises(InputError) as caught:
        resumed_recipe(Recipe(), with_field(name, wanted))
    assert str(caught.value) == f"{name} is {there} there and {wanted} here; leave it out, or start another run"
    assert resumed_recipe(EVERY_FIELD, with_field(name, wanted)) == EVERY_FIELD


@pytest.mark.parametrize("name", FREE)
def test_what_changes_no_number_may_change(name):
    wanted = flat_recipe(EVERY_FIELD)[name]
    assert resumed_recipe(Recipe(), with_field(name, wanted)) == with_field(name, wanted)
    assert resumed_recipe(EVERY_FIELD, with_field(name, wanted)) == EVERY_FIELD
    assert resumed_recipe(with_field(name, wanted), Recipe()) == with_field(name, wanted)


def test_the_recipe_of_the_run_is_not_changed_in_place():
    of_run = Recipe()
    resumed_recipe(of_run, Recipe(workers=7))
    assert of_run == Recipe()


def test_a_layer_is_no_share():
    """1 is after the first layer, 1.0 after the last."""
    with pytest.raises(InputError, match=r"at is 1 there and 1\.0 here"):
        resumed_recipe(Recipe(at=1), Recipe(at=1.0))
