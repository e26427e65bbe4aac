"""Insertion into transformers' models, compared with their layers called by hand."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tokenlearner
from insertion.hosts import inserted, learn, shake, spread_back
from tokenlearner.core import Unpool
from tokenlearner.core.learner import KINDS
from tokenlearner.errors import InputError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DEPTH, TOKENS = 3, 2
SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
IMAGE = {**SIZES, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
CLIP = {**SIZES, "intermediate_size": 32, "image_size": 16, "patch_size": 8, "num_frames": 6}


@dataclass
class Case:
    """One architecture: how its tiny host is made, and how its parts are called by hand."""

    host: str
    config: str
    options: dict[str, Any]
    path: str
    layers: str
    prefix: int
    finish: Callable[[Any, Any, Tensor], Tensor]
    embed: Callable[[Any, Tensor], Tensor] = lambda tower, x: tower.embeddings(x)
    grid: tuple[int, ...] = (4, 4)
    after: bool = True
    output: str = "logits"
    extra: dict[str, Any] = field(default_factory=dict)

    def model(self, host: str | None = None, **options: Any) -> Any:
        config = getattr(transformers, self.config)(**{**self.options, **options}, num_labels=3)
        model = getattr(transformers, host or self.host)(config).eval()
        shake(*model.parameters())
        return model

    def images(self, batch: int = 2) -> Tensor:
        shape = (6, 3, 16, 16) if len(self.grid) == 3 else (3, 32, 32)
        return torch.randn(batch, *shape)


def token(model: Any, tower: Any, x: Tensor) -> Tensor:
    return model.classifier(tower.layernorm(x)[:, 0])


def mean_of_patches(model: Any, tower: Any, x: Tensor) -> Tensor:
    return model.classifier(tower.pooler.layernorm(x[:, 1:].mean(1)))


def token_and_mean(prefix: int) -> Callable[[Any, Any, Tensor], Tensor]:
    def finish(model: Any, tower: Any, x: Tensor) -> Tensor:
        x = tower.layernorm(x)
        return model.classifier(torch.cat([x[:, 0], x[:, prefix:].mean(1)], dim=1))

    return finish


def siglip(model: Any, tower: Any, x: Tensor) -> Tensor:
    return tower.head(tower.post_layernorm(x))


def siglip_classes(model: Any, tower: Any, x: Tensor) -> Tensor:
    return model.classifier(tower.post_layernorm(x).mean(1))


VISION = IMAGE
CASES = {
    "vit": Case("ViTForImageClassification", "ViTConfig", IMAGE, "vit", "layers", 1, token),
    "vit model": Case(
        "ViTModel",
        "ViTConfig",
        IMAGE,
        "",
        "layers",
        1,
        lambda model, tower, x: tower.pooler(tower.layernorm(x)),
        output="pooler_output",
    ),
    "deit": Case("DeiTForImageClassification", "DeiTConfig", IMAGE, "deit", "layers", 2, token),
    "deit with teacher": Case(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        IMAGE,
        "deit",
        "layers",
        2,
        lambda model, tower, x: (
            (model.cls_classifier(tower.layernorm(x)[:, 0]) + model.distillation_classifier(tower.layernorm(x)[:, 1]))
            / 2
        ),
    ),
    "beit": Case(
        "BeitForImageClassification",
        "BeitConfig",
        {**IMAGE, "use_relative_position_bias": True},
        "beit",
        "layers",
        1,
        mean_of_patches,
    ),
    "beit, shared bias": Case(
        "BeitForImageClassification",
        "BeitConfig",
        {**IMAGE, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
        "beit",
        "layers",
        1,
        token,
    ),
    "dinov2": Case(
        "Dinov2ForImageClassification", "Dinov2Config", IMAGE, "dinov2", "encoder.layer", 1, token_and_mean(1)
    ),
    "dinov2 with registers": Case(
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        IMAGE,
        "dinov2_with_registers",
        "encoder.layer",
        5,
        token_and_mean(5),
    ),
    "dinov3": Case(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**IMAGE, "num_register_tokens": 2},
        "",
        "model.layer",
        3,
        lambda model, tower, x: tower.norm(x),
        output="last_hidden_state",
    ),
    "clip": Case(
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": VISION},
        "vision_model",
        "encoder.layers",
        1,
        lambda model, tower, x: model.classifier(x[:, 1:].mean(1)),
        embed=lambda tower, x: tower.pre_layrnorm(tower.embeddings(x)),
        after=False,
    ),
    "clip model": Case(
        "CLIPVisionModel",
        "CLIPVisionConfig",
        VISION,
        "",
        "encoder.layers",
        1,
        lambda model, tower, x: tower.post_layernorm(x[:, 0]),
        embed=lambda tower, x: tower.pre_layrnorm(tower.embeddings(x)),
        after=False,
        output="pooler_output",
    ),
    "clip with projection": Case(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        VISION,
        "vision_model",
        "encoder.layers",
        1,
        lambda model, tower, x: model.visual_projection(tower.post_layernorm(x[:, 0])),
        embed=lambda tower, x: tower.pre_layrnorm(tower.embeddings(x)),
        after=False,
        output="image_embeds",
    ),
    "siglip": Case(
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": VISION},
        "vision_model",
        "encoder.layers",
        0,
        siglip_classes,
    ),
    "siglip model": Case(
        "SiglipVisionModel", "SiglipVisionConfig", VISION, "", "encoder.layers", 0, siglip, output="pooler_output"
    ),
    "vivit": Case(
        "VivitForVideoClassification",
        "VivitConfig",
        {**CLIP, "tubelet_size": [2, 8, 8]},
        "vivit",
        "layers",
        1,
        token,
        grid=(3, 2, 2),
    ),
    "videomae": Case(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        CLIP,
        "videomae",
        "encoder.layer",
        0,
        lambda model, tower, x: model.classifier(model.fc_norm(x.mean(1))),
        embed=lambda tower, x: tower.embeddings(x, None),
        grid=(3, 2, 2),
        after=False,
    ),
    "vjepa2": Case(
        "VJEPA2ForVideoClassification",
        "VJEPA2Config",
        {**SIZES, "crop_size": 16, "patch_size": 8, "frames_per_clip": 6, "mlp_ratio": 2, "num_pooler_layers": 1}
        | {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1},
        "vjepa2",
        "encoder.layer",
        0,
        lambda model, tower, x: model.classifier(model.pooler(tower.encoder.layernorm(x))),
        embed=lambda tower, x: tower.encoder.embeddings(x),
        grid=(3, 2, 2),
    ),
}
NAMES = sorted(CASES)


def on_grid(case: Case, tower: Any, layer: Any, x: Tensor, images: Tensor) -> Tensor:
    """The layer as the host calls it."""
    if case.config == "DINOv3ViTConfig":
        return layer(x, position_embeddings=tower.rope_embeddings(images))
    if case.config == "BeitConfig":
        size = tuple(images.shape[2:])
        shared = tower.shared_position_bias
        mask = None if shared is None else shared((size[0] // 8, size[1] // 8))
        return layer(x, attention_mask=mask, resolution=size)
    if case.config == "VJEPA2Config":
        return layer(x, None)[0]
    return layer(x) if case.config == "VideoMAEConfig" else layer(x, None)


def off_grid(case: Case, tower: Any, layer: Any, x: Tensor) -> Tensor:
    """The layer on tokens that have no place: no rotation, and no bias but the class token's."""
    if case.config == "DINOv3ViTConfig":
        return layer(x, position_embeddings=(torch.ones(x.shape[1], 12), torch.zeros(x.shape[1], 12)))
    if case.config == "BeitConfig":
        table = (tower.shared_position_bias or layer.relative_position_bias).relative_position_bias_table
        bias = torch.zeros(1, 2, x.shape[1], x.shape[1])
        for head in range(2):
            bias[0, head, 0, :] = table[-3, head]
            bias[0, head, :, 0] = table[-2, head]
            bias[0, head, 0, 0] = table[-1, head]
        h = x + layer.lambda_1 * layer.attention(layer.layernorm_before(x), attention_mask=bias)[0]
        return h + layer.lambda_2 * layer.mlp(layer.layernorm_after(h))
    if case.config == "VJEPA2Config":
        attention, y = layer.attention, layer.norm1(x)
        q, k, v = (
            m(y).unflatten(-1, (2, -1)).transpose(1, 2) for m in (attention.query, attention.key, attention.value)
        )
        A = (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1)
        h = x + attention.proj((A @ v).transpose(1, 2).flatten(-2))
        return h + layer.mlp(layer.norm2(h))
    return on_grid(case, tower, layer, x, torch.empty(0))


