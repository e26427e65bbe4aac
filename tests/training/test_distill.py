"""Learning from a teacher: what is minimised, that the teacher is left alone, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from noisy_photos import draw_photos
from PIL import Image
from torch import nn
from whole_runs import brief_timing, stopped_at_first_checkpoint

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.training.distill import Distilled, Seen, classifier_of, distance, watched
from tokenlearner.training.recipe import AugmentRecipe, DistillRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.train import train

RECIPE = Recipe(
    model="test_vit",
    image_size=32,
    tokens=0,
    epochs=1,
    batch_size=8,
    workers=0,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=0),
    augment=AugmentRecipe(auto_augment=None, color_jitter=0.0),
)


@pytest.fixture(autouse=True)
def _no_long_timing(monkeypatch) -> None:
    brief_timing(monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 10)


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "teacher"
    with pytest.MonkeyPatch.context() as patched:
        brief_timing(patched)
        train(photos, RECIPE, output)
    return output


def test_the_distance_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    seen, taught = (
        Seen(student, torch.tensor([[1.0, 0.0], [1.0, 1.0]])),
        Seen(teacher, torch.tensor([[0.0, 2.0], [3.0, 3.0]])),
    )
    soft = [(x / 2).softmax(-1) for x in (student, teacher)]
    kl = (soft[1] * (soft[1] / soft[0]).log()).sum(-1).mean()
    assert distance(seen, taught, DistillRecipe(temperature=2.0), "cross_entropy") == pytest.approx(
        float(4 * kl), rel=1e-5
    )
    features = distance(seen, taught, DistillRecipe(logits=0.0, features=3.0), "cross_entropy")
    assert features == pytest.approx(3 * (1 - (0 + 1) / 2), rel=1e-5)
    p, q = (x.sigmoid() for x in (student, teacher))
    each = -(q * p.log() + (1 - q) * (1 - p).log()).sum(-1).mean()
    assert distance(seen, taught, DistillRecipe(), "sigmoid") == pytest.approx(float(each), rel=1e-5)
    same = Seen(student, seen.features)
    assert distance(same, same, DistillRecipe(features=1.0), "cross_entropy") == pytest.approx(0.0, abs=1e-6)


def test_features_of_other_widths_are_not_compared():
    narrow, wide = (Seen(torch.zeros(2, 3), torch.ones(2, width)) for width in (4, 6))
    with pytest.raises(InputError, match="have 4 numbers where the teacher's have 6: set it to 0"):
        distance(narrow, wide, DistillRecipe(features=1.0), "cross_entropy")
    assert distance(narrow, wide, DistillRecipe(features=0.0), "cross_entropy") == 0


def test_the_teacher_is_no_part_of_what_is_trained():
    model, teacher = nn.Linear(3, 2), nn.Linear(3, 2).train()
    module = Distilled(model, Recipe(), 2, teacher=teacher)
    assert {name for name, _ in module.named_parameters()} == {"model.weight", "model.bias"}
    assert all("teacher" not in key for key in module.state_dict())
    module.train()
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_features_are_what_the_head_reads():
    model = tokenlearner.insert(timm.create_model("test_vit", num_classes=3, img_size=32), 2)
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    with watched(classifier_of(model)) as kept:
        model(x)
    assert torch.equal(kept[0], model.forward_head(model.forward_features(x), pre_logits=True))
    assert not model.head._forward_pre_hooks


def test_a_copy_that_learns_from_its_host_alone_stays_what_it_is(photos, teacher, tmp_path):
    """Of equal models every distance is at its least, so nothing moves; with labels it does."""
    recipe = replace(
        RECIPE,
        model=None,
        init=str(teacher),
        distill=DistillRecipe(str(teacher), labels=0.0, logits=1.0, features=1.0),
        optimizer=OptimizerRecipe("sgd", lr=1e-2, weight_decay=0.0, warmup_epochs=0),
    )
    before = tokenlearner.load(teacher).state_dict()

    def moved(recipe: Recipe, name: str) -> float:
        train(photos, recipe, tmp_path / name)
        after = tokenlearner.load(tmp_path / name).state_dict()
        return max(float((after[key] - value).abs().max()) for key, value in before.items())

    assert moved(recipe, "alone") < 1e-5
    assert moved(replace(recipe, distill=replace(recipe.distill, labels=1.0)), "labels") > 1e-4
    assert torch.equal(tokenlearner.load(teacher).state_dict()["head.weight"], before["head.weight"])


def test_an_inserted_student_comes_nearer_to_its_teacher(photos, tmp_path):
    """Without labels; the teacher's weights are random, so that its answers differ from picture to picture."""
    host = timm.create_model("test_vit", num_classes=2, img_size=32)
    with torch.no_grad():
        for block in host.blocks:
            block.attn.proj.weight.mul_(20)
        host.head.weight.normal_()
    tokenlearner.save(host, tmp_path / "host", labels=("blue", "red"))
    recipe = replace(
        RECIPE,
        model=None,
        init=str(tmp_path / "host"),
        tokens=2,
        at=0,
        epochs=20,
        held_out=0.1,
        optimizer=OptimizerRecipe("muon", lr=5e-3, warmup_epochs=2),
        distill=DistillRecipe(str(tmp_path / "host"), labels=0.0, features=1.0),
        augment=AugmentRecipe(None, scale=(0.7, 1.0), color_jitter=0.0),
    )
    train(photos, recipe, tmp_path / "run")
    host, student = tokenlearner.load(tmp_path / "host"), tokenlearner.load(tmp_path / "run")
    untrained = tokenlearner.insert(tokenlearner.load(tmp_path / "host"), 2, at=0)
    x = torch.stack([host.preprocessing.transform()(Image.open(file)) for file in sorted(photos.rglob("*.png"))])
    with torch.inference_mode():
        far, near = (float((model(x).softmax(-1) - host(x).softmax(-1)).abs().mean()) for model in (untrained, student))
    assert near < 0.7 * far, (near, far)


def test_with_a_teacher_too_a_stopped_run_goes_on_as_if_it_had_not_been(photos, teacher, tmp_path, monkeypatch):
    recipe = replace(RECIPE, tokens=2, epochs=2, distill=DistillRecipe(str(teacher), features=0.5))
    train(photos, recipe, tmp_path / "one")
    with stopped_at_first_checkpoint(monkeypatch):
        train(photos, recipe, tmp_path / "two")
    train(photos, recipe, tmp_path / "two", resume=True)
    one, two = (tokenlearner.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distill": DistillRecipe("runs/gone")}, "no folder runs/gone, and no model of that name"),
        (
            {"distill": DistillRecipe("tokenlearner_micro4_32_plain")},
            "tells 10 classes apart that are not the 2 of DATA",
        ),
        ({"distill": DistillRecipe(logits=-1.0)}, "distill.logits must be 0 or above, not -1.0"),
        ({"distill": DistillRecipe(temperature=0.0)}, "distill.temperature must be above 0, not 0.0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(photos, tmp_path, change, reason):
    with pytest.raises(InputError, match=reason):
        train(photos, replace(RECIPE, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_images_is_refused(photos, teacher, tmp_path):
    with pytest.raises(InputError, match="start from the teacher with init, or give one prepared alike"):
        train(photos, replace(RECIPE, image_size=48, distill=DistillRecipe(str(teacher))), tmp_path / "run")


def test_a_model_without_a_head_has_no_features():
    with pytest.raises(InputError, match="has no classifier to take features from"):
        classifier_of(nn.Identity())
