"""The studies of this repository: all of them open and say what they compare, and three of them run on tiny sets."""

import functools
import itertools
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from coloured_sets import TINY, draw_set
from torch import nn

from tokenlearner.data.images import scan_class_folders
from tokenlearner.evaluation.fewshot import few_shot
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.cost import Cost, cost
from tokenlearner.models.vivit import resample_positions
from tokenlearner.study.claims import CLAIM_RULES
from tokenlearner.study.pictures import InMemory, Pictures, ViT, build, moments_of, reopened
from tokenlearner.study.rows import read_rows
from tokenlearner.study.study import Job, Study, key_of, open_study, run_study, studies_in

FOLDER = Path(__file__).parents[2] / "studies"
NAMES = studies_in(FOLDER)
STUDIES = {name: open_study(name, FOLDER) for name in NAMES}
OF_PICTURES = [  # speed has the models of others again
    name
    for name, study in STUDIES.items()
    if name != "speed" and isinstance(next(iter(study.variants(study.sizes["cpu"]).values())), ViT)
]


def module_of(name: str) -> Any:
    return sys.modules[f"tokenlearner_study_{name}"]


def pictures_of(settings: Any) -> Pictures:
    """The settings of the models that are scored."""
    if isinstance(settings, Pictures):
        return settings
    return settings.training if hasattr(settings, "training") else settings.finetuning


@functools.cache
def on_meta(variant: ViT, settings: Pictures) -> nn.Module:
    with torch.device("meta"):
        return build(variant, settings, 10)


def unnamed(variant: ViT) -> ViT:
    return replace(variant, label="")


def cost_of(variant: ViT, settings: Pictures) -> Cost:
    side = variant.side or settings.side
    return cost(on_meta(unnamed(variant), settings), (3, side, side))


# ---- what they say


def test_there_are_studies():
    assert {"placement", "tokens", "depth", "pooling", "fuser", "fewshot", "multilabel", "speed"} <= set(NAMES)
    assert {"placement", "resolution", "fewshot", "multilabel"} <= set(OF_PICTURES)


@pytest.mark.parametrize("name", NAMES)
def test_a_study_has_both_sizes_and_compares_what_it_has(name):
    study = STUDIES[name]
    assert list(study.sizes)[:2] == ["cpu", "gpu"]
    assert study.title
    assert study.question.endswith("?")
    for settings in study.sizes.values():
        variants = study.variants(settings)
        assert len(variants) >= 2
        assert all(variant.label for variant in variants.values())
        keys = [key_of(study.run, variant, settings, 0) for variant in variants.values()]
        assert len(set(keys)) == len(keys)  # no model twice
        for claim in study.claims:
            assert {claim.first, claim.second} <= set(variants), claim.text
            assert claim.first != claim.second
            assert claim.number in range(1, 9)
            assert claim.kind in CLAIM_RULES
            assert claim.paper


@pytest.mark.parametrize("name", OF_PICTURES)
def test_every_model_of_a_study_can_be_built(name):
    study = STUDIES[name]
    for settings in study.sizes.values():
        for variant in study.variants(settings).values():
            used = pictures_of(settings)
            model: Any = on_meta(unnamed(variant), used)
            assert {p.device.type for p in model.parameters()} == {"meta"}
            assert len(model.blocks) == (variant.depth or used.depth) + variant.extra_layers


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_deeper_models_cost_no_more_than_the_plain_one(size):
    settings = STUDIES["depth"].sizes[size]
    costs = {name: cost_of(v, settings) for name, v in STUDIES["depth"].variants(settings).items()}
    assert all(found.macs <= costs["plain"].macs for found in costs.values())
    assert all(len(costs[name].tokens) > settings.depth for name in ("deep", "deep 16", "late"))
    assert len(costs["deep"].tokens) == settings.depth * 21 // 12


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_pooling_is_compared_at_equal_compute(size):
    settings = STUDIES["pooling"].sizes[size]
    costs = {name: cost_of(v, settings) for name, v in STUDIES["pooling"].variants(settings).items()}
    for learned, pooled in (("16 tokens", "4x4"), ("4 tokens", "2x2")):
        assert costs[learned].tokens == costs[pooled].tokens
        assert costs[pooled].macs / costs[learned].macs == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_speed_has_every_model_of_four_studies_once_and_a_smaller_size(size):
    speed = STUDIES["speed"]
    settings = speed.sizes[size]
    smaller = module_of("speed").SIZES
    own = {unnamed(variant) for name, variant in speed.variants(settings).items() if name not in smaller}
    macs = [cost_of(variant, settings).macs for variant in smaller.values()]
    assert macs[1] < macs[0]
    assert max(macs) < cost_of(speed.variants(settings)["placement plain"], settings).macs / 2
    others = {
        unnamed(variant)
        for name in ("placement", "tokens", "depth", "pooling")
        for variant in STUDIES[name].variants(settings).values()
    }
    assert own == others
    assert len(own) == len(speed.variants(settings)) - len(smaller)
    assert next(iter(speed.variants(settings).values())).tokens == 0