def by_hand(
    case: Case, host: Any, model: nn.Module, images: Tensor, grid: tuple[int, ...] | None = None, **embedding: Any
) -> Tensor:
    """The output of ``model``: the parts of ``host``, the learners and the fusers called one after the other."""
    tower = host.get_submodule(case.path)
    layers = tower.get_submodule(case.layers)
    count, grid = case.prefix, grid or case.grid
    slices, frame = (grid[0] if len(grid) == 3 else 1), grid[-2:]
    found = tokenlearner.learners(model)
    carriers = model.get_submodule(case.path).get_submodule(case.layers)
    x = case.embed(tower, images) if not embedding else tower.embeddings(images, **embedding)
    lost = False
    for i in range(DEPTH + 1):
        fuser = getattr(carriers[i], "token_fuser", None) if i < DEPTH else None
        Xs, learned = [], []
        if i in found:
            Xs = list(x[:, count:].chunk(slices, dim=1))
            learned = [learn(found[i], X, frame, with_maps=isinstance(fuser, Unpool)) for X in Xs]
            x = torch.cat([x[:, :count], *(Z for Z, _ in learned)], dim=1)
            lost = True
        if i < DEPTH:
            x = off_grid(case, tower, layers[i], x) if lost else on_grid(case, tower, layers[i], x, images)
        if fuser is not None:
            Ys = x[:, count:].chunk(slices, dim=1)
            back = [X + spread_back(fuser, Y, X, A) for X, Y, (_, A) in zip(Xs, Ys, learned)]
            x, lost = torch.cat([x[:, :count], *back], dim=1), False
    return case.finish(host, tower, x)


