"""Training that starts from other weights: which are taken over, which are new, and how images are prepared then."""

import csv
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from noisy_photos import draw_photos
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tokenlearner
from tokenlearner.cli import main
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import insert, insertion_of
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.speed import measure_speed
from tokenlearner.models.weights import LoadedWeights
from tokenlearner.training import build
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.train import train

CLASSES = ("blue", "red")
HEAD = {"head.weight", "head.bias"}
LEARNER = "blocks.1.token_learner."
SETTINGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 2,
}
PREPARED = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 1.0, "squash")
STILL = OptimizerRecipe(lr=0.0, min_lr=0.0)
AS_IT_IS = AugmentRecipe(auto_augment=None, scale=(1.0, 1.0), hflip=0.0, color_jitter=0.0)
PLAIN = Recipe(tokens=0, epochs=1, batch_size=8, workers=0, optimizer=STILL, augment=AS_IT_IS)
LEARNED = replace(PLAIN, tokens=4)


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch) -> None:
    """Most of such a run would be the second in which its speed is taken."""
    monkeypatch.setattr(tokenlearner.training.train, "measure_speed", partial(measure_speed, seconds_per_round=0.001))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """24 pictures of two classes."""
    return draw_photos(
        tmp_path_factory.mktemp("data") / "photos", 12, {"red": (160, 90, 90), "blue": (90, 90, 160)}, 60
    )


def host(**changes: Any) -> VisionTransformer:
    """No timm name belongs to it."""
    return VisionTransformer(**{**SETTINGS, **changes})


def marked(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every weight a number that no fresh model has: also biases, norms and what starts at zero."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=numbers) * 0.2)
    return model.eval()


def kept_in(
    folder: Path,
    model: nn.Module,
    labels: tuple[str, ...] | None = CLASSES,
    preprocessing: Preprocessing | None = PREPARED,
) -> str:
    return str(tokenlearner.save(marked(model), folder, labels=labels, preprocessing=preprocessing))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    return kept_in(tmp_path_factory.mktemp("sources") / "plain", host())


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> str:
    """With 4 tokens before the second of two layers, as ``LEARNED`` asks for."""
    model = insert(host(), 4, 0.5)
    return kept_in(tmp_path_factory.mktemp("sources") / "learned", model)


def begun(
    recipe: Recipe, init: str | Path, classes: tuple[str, ...] = CLASSES
) -> tuple[Any, LoadedWeights, Preprocessing | None]:
    """What ``train`` does before it trains."""
    recipe = replace(recipe, init=str(init))
    model = build.build_model(recipe, len(classes))
    loaded, preprocessing = build.start_from(model, str(init), classes)
    build.prepare_head(model, recipe, loaded)
    return model, loaded, preprocessing


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    """Names only one of them has, or whose numbers differ."""
    mine, theirs = one.state_dict(), other.state_dict()
    return {key for key in mine.keys() | theirs.keys() if not _equal(mine.get(key), theirs.get(key))}


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def learner_names(model: nn.Module) -> set[str]:
    return {key for key in model.state_dict() if "token_learner" in key}


def some_images(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


def config_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "config.json").read_text())


# ---- the head


def test_with_the_same_classes_a_run_that_learns_nothing_gives_the_source_back(photos, plain, tmp_path):
    summary = train(photos, replace(PLAIN, init=plain), tmp_path)
    source, trained = tokenlearner.load(plain), tokenlearner.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(trained(some_images()), source(some_images()))
    assert not differing(trained, source)
    assert trained.label_names == CLASSES
    assert summary["init"] == {"from": plain, "new": [], "unused": []}


@pytest.mark.parametrize(
    "classes",
    [
        ("blue", "green", "red"),  # another number
        ("crimson", "navy"),  # the same number
        ("red", "blue"),  # another order
        ("Blue", "red"),
    ],
)
def test_with_other_classes_the_head_is_new_and_nothing_else(plain, classes):
    model, loaded, _ = begun(PLAIN, plain, classes)
    assert differing(model, tokenlearner.load(plain)) == HEAD
    assert model.head.weight.shape == (len(classes), 24)
    assert not model.head.bias.any()
    assert set(loaded.kept) == set(loaded.unused) == HEAD