# ---- mosaics


@pytest.mark.parametrize("padding", [0, 2])
def test_a_mosaic_is_four_pictures_at_half_their_side(padding):
    n, classes = 8, 5
    whole = torch.arange(n)[:, None, None, None] * 20 + torch.arange(3)[:, None, None] * 3
    pixels = (whole + torch.zeros(n, 3, 4, 4)).byte()  # of one colour each, so that a tile says which it is
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    mosaics = module_of("multilabel").Mosaics(InMemory(pixels, labels, zero, one, padding), classes)
    assert len(mosaics) == n
    seen = set()
    for x, target, place in mosaics.__getitems__([3, 6, 6, 0]):
        found = []
        for row, column in itertools.product(range(2), range(2)):
            tile = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            number = round(float(tile[0].max()) * 255 / 20)
            if padding == 0:
                torch.testing.assert_close(tile, pixels[number, :, :2, :2] / 255)
                found.append(number)
            elif tile.any():  # else it was moved out, or is the black one
                found.append(number)
        assert {int(labels[number]) for number in found} <= set(target.nonzero().flatten().tolist())
        assert set(target.tolist()) <= {0.0, 1.0}
        assert 1 <= int(target.sum()) <= 4
        if padding == 0:
            assert found == [place, (place + 2) % n, (place + 4) % n, (place + 6) % n]
            assert target.nonzero().flatten().tolist() == sorted({int(labels[number]) for number in found})
        seen.add(tuple(target.tolist()))
    assert len(seen) > 1


def test_mosaics_are_random_where_they_are_learned_from():
    pixels = torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    ones = torch.ones(3, 1, 1)
    learned, scored = (
        module_of("multilabel").Mosaics(InMemory(pixels, torch.arange(40), 0 * ones, ones, padding), 40)
        for padding in (2, 0)
    )
    assert any(not torch.equal(learned[7][1], learned[7][1]) for _ in range(3))
    assert all(learned[7][1][7] == 1 for _ in range(3))  # the place is always one of them
    torch.testing.assert_close(scored[7][0], scored[7][0])


# ---- tiny runs


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    draw_set(folder / "data" / "colours", train=8, test=4)
    draw_set(folder / "data" / "others", train=6, test=5, side=12)
    return {"data": folder / "data", "output": folder / "results", "runs": folder / "runs", "log": lambda line: None}


def tiny(name: str, settings: Any, *variants: str) -> Study:
    """The study with two or three of its variants, at one size."""
    study = STUDIES[name]
    chosen = {key: value for key, value in study.variants(study.sizes["cpu"]).items() if key in variants}
    return replace(study, sizes={"cpu": settings}, variants=lambda _: chosen)