def places(name: str) -> list[int]:
    return [0, 1, DEPTH] if CASES[name].after else [0, 1]


@pytest.mark.parametrize(("name", "at"), [(name, at) for name in NAMES for at in places(name)])
def test_the_output_is_that_of_the_parts_called_by_hand(name: str, at: int) -> None:
    case = CASES[name]
    host, images = case.model(), case.images()
    model = inserted(host, TOKENS, at)
    assert_close(getattr(model(images), case.output), by_hand(case, host, model, images))


@pytest.mark.parametrize("fuser", ["fuser", "unpool", "reproject"])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_fuser_too(name: str, fuser: str) -> None:
    case = CASES[name]
    host, images = case.model(), case.images()
    model = inserted(host, TOKENS, 1, fuser=fuser)
    assert_close(getattr(model(images), case.output), by_hand(case, host, model, images))


@pytest.mark.parametrize("name", ["beit", "beit, shared bias", "dinov3", "vit", "vjepa2"])
def test_eager_attention_gives_the_same(name: str) -> None:
    model, images = inserted(CASES[name].model(), TOKENS, 1), CASES[name].images()
    before = getattr(model(images), CASES[name].output)
    model.set_attn_implementation("eager")
    assert_close(getattr(model(images), CASES[name].output), before)


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2", "dinov3", "clip"])
def test_images_need_not_be_square(name: str) -> None:
    case = CASES[name]
    host, images = case.model(), torch.randn(2, 3, 16, 40)
    model = inserted(host, TOKENS, 1)
    options = {"interpolate_pos_encoding": True} if name in ("vit", "clip") else {}
    if name == "clip":
        case = copy.copy(case)
        case.embed = lambda tower, x: tower.pre_layrnorm(tower.embeddings(x, interpolate_pos_encoding=True))
        expected = by_hand(case, host, model, images, (2, 5))
    else:
        expected = by_hand(case, host, model, images, (2, 5), **options)
    assert_close(getattr(model(images, **options), case.output), expected)