def test_the_head_is_new_where_the_source_has_no_names(tmp_path):
    model, loaded, _ = begun(PLAIN, kept_in(tmp_path, host(), labels=None))
    assert differing(model, tokenlearner.load(tmp_path)) == HEAD
    assert set(loaded.kept) == HEAD


def test_a_source_without_a_head_gives_the_rest(tmp_path):
    kept_in(tmp_path, host(num_classes=0), labels=None)
    model, loaded, _ = begun(PLAIN, tmp_path)
    assert differing(model, tokenlearner.load(tmp_path)) == HEAD
    assert set(loaded.kept) == HEAD


def test_under_the_sigmoid_loss_a_new_heads_biases_are_low(plain):
    model, _, _ = begun(replace(PLAIN, loss="sigmoid"), plain, ("bird", "cat", "dog"))
    assert model.head.bias.tolist() == [-10.0] * 3


def test_under_the_sigmoid_loss_a_head_taken_over_stays_as_it_is(plain):
    model, _, _ = begun(replace(PLAIN, loss="sigmoid"), plain)
    assert not differing(model, tokenlearner.load(plain))


def test_a_new_head_is_trained_and_saved_with_the_new_names(photos, tmp_path):
    source = kept_in(tmp_path / "source", host(num_classes=3), ("bird", "cat", "dog"))
    summary = train(photos, replace(PLAIN, init=source, loss="sigmoid"), tmp_path / "out")
    trained = tokenlearner.load(tmp_path / "out")
    assert differing(trained, tokenlearner.load(source)) == HEAD
    assert trained.label_names == CLASSES
    assert trained.head.bias.tolist() == [-10.0] * 2
    assert set(summary["init"]["new"]) == set(summary["init"]["unused"]) == HEAD


def test_both_heads_of_a_distilled_model_go_together(tmp_path):
    kept_in(tmp_path, VisionTransformerDistilled(**SETTINGS))
    heads = {f"{name}.{part}" for name in ("head", "head_dist") for part in ("weight", "bias")}
    same, _, _ = begun(PLAIN, tmp_path)
    assert not differing(same, tokenlearner.load(tmp_path))
    other, loaded, _ = begun(PLAIN, tmp_path, ("cat", "dog"))
    assert differing(other, tokenlearner.load(tmp_path)) == heads == set(loaded.kept)


def test_under_the_sigmoid_loss_both_new_heads_of_a_distilled_model_have_low_biases():
    model: Any = VisionTransformerDistilled(**SETTINGS)
    build.prepare_head(model, replace(PLAIN, loss="sigmoid"), None)
    assert model.head.bias.tolist() == model.head_dist.bias.tolist() == [-10.0] * 2


# ---- the grid


@pytest.mark.parametrize("size", [48, 16])
def test_another_resolution_resamples_the_positions_and_nothing_else(plain, size):
    model, loaded, preprocessing = begun(replace(PLAIN, image_size=size), plain)
    source: Any = tokenlearner.load(plain)
    assert differing(model, source) == {"pos_embed"}
    grid = [size // 8, size // 8]
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(source.pos_embed, grid, num_prefix_tokens=1))
    assert model.patch_embed.img_size == (size, size)
    assert preprocessing == replace(PREPARED, input_size=(3, size, size))
    assert loaded == LoadedWeights((), ())


def test_another_resolution_is_trained_and_saved(photos, plain, tmp_path):
    train(photos, replace(PLAIN, init=plain, image_size=48), tmp_path)
    trained: Any = tokenlearner.load(tmp_path)
    assert differing(trained, begun(replace(PLAIN, image_size=48), plain)[0]) == set()
    assert config_of(tmp_path)["preprocessing"]["input_size"] == [3, 48, 48]
    assert trained.preprocessing == replace(PREPARED, input_size=(3, 48, 48))