def test_few_shot_scores_the_models_of_placement(place):
    settings = replace(STUDIES["fewshot"].sizes["cpu"], training=TINY, shots=2, draws=2)
    few = tiny("fewshot", settings, "plain", "8 at 1/2")
    run_study("placement", tiny("placement", TINY, "plain"), **place, seeds=(1,), command="placement")
    trained_at = (path := next(place["runs"].glob("from_scratch-*/weights.pt"))).stat().st_mtime_ns
    run_study("fewshot", few, **place, seeds=(1,), command="fewshot")
    assert path.stat().st_mtime_ns == trained_at  # and not trained again
    assert len(list(place["runs"].glob("from_scratch-*/weights.pt"))) == 2
    plain, tokens = read_rows(place["output"] / "fewshot.csv")
    for row in (plain, tokens):
        assert row["average_of"] == "others digits"  # colours is what they were trained on
        average = statistics.mean([float(row["others"]), float(row["digits"])])
        assert float(row["average"]) == pytest.approx(average, abs=1e-4)
        assert 0 <= float(row["colours"]) <= 1

    job = Job(ViT("plain"), TINY, 1, place["data"], path.parent)
    model: Any = reopened(job)
    mean, std = (tuple(values.flatten().tolist()) for values in moments_of(place["data"], TINY))
    model.preprocessing = Preprocessing((3, 8, 8), mean, std, crop_pct=1.0)
    parts = [scan_class_folders(place["data"] / "others" / part) for part in ("train", "test")]
    expected = few_shot(model, *parts, shots=2, draws=2, seed=1, workers=0)
    assert float(plain["others"]) == pytest.approx(expected.mean, abs=1e-4)
    digits = scan_class_folders(place["runs"] / "digits")
    assert (len(digits), len(digits.classes)) == (1797, 10)


def test_fine_tuning_starts_from_what_was_pre_trained(place):
    settings = replace(
        STUDIES["multilabel"].sizes["cpu"],
        pretraining=replace(TINY, batch_size=4),
        finetuning=replace(TINY, data="others", side=12, lr=0.0, ema=0.0),
    )
    study = tiny("multilabel", settings, "8 at 1/2", "8 at 1/2 from scratch")
    run_study("multilabel", study, **place, seeds=(0,))
    tuned, scratch = read_rows(place["output"] / "multilabel.csv")
    assert 0 < float(tuned["pretraining_map"]) <= 1
    assert scratch["pretraining_map"] == ""
    assert tuned["tokens_per_layer"] == scratch["tokens_per_layer"] == "9 8"  # a grid of 3×3, after one of 2×2

    # At next to no rate, what was fine-tuned is what it started from.
    variant = study.variants(None)["8 at 1/2"]
    folder = place["runs"] / key_of(study.run, variant, settings, 0)
    job = Job(variant, settings, 0, place["data"], folder)
    weights, precision = module_of("multilabel").pretrained(job)
    assert precision == pytest.approx(float(tuned["pretraining_map"]))
    saved = torch.load(folder / "finetuning" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    end = {name.removeprefix("model."): value for name, value in saved.items()}
    weights["pos_embed"] = resample_positions(weights["pos_embed"], (1, 2, 2), (1, 3, 3))
    assert set(end) - set(weights) == {"head.weight", "head.bias"}
    assert all(torch.allclose(end[name], value, atol=1e-4) for name, value in weights.items())


def test_speeds_are_measured_once_together_and_stand_beside_the_accuracies(place, monkeypatch):
    speed, seen = module_of("speed"), []

    def measure_speed(models, inputs):
        seen.append((list(models), tuple(inputs.shape)))
        return original(models, inputs, rounds=2, seconds_per_round=0.001)

    original = speed.measure_speed
    monkeypatch.setattr(speed, "measure_speed", measure_speed)
    chosen = {name: speed.variants(TINY)[name] for name in ("placement plain", "placement 8 at 1/2")}
    monkeypatch.setattr(speed, "variants", lambda _: chosen)
    study = replace(speed.STUDY, variants=lambda _: chosen, sizes={"cpu": TINY}, claims=speed.STUDY.claims[1:2])
    summary = run_study("speed", study, **place, seeds=(1,))
    ((names, shape),) = seen  # both models in one process
    assert (len(names), shape) == (2, (64, 3, 8, 8))
    plain, tokens = read_rows(place["output"] / "speed.csv")
    assert float(plain["speedup"]) == 1.0
    assert float(tokens["speedup"]) > 0
    assert float(plain["images_per_second"]) > 0
    assert (plain["batch"], plain["timed_on"], plain["trained_on"]) == ("64", plain["hardware"], plain["hardware"])
    assert float(plain["load"]) >= 0
    run_study("placement", tiny("placement", TINY, "plain"), **place, seeds=(1,), command="placement")
    done = read_rows(place["output"] / "placement.csv")[0]  # of the run that the speed stands beside
    assert (plain["accuracy"], plain["macs"]) == (done["accuracy"], done["macs"])
    (claim,) = summary["claims"]
    assert claim["scores"] == [[float(tokens["speedup"])], [1.0]]