@pytest.mark.parametrize("name", NAMES)
def test_removal_leaves_the_host_as_it_was(name: str) -> None:
    host, images = CASES[name].model(), CASES[name].images()
    for fuser in (None, "fuser"):
        model = inserted(host, TOKENS, 1, fuser=fuser, extra_layers=1)
        tokenlearner.remove(model)
        assert type(model) is type(host)
        assert type(model.config) is type(host.config)
        assert model.config.to_dict() == host.config.to_dict()
        assert list(model.state_dict()) == list(host.state_dict())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert torch.equal(getattr(model(images), CASES[name].output), getattr(host(images), CASES[name].output))


@pytest.mark.parametrize("name", NAMES)
def test_the_hosts_own_keys_stay(name: str) -> None:
    host = CASES[name].model()
    for fuser in (None, "fuser"):
        keys = [k for k in inserted(host, TOKENS, 1, fuser=fuser).state_dict() if ".token_" not in k]
        assert sorted(keys) == sorted(host.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_extra_layers_start_as_the_identity(name: str) -> None:
    host, images = CASES[name].model(), CASES[name].images()
    model = tokenlearner.insert(copy.deepcopy(host), TOKENS, DEPTH, fuser="fuser", extra_layers=2)
    assert torch.equal(getattr(model(images), CASES[name].output), getattr(host(images), CASES[name].output))
    assert len(tokenlearner.learners(model)) == 2


@pytest.mark.parametrize("fuser", [None, "fuser"])
@pytest.mark.parametrize("name", NAMES)
def test_the_learner_gets_a_gradient_with_checkpointing_and_without(name: str, fuser: str | None) -> None:
    case = CASES[name]
    model, images = inserted(case.model(), TOKENS, 1, fuser=fuser).train(), case.images()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        getattr(model(images), case.output).square().sum().backward()
        found.append([p.grad.clone() for p in tokenlearner.learners(model)[1].parameters()])
    assert all(grad.abs().sum() > 0 for grad in found[0][:-1])  # a constant added to all logits changes no softmax
    for before, after in zip(*found):
        assert_close(before, after)


@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_covers_fused_layers(before: bool) -> None:
    model = CASES["vit"].model()
    if before:
        model.activation_checkpointing_enable()
    tokenlearner.insert(model, TOKENS, 1, fuser="fuser")
    if not before:
        model.activation_checkpointing_enable()
    assert model.vit.layers[1].gradient_checkpointing
    assert not model.vit.layers[1].block.gradient_checkpointing
    tokenlearner.remove(model)
    assert model.vit.layers[1].gradient_checkpointing


@pytest.mark.parametrize("name", NAMES)
def test_attention_maps_lie_on_the_grid(name: str) -> None:
    case = CASES[name]
    model = inserted(case.model(), TOKENS, 1, fuser="fuser")
    maps = tokenlearner.attention_maps(model, case.images())
    *slices, h, w = case.grid
    assert {i: tuple(m.shape) for i, m in maps.items()} == dict.fromkeys((1, 2), (2, *slices, TOKENS, h, w))


@pytest.mark.parametrize(("mix", "over", "fuser"), [("clip", "slice", "fuser"), ("slice", "window", None)])
@pytest.mark.parametrize("name", ["vivit", "videomae", "vjepa2"])
def test_clips_take_what_looks_over_time(name: str, mix: str, over: str, fuser: str | None) -> None:
    options = {"window": 3} if over == "window" else {}
    model = inserted(CASES[name].model(), TOKENS, 1, fuser=fuser, mix=mix, over=over, **options)
    out = model(CASES[name].images(), output_hidden_states=True)
    tokens = CASES[name].prefix + (12 if fuser else TOKENS)
    assert out.logits.shape == (2, 3)
    assert out.hidden_states[-2].shape[1] == tokens


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_those_of_every_layer(name: str) -> None:
    case, images = CASES[name], CASES[name].images()
    host = case.model()
    host(images, output_hidden_states=True)  # transformers' hooks are on the layers before the insertion
    n = case.prefix + torch.Size(case.grid).numel()
    s = case.prefix + TOKENS * (3 if len(case.grid) == 3 else 1)
    for fuser, expected in ((None, [n, n, s, s]), ("fuser", [n, n, n, n])):
        model = inserted(host, TOKENS, 1, fuser=fuser)
        out = model(images, output_hidden_states=True)
        assert [h.shape[1] for h in out.hidden_states] == expected
        assert torch.equal(getattr(model(images), case.output), getattr(out, case.output))


def test_attentions_are_those_of_every_layer() -> None:
    model = inserted(CASES["vit"].model(), TOKENS, 1)
    model.set_attn_implementation("eager")
    attentions = model(CASES["vit"].images(), output_attentions=True).attentions
    assert [a.shape[-1] for a in attentions] == [17, 3, 3]


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading_gives_the_same_model(name: str, tmp_path: Path) -> None:
    case, images = CASES[name], CASES[name].images()
    for fuser in (None, "fuser"):
        model = inserted(case.model(), TOKENS, 1, fuser=fuser, extra_layers=1, hidden_dim=16)
        model.save_pretrained(tmp_path)
        again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(report.values())
        assert tokenlearner.insertion_of(again) == tokenlearner.insertion_of(model)
        assert torch.equal(getattr(again(images), case.output), getattr(model(images), case.output))
        tokenlearner.remove(again)
        assert type(again) is getattr(transformers, case.host)


@pytest.mark.parametrize("kind", KINDS)
def test_learners_of_every_kind_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, images = inserted(CASES["vit"].model(), 4, 1, kind=kind), CASES["vit"].images()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_learner_with_a_weight_for_each_place_has_the_hosts_grid(name: str) -> None:
    learners = tokenlearner.learners(inserted(CASES[name].model(), TOKENS, 1, kind="dense"))
    assert learners[1].grid == CASES[name].grid[-2:]


def test_the_hosts_grid_need_not_be_square() -> None:
    model = inserted(CASES["vit"].model(image_size=[16, 40]), TOKENS, 1, kind="dense")
    assert model(torch.randn(2, 3, 16, 40)).logits.shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_the_auto_classes_find_it(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if name == "clip with projection":
        pytest.skip("no auto class of transformers is for it")
    model = inserted(case.model(), TOKENS, 1)
    model.save_pretrained(tmp_path)
    kind = (
        "AutoModel"
        if case.output != "logits"
        else f"AutoModelFor{'Video' if len(case.grid) == 3 else 'Image'}Classification"
    )
    again = getattr(transformers, kind).from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(getattr(again(x := case.images()), case.output), getattr(model(x), case.output))


def test_a_loaded_checkpoint_is_saved_and_loaded_with_its_insertion(tmp_path: Path) -> None:
    CASES["vit"].model("ViTModel").save_pretrained(tmp_path / "plain")  # under the older names of its parameters
    model = inserted(transformers.ViTModel.from_pretrained(tmp_path / "plain"), TOKENS, 1)
    model.save_pretrained(tmp_path / "inserted")
    again = transformers.AutoModel.from_pretrained(tmp_path / "inserted")
    images = CASES["vit"].images()
    assert torch.equal(again(images).pooler_output, model(images).pooler_output)


def test_a_headless_save_loads_into_a_classifier(tmp_path: Path) -> None:
    model = inserted(CASES["vit model"].model(), TOKENS, 1)
    model.save_pretrained(tmp_path)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=4)
    images = CASES["vit"].images()
    assert torch.equal(classifier.vit(images).last_hidden_state, model(images).last_hidden_state)
    assert classifier(images).logits.shape == (2, 4)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    model = inserted(CASES["vit"].model().bfloat16(), TOKENS, 1, fuser="fuser")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(p.dtype == torch.bfloat16 for p in again.parameters())


def test_another_model_of_the_same_config_stays_as_it_is() -> None:
    config = transformers.ViTConfig(**IMAGE)
    one, other = transformers.ViTModel(config), transformers.ViTModel(config)
    tokenlearner.insert(one, TOKENS, 1)
    assert not hasattr(other.config, "token_learner")
    assert one.layers[0].attention.config is one.config


@pytest.mark.parametrize("fuser", [None, "fuser"])
def test_copies_and_pickles_are_models_of_their_own(fuser: str | None) -> None:
    model, images = inserted(CASES["beit"].model(), TOKENS, 1, fuser=fuser), CASES["beit"].images()
    expected = model(images).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images).logits, expected)
        tokenlearner.remove(other)
    assert torch.equal(model(images).logits, expected)