def test_without_image_size_the_sources_is_kept(tmp_path):
    source = kept_in(tmp_path, host(img_size=(16, 40)), preprocessing=replace(PREPARED, input_size=(3, 16, 40)))
    model, _, preprocessing = begun(PLAIN, source)
    assert model.patch_embed.img_size == (16, 40)
    assert preprocessing is not None
    assert preprocessing.input_size == (3, 16, 40)
    assert not differing(model, tokenlearner.load(source))


def test_positions_of_an_oblong_grid_are_resampled_as_one(tmp_path):
    """16 positions of 2×8: as a square they would be scrambled."""
    kept_in(tmp_path, host(img_size=(16, 64)))
    model, _, _ = begun(replace(PLAIN, image_size=32), tmp_path)
    source: Any = tokenlearner.load(tmp_path)
    patches = resample_abs_pos_embed(source.pos_embed[:, 1:], [4, 4], [2, 8], num_prefix_tokens=0)
    assert torch.equal(model.pos_embed, torch.cat([source.pos_embed[:, :1], patches], 1))


def test_a_size_that_the_patches_do_not_divide_is_refused(plain):
    with pytest.raises(InputError, match=r"image_size 36 is no multiple of plain's patches of 8 pixels"):
        begun(replace(PLAIN, image_size=36), plain)


def test_a_map_over_a_fixed_grid_does_not_fit_another(tmp_path):
    kept_in(tmp_path, insert(host(), 4, kind="dense"))
    recipe = replace(LEARNED, kind="dense")
    model, loaded, _ = begun(recipe, tmp_path)
    assert not differing(model, tokenlearner.load(tmp_path))
    assert loaded == LoadedWeights((), ())
    with pytest.raises(InputError, match=r"don't fit the model: .*token_learner"):
        begun(replace(recipe, image_size=48), tmp_path)


# ---- the TokenLearner


def test_a_plain_source_leaves_the_learner_new(photos, plain, tmp_path):
    summary = train(photos, replace(LEARNED, init=plain), tmp_path)
    trained = tokenlearner.load(tmp_path)
    new = learner_names(trained)
    assert new
    assert differing(trained, tokenlearner.load(plain)) == new
    assert set(summary["init"]["new"]) == new
    assert summary["init"]["unused"] == []
    spec = insertion_of(trained)
    assert spec is not None
    assert (spec.num_tokens, spec.at) == (4, 1)


def test_a_learner_of_the_same_form_is_taken_over(learned):
    model, loaded, _ = begun(LEARNED, learned)
    source = tokenlearner.load(learned)
    assert learner_names(model) == learner_names(source) != set()
    assert not differing(model, source)
    assert loaded == LoadedWeights((), ())


def test_a_learner_stays_behind_when_the_recipe_has_none(learned):
    model, loaded, _ = begun(PLAIN, learned)
    source = tokenlearner.load(learned)
    assert insertion_of(model) is None
    assert differing(model, source) == learner_names(source) == set(loaded.unused)
    assert loaded.kept == ()


def test_a_learner_of_another_number_of_tokens_is_refused_with_the_difference(learned):
    with pytest.raises(InputError, match=rf"{LEARNER}\S+ is \(4, \d+\) there and \(2, \d+\) in the model"):
        begun(replace(LEARNED, tokens=2), learned)


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (("mlp", "softmax"), ("conv", "sum")),  # both have a norm of the same shape, which would be taken over alone
        (("conv", "mean"), ("conv", "sum")),
    ],
)
def test_a_learner_of_another_form_is_refused_where_its_shapes_fit(tmp_path, there, here):
    kept_in(tmp_path, insert(host(), 4, 0.5, there[0], pool=there[1]))
    said = f"blocks.1.token_learner is {there[0]} ({there[1]}) there and {here[0]} ({here[1]}) in the model"
    with pytest.raises(InputError, match=re.escape(said)):
        begun(replace(LEARNED, kind=here[0]), tmp_path)


