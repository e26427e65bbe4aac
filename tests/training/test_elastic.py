"""Training on random numbers of tokens: which, when, and that nothing but the training steps sees fewer than all."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from noisy_photos import draw_photos
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tokenlearner
from tokenlearner.core import TokenLearner
from tokenlearner.models import X2Plus1D
from tokenlearner.training import checkpoint
from tokenlearner.training.build import build_model
from tokenlearner.training.fit import fit
from tokenlearner.training.module import Classifier
from tokenlearner.training.recipe import AugmentRecipe, OptimizerRecipe, Recipe
from tokenlearner.training.sampling import draw_tokens
from tokenlearner.training.train import train

S = 4
RECIPE = Recipe(
    model="test_vit",
    image_size=32,
    tokens=S,
    elastic=True,
    epochs=3,
    batch_size=8,
    accumulate=2,
    workers=0,
    ema=0.9,
    drop_path=0.2,
    checkpoint_steps=1,
    optimizer=OptimizerRecipe(lr=1e-3, warmup_epochs=1),
    augment=AugmentRecipe(erasing=0.5, mixup=0.8),
)
STEPS, PARTS = 3, 2  # an epoch of 28 pictures in batches of 8, each in two parts
# Nothing that a process draws for itself.
CERTAIN = {"ema": None, "drop_path": 0.0, "augment": AugmentRecipe(None, (1.0, 1.0), 0.0, 0.0)}


class StoppedError(Exception):
    """In place of a kill."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("data") / "photos", 18)


@pytest.fixture(scope="module")
def unbroken(photos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    train(photos, RECIPE, output)
    return output


@pytest.fixture
def calls(monkeypatch) -> list[tuple[bool, int]]:
    """(in training, tokens made) for every call of a TokenLearner."""
    made, forward = [], TokenLearner.forward

    def noted(self, *arguments, **options):
        Z = forward(self, *arguments, **options)
        made.append((self.training, Z.shape[1]))
        return Z

    monkeypatch.setattr(TokenLearner, "forward", noted)
    return made


def small(**options):
    torch.manual_seed(1)
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**size, num_classes=3, class_token=False, global_pool="avg")  # the head reads the fuser
    return tokenlearner.insert(model, S, at=1, **options)


def samples(number=12):
    images = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return [(image, i % 3, i) for i, image in enumerate(images)]


def weights(folder):
    return tokenlearner.load(folder).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- which numbers


def test_every_number_is_drawn_as_often_and_by_seed_epoch_and_step_alone():
    drawn = [[draw_tokens(3, epoch, step, S) for step in range(100)] for epoch in range(20)]
    counts = Counter(number for epoch in drawn for number in epoch)
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(abs(count - 500) < 100 for count in counts.values())  # five standard deviations of 19
    assert drawn[1] == [draw_tokens(3, 1, step, S) for step in range(100)]
    assert drawn[0] != drawn[1] != [draw_tokens(4, 1, step, S) for step in range(100)]
    assert {draw_tokens(0, 0, step, 1) for step in range(9)} == {1}


def test_steps_train_the_number_drawn_and_scores_are_of_all_tokens(photos, calls, tmp_path):
    summary = train(photos, RECIPE, tmp_path)
    trained = [tokens for training, tokens in calls if training]
    drawn = [draw_tokens(0, epoch, step, S) for epoch in range(RECIPE.epochs) for step in range(STEPS)]
    assert trained == [tokens for tokens in drawn for _ in range(PARTS)]
    assert len({*drawn}) > 1
    assert {tokens for training, tokens in calls if not training} == {S}
    spec = tokenlearner.insertion_of(tokenlearner.load(tmp_path))
    assert (spec.elastic, spec.used_tokens, spec.num_tokens) == (True, None, S)
    assert summary["models"][0]["tokens_per_layer"][-1] == S + 1