def test_a_pipeline_classifies_with_it(tmp_path: Path) -> None:
    from PIL import Image

    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model = inserted(CASES["vit"].model(), TOKENS, 1)
    picture = Image.new("RGB", (50, 40), "red")
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    scores = classify(picture)
    logits = model(**processor(picture, return_tensors="pt")).logits
    assert scores[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-6)

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert transformers.pipeline("image-classification", model=str(tmp_path))(picture) == scores


def test_the_vision_tower_of_a_two_tower_model() -> None:
    text = {**SIZES, "intermediate_size": 32, "vocab_size": 20, "max_position_embeddings": 8, "projection_dim": 8}
    config = transformers.CLIPConfig(vision_config=VISION, text_config=text, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    ids, images = torch.tensor([[1, 2, 19]]), CASES["clip"].images()
    before = model(input_ids=ids, pixel_values=images)
    tokenlearner.insert(model.vision_model, TOKENS, 1)
    after = model(input_ids=ids, pixel_values=images)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.equal(after.image_embeds, before.image_embeds)
    tokenlearner.remove(model.vision_model)
    assert torch.equal(model(input_ids=ids, pixel_values=images).image_embeds, before.image_embeds)


@pytest.mark.parametrize("name", NAMES)
def test_cost_counts_tokens_of_every_layer(name: str) -> None:
    case = CASES[name]
    model = inserted(case.model(), TOKENS, 1)
    size = tuple(case.images().shape[1:])
    n = case.prefix + torch.Size(case.grid).numel()
    s = case.prefix + TOKENS * (3 if len(case.grid) == 3 else 1)
    found = tokenlearner.cost(model, size)
    assert found.tokens == (n, s, s)
    assert found.macs < tokenlearner.cost(case.model(), size).macs
    model(case.images())  # nothing of the count stays behind


def test_beit_finds_its_biases_after_a_count() -> None:
    model = CASES["beit"].model(image_size=24)
    tokenlearner.cost(model, (3, 24, 24))  # of a grid that no other test has run on
    index = model.beit.layers[0].relative_position_bias.generate_relative_position_index((3, 3))
    assert index.device.type == "cpu"
    assert model(torch.randn(1, 3, 24, 24)).logits.isfinite().all()


@pytest.mark.filterwarnings("default")  # PyTorch's own, from inside its compiler
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", ["beit", "beit, shared bias", "dinov3", "vjepa2"])
def test_it_compiles_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model, images = inserted(CASES[name].model(), TOKENS, 1), CASES[name].images()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(getattr(compiled(images), CASES[name].output), getattr(model(images), CASES[name].output))


FRESH = """
import sys
import torch
import tokenlearner.insertion.huggingface
from transformers import AutoModelForImageClassification
one = AutoModelForImageClassification.from_pretrained(sys.argv[1])
other = torch.load(sys.argv[2], weights_only=False)
images = torch.ones(1, 3, 32, 32)
assert torch.equal(one(images).logits, other(images).logits)
assert len(one(images, output_hidden_states=True).hidden_states) == 4
"""


def test_another_process_loads_it(tmp_path: Path) -> None:
    model = inserted(CASES["vit"].model(), TOKENS, 1, fuser="fuser")
    model.save_pretrained(tmp_path)
    torch.save(model, tmp_path / "pickled.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), str(tmp_path / "pickled.pt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


REFUSED = {
    "ViTMAEModel": ("random order", "ViTMAEConfig", IMAGE),
    "ViTMAEForPreTraining": ("random order", "ViTMAEConfig", {**IMAGE, "decoder_num_attention_heads": 2}),
    "TimesformerModel": ("time and space in turn", "TimesformerConfig", CLIP),
    "Siglip2VisionModel": ("SiglipVisionModel, which is served", "Siglip2VisionConfig", SIZES),
    "ViTForMaskedImageModeling": ("no host that is known", "ViTConfig", IMAGE),
    "Dinov2Backbone": ("no host that is known", "Dinov2Config", IMAGE),
    "VideoMAEForPreTraining": ("no host that is known", "VideoMAEConfig", CLIP),
    "CLIPModel": ("insert into its vision_model", "CLIPConfig", {"vision_config": VISION, "text_config": SIZES}),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_that_would_come_out_wrong_is_refused(name: str) -> None:
    reason, config, options = REFUSED[name]
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**options))
    with pytest.raises(TypeError, match=reason):
        tokenlearner.insert(model, TOKENS, 1)


class OwnViT(transformers.ViTModel):
    pass


def test_a_class_of_ones_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"OwnViT is a class of your own.* insert into a ViTModel"):
        tokenlearner.insert(OwnViT(transformers.ViTConfig(**IMAGE)), TOKENS, 1)