def test_a_learner_before_another_layer_is_new(learned):
    model, loaded, _ = begun(replace(LEARNED, at=0), learned)
    source = tokenlearner.load(learned)
    assert set(loaded.kept) == learner_names(model)
    assert set(loaded.unused) == learner_names(source)
    assert learner_names(model).isdisjoint(learner_names(source))


@pytest.mark.parametrize("fuser", ["fuser", "unpool", "reproject"])
def test_a_plain_source_gives_the_layers_between_learners_and_fusers(plain, fuser):
    model, loaded, _ = begun(replace(LEARNED, at=0, fuser=fuser), plain)
    new = differing(model, tokenlearner.load(plain))
    assert all("token_learner" in key or "token_fuser" in key for key in new)
    assert {key.split(".")[1] for key in new} == {"0", "1"}
    assert set(loaded.kept) == new


def test_a_fused_model_from_a_plain_source_is_trained_and_saved(photos, plain, tmp_path):
    summary = train(photos, replace(LEARNED, init=plain, fuser="fuser"), tmp_path)
    assert set(summary["init"]["new"]) == differing(tokenlearner.load(tmp_path), tokenlearner.load(plain)) != set()
    assert config_of(tmp_path)["insertion"]["fuser"] == "fuser"


def test_fusers_of_the_same_form_are_taken_over(tmp_path):
    kept_in(tmp_path, insert(host(), 4, 0, fuser="fuser"))
    model, loaded, _ = begun(replace(LEARNED, at=0, fuser="fuser"), tmp_path)
    assert not differing(model, tokenlearner.load(tmp_path))
    assert loaded == LoadedWeights((), ())


def test_extra_layers_start_as_the_identity(plain):
    model, loaded, _ = begun(replace(PLAIN, tokens=4, at=1, extra_layers=1), plain)
    shallow, _, _ = begun(replace(PLAIN, tokens=4, at=1), plain)
    model.load_state_dict({key: shallow.state_dict()[key] for key in learner_names(shallow)}, strict=False)
    with torch.no_grad():
        assert torch.allclose(model.eval()(some_images()), shallow.eval()(some_images()), atol=1e-6)
    assert {key for key in loaded.kept if key not in learner_names(model)} == {
        key for key in model.state_dict() if key.startswith("blocks.2.")
    }


# ---- the host


def test_without_a_model_the_host_is_the_folders_own(photos, tmp_path):
    own = host(embed_dim=32, depth=3, num_heads=4, class_token=False, global_pool="avg", qk_norm=True)
    source = kept_in(tmp_path / "source", own, ("bird", "cat", "dog")[:2])
    train(photos, replace(LEARNED, init=source), tmp_path / "out")
    trained: Any = tokenlearner.load(tmp_path / "out")
    assert differing(trained, tokenlearner.load(source)) == HEAD | learner_names(trained)
    assert (trained.blocks[0].attn.num_heads, trained.global_pool) == (4, "avg")
    assert config_of(tmp_path / "out")["host"]["architecture"] is None
    assert "source on photos" in (tmp_path / "out" / "report.html").read_text()


def test_without_a_model_a_host_of_timms_keeps_its_name(tmp_path):
    kept_in(tmp_path, timm.create_model("test_vit", num_classes=2, img_size=32), preprocessing=None)
    model, _, preprocessing = begun(PLAIN, tmp_path)
    assert model.pretrained_cfg["architecture"] == "test_vit"
    assert not differing(model, tokenlearner.load(tmp_path))
    assert preprocessing is not None
    assert preprocessing == Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.95, "center")


def test_a_model_of_the_same_sizes_takes_a_folders_weights(tmp_path):
    kept_in(tmp_path, timm.create_model("test_vit", num_classes=2, img_size=32))
    model, _, preprocessing = begun(replace(PLAIN, model="test_vit", image_size=48), tmp_path)
    assert differing(model, tokenlearner.load(tmp_path)) == {"pos_embed"}
    assert preprocessing == replace(PREPARED, input_size=(3, 48, 48))