def test_a_step_is_that_of_a_model_with_as_many_tokens(tmp_path):
    """SGD, one step: the first tokens' weights move as those of a model that has no others."""
    recipe = Recipe(
        epochs=1,
        batch_size=12,
        workers=0,
        optimizer=OptimizerRecipe("sgd", lr=0.1, weight_decay=0.0, warmup_epochs=0, clip_norm=None),
    )
    seed = next(seed for seed in range(100) if draw_tokens(seed, 0, 0, S) == 2)
    model, recipe = small(fuser="fuser"), replace(recipe, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    few = tokenlearner.insert(tokenlearner.remove(copy.deepcopy(model)), 2, at=1, fuser="fuser")
    cut = {key: model.state_dict()[key][tuple(map(slice, value.shape))] for key, value in few.state_dict().items()}
    few.load_state_dict(cut)
    before = copy.deepcopy(model.state_dict())
    for name, each in (("few", few), ("elastic", model)):
        fit(each, samples(), samples(), replace(recipe, elastic=name == "elastic"), tmp_path / name, num_classes=3)
    after = model.state_dict()
    for key, value in few.state_dict().items():
        torch.testing.assert_close(after[key][tuple(map(slice, value.shape))], value)
    for key in ("blocks.1.token_learner.alpha.fc2.weight", "blocks.1.token_fuser.mix.weight"):
        assert not torch.equal(after[key][:2], before[key][:2])
        assert torch.equal(after[key][2:], before[key][2:])


def test_a_run_gives_the_same_again_and_stopped_within_an_epoch(photos, unbroken, tmp_path, monkeypatch):
    write, written = checkpoint.WholeCheckpoints.save_checkpoint, []

    def stop_after(self, *arguments, **options):
        write(self, *arguments, **options)
        written.append(arguments)
        if len(written) == 4:  # one step of the second epoch
            raise StoppedError

    monkeypatch.setattr(checkpoint.WholeCheckpoints, "save_checkpoint", stop_after)
    with pytest.raises(StoppedError):
        train(photos, RECIPE, tmp_path)
    monkeypatch.undo()
    train(photos, RECIPE, tmp_path, resume=True)
    assert same(weights(tmp_path), weights(unbroken))
    assert (tmp_path / "metrics.csv").read_text() == (unbroken / "metrics.csv").read_text()


def test_it_is_another_run_than_one_on_all_tokens(photos, unbroken, tmp_path):
    train(photos, replace(RECIPE, elastic=False), tmp_path)
    assert not same(weights(tmp_path), weights(unbroken))
    assert not tokenlearner.insertion_of(tokenlearner.load(tmp_path)).elastic


# --- with what else a recipe can ask for


@pytest.mark.parametrize("kind", ["mlp", "gate"])
def test_layers_computed_again_see_the_tokens_of_their_step(kind, tmp_path):
    one, two = small(kind=kind, fuser="fuser"), small(kind=kind, fuser="fuser")
    recipe = Recipe(epochs=3, batch_size=4, workers=0, elastic=True, optimizer=OptimizerRecipe(lr=1e-2))
    fit(one, samples(), samples(), recipe, tmp_path / "one", num_classes=3)
    fit(two, samples(), samples(), replace(recipe, grad_checkpointing=True), tmp_path / "two", num_classes=3)
    torch.testing.assert_close(two.state_dict(), one.state_dict())


@pytest.mark.slow
def test_compiled_there_is_a_graph_for_every_number(tmp_path, monkeypatch, without_shape_checks):
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, num_classes=3, embed_dim=16, depth=1, num_heads=2)
    model = tokenlearner.insert(model, 10, at=0)
    twin = copy.deepcopy(model)
    recipe = Recipe(epochs=8, batch_size=4, workers=0, elastic=True, optimizer=OptimizerRecipe(lr=1e-2))
    assert len({draw_tokens(0, epoch, step, 10) for epoch in range(8) for step in range(3)}) > 8  # torch's own limit
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        fit(twin, samples(), samples(), replace(recipe, compile=True), tmp_path / "compiled", num_classes=3)
    fit(model, samples(), samples(), recipe, tmp_path / "plain", num_classes=3)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_draw_the_same_numbers(photos, tmp_path):
    """One process on the same batches gives the same weights; every parameter has a gradient, as DDP needs it."""
    folders = {}
    for processes in (1, 2):
        recipe = replace(RECIPE, **CERTAIN, fuser="fuser", epochs=2, accumulate=2 // processes)
        path, folders[processes] = tmp_path / "recipe.yaml", tmp_path / f"by-{processes}"
        path.write_text(json.dumps(asdict(recipe)))
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if processes > 1 else []
        command = [sys.executable, "-m", *start, "tokenlearner", "train", photos, "--recipe", path, "--output"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, folders[processes]], env=environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr
    one, two = weights(folders[1]), weights(folders[2])
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_x2plus1d_learns_them_in_its_blocks(calls, tmp_path):
    tiny = {"widths": (8, 16), "depths": (1, 2), "swapped": 1, "head_width": 16, "num_weights": 6}
    model = X2Plus1D("TokenLearner", 3, num_frames=2, img_size=16, num_tokens=S, **tiny)
    clips = [(torch.randn(3, 2, 16, 16), i % 3, i) for i in range(8)]
    fit(model, clips, clips, Recipe(epochs=2, batch_size=4, workers=0, elastic=True), tmp_path, num_classes=3)
    trained = [tokens for training, tokens in calls if training]
    assert trained == [draw_tokens(0, epoch, step, S) for epoch in range(2) for step in range(2)]
    assert [learner.used_tokens for learner in tokenlearner.learners(model).values()] == [None]


# --- what it refuses


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tokens": 0}, "elastic trains on random numbers of the tokens, and tokens=0 leaves none"),
        ({"kind": "grid"}, "kind 'grid' are cells that cover the frame together"),
        ({"model": "x2plus1d_m", "tokens": 0}, "tokens=0 leaves none"),
    ],
)
def test_models_without_first_tokens_are_refused(options, reason):
    with pytest.raises(tokenlearner.InputError, match=reason):
        build_model(Recipe(**{"model": "test_vit", "elastic": True, **options}), 2, on="meta")


def test_a_model_without_tokens_is_no_elastic_classifier():
    plain = tokenlearner.remove(small())
    with pytest.raises(tokenlearner.InputError, match="has no TokenLearner"):
        Classifier(plain, Recipe(elastic=True), 3)