def test_a_model_in_which_there_is_an_insertion_is_refused() -> None:
    model = CASES["vit"].model()
    tokenlearner.insert(model.vit, TOKENS, 1)
    with pytest.raises(ValueError, match=r"already has a TokenLearner in vit.layers.1; remove it"):
        tokenlearner.insert(model, TOKENS, 1)


@pytest.mark.parametrize("name", [name for name in NAMES if not CASES[name].after])
def test_where_nothing_follows_the_last_layer_there_is_no_place_after_it(name: str) -> None:
    host, images = CASES[name].model(), CASES[name].images()
    model = copy.deepcopy(host)
    with pytest.raises(ValueError, match=rf"at={DEPTH} is after the last .* no module there that all tokens pass"):
        tokenlearner.insert(model, TOKENS, DEPTH)
    assert type(model) is type(host)
    assert torch.equal(getattr(model(images), CASES[name].output), getattr(host(images), CASES[name].output))


@pytest.mark.parametrize("name", ["vit", "beit", "beit, shared bias", "dinov2"])
def test_a_mask_over_patches_is_refused(name: str) -> None:
    model = inserted(CASES[name].model(), TOKENS, 1)
    mask = torch.ones(2, 17)
    mask[:, 5] = 0
    with pytest.raises(ValueError, match="an attention mask over the patches does not fit the learned tokens"):
        model(CASES[name].images(), attention_mask=mask)