@pytest.mark.parametrize("class_token", [True, False])
def test_a_model_of_another_width_is_refused(tmp_path, class_token):
    pool = "token" if class_token else "avg"
    kept_in(tmp_path, host(patch_size=16, depth=6, class_token=class_token, global_pool=pool))
    with pytest.raises(InputError, match=r"is \(.*\b24\b.*\) there and \(.*\b64\b.*\) in the model"):
        begun(replace(PLAIN, model="test_vit", image_size=32), tmp_path)


def test_a_model_of_another_depth_is_refused(tmp_path):
    kept_in(tmp_path, host(patch_size=16, embed_dim=64, depth=7))
    with pytest.raises(InputError, match=r"the model has no blocks\.6\."):
        begun(replace(PLAIN, model="test_vit", image_size=32), tmp_path)


def test_a_model_of_other_heads_is_refused(tmp_path):
    """Every shape fits, and the model would compute something else."""
    kept_in(tmp_path, timm.create_model("test_vit", num_classes=2, img_size=32, num_heads=4))
    with pytest.raises(InputError, match="attention is of 4 heads there and of 2 heads in the model"):
        begun(replace(PLAIN, model="test_vit", image_size=32), tmp_path)


def test_drop_path_of_the_recipe_reaches_a_host_out_of_a_folder(tmp_path):
    kept_in(tmp_path, host(drop_path_rate=0.4))
    for rate in (0.3, 0.0):
        model, _, _ = begun(replace(PLAIN, drop_path=rate), tmp_path)
        rates = [module.drop_prob for module in model.blocks.modules() if isinstance(module, DropPath)]
        assert max(rates, default=0.0) == pytest.approx(rate)


def test_the_recipes_folder_is_called_by_its_name(plain, monkeypatch):
    monkeypatch.chdir(plain)
    assert build.model_name(Recipe(init=".")) == "plain"
    assert build.model_name(Recipe(init=".", model="test_vit")) == "test_vit"


def test_register_tokens_are_taken_over(tmp_path):
    """Their positions too, which come before those of the patches."""
    kept_in(tmp_path, host(reg_tokens=3, no_embed_class=True))
    model, _, _ = begun(PLAIN, tmp_path)
    assert not differing(model, tokenlearner.load(tmp_path))


def test_register_tokens_with_positions_are_taken_over(tmp_path):
    kept_in(tmp_path, host(reg_tokens=3))
    model, _, _ = begun(PLAIN, tmp_path)
    assert not differing(model, tokenlearner.load(tmp_path))


# ---- images


def test_images_are_prepared_as_the_source_saw_them(photos, plain, tmp_path, monkeypatch):
    """With 0.5 and 0.5, as timm's own model has them, other numbers would come in."""
    seen: list[torch.Tensor] = []
    forward = VisionTransformer.forward

    def look(self, images):
        if self.training:
            seen.append(images)
        return forward(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", look)
    train(photos, replace(PLAIN, init=plain), tmp_path)
    pixels = torch.cat(seen) * torch.tensor(PREPARED.std).view(3, 1, 1) + torch.tensor(PREPARED.mean).view(3, 1, 1)
    assert torch.allclose(pixels * 255, (pixels * 255).round(), atol=1e-3)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert tokenlearner.load(tmp_path).preprocessing == PREPARED


def test_a_source_that_does_not_say_how_to_prepare_images_is_refused(photos, tmp_path):
    source = kept_in(tmp_path / "source", host(), preprocessing=None)
    assert config_of(tmp_path / "source")["preprocessing"] is None
    with pytest.raises(InputError, match=f"{source} does not say how its images are prepared.*preprocessing="):
        train(photos, replace(PLAIN, init=source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_does_not_say_it_goes_by_the_recipes_model(tmp_path):
    kept_in(tmp_path, host(patch_size=16, embed_dim=64, depth=6, mlp_ratio=3), preprocessing=None)
    _, _, preprocessing = begun(replace(PLAIN, model="test_vit", image_size=32), tmp_path)
    assert preprocessing == Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.95, "center")


# ---- timm's names


@pytest.fixture
def fetched(monkeypatch) -> nn.Module:
    """The network, in which timm has weights for test_vit alone."""
    create = timm.create_model
    there = marked(create("test_vit"))

    def create_model(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        if not pretrained:
            return create(name, **options)
        if not name.startswith("test_vit"):
            raise OSError("no network")
        model = create(name, **options)
        own = model.state_dict()
        fitting = {key: value for key, value in there.state_dict().items() if value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)
        return model

    monkeypatch.setattr("tokenlearner.training.build.timm.create_model", create_model)
    return there


def test_a_timm_name_is_model_and_weights(fetched):
    model, loaded, preprocessing = begun(PLAIN, "test_vit.r160_in1k")
    assert differing(model, fetched) == HEAD == set(loaded.kept)
    assert preprocessing == Preprocessing((3, 160, 160), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.95, "center")
    assert build.model_name(Recipe(init="test_vit.r160_in1k")) == "test_vit.r160_in1k"


def test_a_timm_names_weights_go_into_another_size_with_tokens(fetched):
    model, loaded, preprocessing = begun(replace(LEARNED, model="test_vit", image_size=48), "test_vit")
    assert differing(model, fetched) == {"pos_embed", *HEAD, *learner_names(model)}
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(fetched.pos_embed, [3, 3], num_prefix_tokens=1))
    assert set(loaded.kept) == {*HEAD, *learner_names(model)}
    assert preprocessing is not None
    assert preprocessing.input_size == (3, 48, 48)


def test_weights_that_can_not_be_fetched_are_refused_by_name(fetched):
    with pytest.raises(InputError, match=r"vit_tiny_patch16_224.*could not be fetched .*\(OSError\)"):
        begun(replace(PLAIN, model="test_vit"), "vit_tiny_patch16_224")


def test_a_pretrained_models_new_head_has_low_biases_under_the_sigmoid_loss(fetched):
    for classes, biases in ((1000, fetched.head.bias.tolist()), (2, [-10.0, -10.0])):
        recipe = replace(PLAIN, model="test_vit", pretrained=True, loss="sigmoid")
        model: Any = build.build_model(recipe, classes)
        build.prepare_head(model, recipe, None)
        assert model.head.bias.tolist() == biases
        assert torch.equal(model.norm.weight, fetched.norm.weight)


@pytest.mark.parametrize("model", [None, "test_vit"])
@pytest.mark.parametrize("init", ["vit_tiny_patch16_244", "runs/nothing_here"])
def test_an_unknown_name_is_refused_as_init(model, init):
    with pytest.raises(InputError, match=f"init is '{init}': .*folder of a saved model.*timm"):
        begun(replace(PLAIN, model=model), init)


# ---- what is refused


def test_pretrained_and_init_are_two_answers_to_one_question(photos, plain, tmp_path):
    with pytest.raises(InputError, match="pretrained and init"):
        train(photos, replace(PLAIN, model="test_vit", pretrained=True, init=plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _cut_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:-40])


def _without_arguments(folder: Path) -> None:
    config = config_of(folder)
    del config["host"]["arguments"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model", [None, "test_vit"])
@pytest.mark.parametrize("damage", [_cut_weights, _no_weights, _no_config, _cut_config, _without_arguments])
def test_a_damaged_folder_is_refused_before_anything_is_written(photos, tmp_path, model, damage):
    source = kept_in(tmp_path / "source", host())
    damage(tmp_path / "source")
    with pytest.raises(InputError):
        train(photos, replace(PLAIN, model=model, init=source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- training


def first_epoch(photos: Path, recipe: Recipe, output: Path) -> float:
    train(photos, recipe, output)
    with (output / "metrics.csv").open(newline="") as file:
        return float(next(row["train_loss"] for row in csv.DictReader(file) if row.get("train_loss")))


def test_training_goes_on_from_what_was_learned(photos, tmp_path):
    learning = replace(
        LEARNED,
        model="test_vit",
        image_size=16,
        label_smoothing=0.0,
        optimizer=OptimizerRecipe(lr=2e-3, warmup_epochs=0),
    )
    scratch = first_epoch(photos, replace(learning, epochs=5), tmp_path / "first")
    before = tokenlearner.load(tmp_path / "first").state_dict()
    again = replace(learning, init=str(tmp_path / "first"), image_size=32)
    further = first_epoch(photos, again, tmp_path / "second")
    assert further < 0.5 * scratch
    after = tokenlearner.load(tmp_path / "second").state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[key], after[key]) for key in before if before[key].shape == after[key].shape)


def test_the_recipe_and_the_summary_keep_where_it_began(photos, plain, tmp_path, capsys):
    """Through the command line."""
    arguments = "--epochs 1 --batch-size 8 --workers 0 --tokens 2 --optimizer.lr 0 --optimizer.min-lr 0 --json"
    main(["train", str(photos), "--init", plain, "--output", str(tmp_path), *arguments.split()])
    printed = json.loads(capsys.readouterr().out)
    trained = tokenlearner.load(tmp_path)
    assert printed["init"]["from"] == plain
    assert set(printed["init"]["new"]) == learner_names(trained) != set()
    assert printed["init"]["unused"] == []
    assert json.loads((tmp_path / "summary.json").read_text())["init"] == printed["init"]
    assert json.loads((tmp_path / "recipe.json").read_text())["init"] == plain
    assert differing(trained, tokenlearner.load(plain)) == learner_names(trained)


def test_a_run_from_init_goes_on_where_it_stopped(photos, plain, tmp_path, monkeypatch):
    """The checkpoint's weights, not those it began with."""
    recipe = replace(LEARNED, init=plain, epochs=2, optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=0))
    train(photos, recipe, tmp_path / "whole")
    write, stop = tokenlearner.training.train.save, RuntimeError("stopped")

    def save_and_stop(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        raise stop

    monkeypatch.setattr(tokenlearner.training.train, "save", save_and_stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train(photos, recipe, tmp_path / "parts")
    monkeypatch.undo()
    train(photos, recipe, tmp_path / "parts", resume=True)
    assert not differing(tokenlearner.load(tmp_path / "whole"), tokenlearner.load(tmp_path / "parts"))


def test_the_learner_of_the_folder_is_kept_where_the_recipe_names_none(tmp_path, photos):
    model = tokenlearner.insert(host(), 3, at=1, kind="conv", pool="mean")
    folder = kept_in(tmp_path, model)
    kept = insertion_of(build.build_model(Recipe(init=str(folder)), 2))
    assert (kept.num_tokens, kept.at, kept.kind, kept.pool) == (3, 1, "conv", "mean")
    assert insertion_of(build.build_model(Recipe(init=str(folder), tokens=5), 2)).num_tokens == 5


def test_a_published_model_keeps_its_own_learner():
    published = "tokenlearner_micro4_32_8at3_mlp"
    assert insertion_of(build.build_model(Recipe(model=published), 2, on="meta")).at == 3
    assert insertion_of(build.build_model(Recipe(init=published), 2, on="meta")).at == 3
    with pytest.raises(InputError, match="already has"):
        build.build_model(Recipe(model=published, tokens=4), 2, on="meta")


def test_one_channel_is_trained_in_grey(tmp_path, photos):
    grey = timm.create_model("test_vit", num_classes=2, img_size=32, in_chans=1)
    folder = kept_in(tmp_path, grey, preprocessing=None)
    summary = train(photos, replace(PLAIN, init=str(folder)), tmp_path / "grey")
    assert summary["models"][0]["accuracy"] >= 0
    assert tokenlearner.load(tmp_path / "grey").patch_embed.proj.in_channels == 1