def test_dropped_patches_are_refused() -> None:
    model = inserted(CASES["videomae"].model("VideoMAEModel"), TOKENS, 1)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, ::2] = True
    with pytest.raises(ValueError, match="6 tokens reached the TokenLearner"):
        model(CASES["videomae"].images(), bool_masked_pos=mask)


def test_the_predictor_of_vjepa2_runs_only_on_the_grid() -> None:
    host, clips = CASES["vjepa2"].model("VJEPA2Model"), CASES["vjepa2"].images()
    model = inserted(host, TOKENS, 1)
    assert model(clips).predictor_output is None
    with pytest.raises(ValueError, match="call with skip_predictor=True, or insert with a fuser"):
        model(clips, skip_predictor=False)
    with pytest.raises(ValueError, match="context_mask and target_mask pick places of the grid"):
        model(clips, context_mask=[torch.arange(4)[None]], target_mask=[torch.arange(4)[None]])
    assert inserted(host, TOKENS, 1, fuser="fuser")(clips).predictor_output is not None


def test_an_insertion_that_is_not_understood_is_not_loaded(tmp_path: Path) -> None:
    config = inserted(CASES["vit"].model(), TOKENS, 1).config
    config.token_learner = {**config.token_learner, "host_depth": 9}
    with pytest.raises(InputError, match="made for a host of 9 layers, but this one has 3"):
        transformers.AutoModel.from_config(config)
    config.token_learner = {"colour": "red"}
    with pytest.raises(InputError, match="token_learner is not understood"):
        transformers.AutoModel.from_config(config)


def test_our_own_save_says_how_to_save_it(tmp_path):
    model = inserted(CASES["vit"].model(), TOKENS, 1)
    with pytest.raises(InputError, match=r"is a model of transformers: save it with model\.save_pretrained\(folder\)"):
        tokenlearner.save(model, tmp_path)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("family", ["vit", "beit"])  # the layers of the latter also lose a bias
def test_a_model_compiled_after_its_host_runs_as_itself(family):
    """torch.compile keeps its code by class and does not look at hooks, so the host's could serve the other."""
    host, x = CASES[family].model(), CASES[family].images()
    torch._dynamo.reset()
    for model in (host, inserted(host, TOKENS, 1), host):
        assert_close(torch.compile(copy.deepcopy(model), backend="eager")(x).logits, model(x).logits)
    torch._dynamo.reset()
