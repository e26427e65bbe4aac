"""What tokens look at in clips: which frames, whose maps, and the measures of maps that are known."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filmed_squares import HEIGHT, SIDE, WIDTH, film

import tokenlearner
from tokenlearner.errors import InputError
from tokenlearner.insertion.insert import learners
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.looking import on_grid
from tokenlearner.models.vivit import ViViT
from tokenlearner.study import looking
from tokenlearner.study.interactions import interactions
from tokenlearner.study.study import Job, open_study, run_study

STUDY, TRAINED = (open_study(name, Path(__file__).parents[2] / "studies") for name in ("looking", "looking_trained"))
FRAMES = looking.Frames(frames=4, fps=5.0, side=48, short_side=48, gap=0.4)
VARIANTS = STUDY.variants(FRAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return film(tmp_path_factory.mktemp("squares"), (11, 12))


def a_job(data: Path, variant: Any, settings: Any = FRAMES, seed: int = 0) -> Job:
    return Job(variant, settings, seed, data, data)


# ---- frames


def test_frames_and_what_moves_in_them(data):
    """The clip has 16 frames at 10 a second: 4 at 5 a second begin at 0.4 s, so 0, 2, 4 and 6 after frame 4."""
    still, moving = (next(looking.windows_of(file, FRAMES)) for file in interactions(data, "2", [11]).files)
    assert not still[1].any()
    pixels, where = moving
    assert pixels.shape == (4, 3, 48, 48)
    shift = (WIDTH - HEIGHT) // 2  # what the crop leaves out at the left
    for t, number in enumerate((4, 6, 8, 10)):
        left = 3 * number - shift
        assert (pixels[t, :, 8 : 4 + SIDE, left + 2 : left + SIDE - 2] > 0.7).all()
        assert (pixels[t, :, 8 : 4 + SIDE, left + SIDE + 3 :] < 0.3).all()
        # 0.4 s are 4 frames, 12 pixels: as far as the square is wide, so it leaves its place altogether.
        assert where[t, 8 : 4 + SIDE, left + 2 : left + SIDE - 2].all()
        assert not where[t, :, left + SIDE + 3 :].any()
        assert not where[t, :, : left - 3].any()


def test_windows_and_crops_follow_each_other(data):
    several = list(looking.windows_of(interactions(data, "2", [11]).files[1], replace(FRAMES, windows=2, crops=2)))
    lefts = [float((pixels[0, 0] > 0.5).nonzero()[:, 1].float().min()) for pixels, _ in several]
    # Windows from 0.2 and 0.6 s on show frames 2 and 6; the crops begin at columns 0 and 16, and cut the square off.
    assert lefts == pytest.approx([6, 18, 0, 2], abs=1)


def test_every_seed_has_a_sequence(data):
    assert len(looking.seen(data, 0, FRAMES).pixels) == len(looking.seen(data, 1, FRAMES).pixels) == 2
    with pytest.raises(InputError, match="there are 10 sequences, for the seeds 0 to 9, not 10"):
        looking.seen(data, 10, FRAMES)


# ---- measures


def test_flat_maps_measure_one(data):
    row = looking.look(a_job(data, VARIANTS["flat"]))
    assert (row["lift"], row["evenness"], row["half_mass"], row["overlap"], row["stability"]) == (1, 1, 0.5, 1, 1)
    assert (row["windows"], row["frames_that_move"], row["learners"]) == (2, 4, 1)
    square = SIDE**2 / HEIGHT**2
    assert row["area_that_moves"] == pytest.approx(square / 2, rel=0.35)  # in one clip of two; smoothing rounds it


def test_maps_that_follow_beat_their_own_means():
    """A token on what moves, a flat one and one that stays where it is: 6, 1 and 0 times what a flat one holds."""
    moving = torch.zeros(1, 4, 12, 18)
    for t in range(4):
        moving[0, t, 4:8, 3 * t : 3 * t + 3] = 1  # a cell of the grid of 3×6
    on = on_grid(moving, (3, 6))
    away = torch.zeros(1, 4, 3, 6)
    away[:, :, 0, 0] = 1
    maps = torch.stack([on, torch.ones(1, 4, 3, 6), away], dim=2)
    found = looking.measured(maps, moving, 0.01)
    assert found["lift"] == pytest.approx((18 + 1 + 0) / 3)
    assert found["lift_of_best_token"] == pytest.approx(18)
    assert found["stability"] == pytest.approx((0 + 1 + 1) / 3)
    assert found["overlap"] == pytest.approx((1 / 18 + 0 + 1 / 18) / 3)
    means = looking.averaged(maps)
    torch.testing.assert_close(means[0, 2, 0, 1], torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0, 0.0]))
    found = looking.measured(means, moving, 0.01)
    assert found["lift_of_best_token"] == pytest.approx(18 / 4)
    assert found["stability"] == pytest.approx(1)


def test_frames_in_which_nothing_moves_do_not_count():
    moving = torch.zeros(2, 3, 8, 8)
    moving[0, 1, :4, :4] = 1
    maps = torch.zeros(2, 3, 2, 2, 2)
    maps[..., 1, 1] = 1  # never on it
    maps[0, 1] = torch.tensor([[1.0, 0], [0, 0]])
    assert looking.measured(maps, moving, 0.01)["lift"] == pytest.approx(4)
    with pytest.raises(InputError, match="of no frame of these clips 30% moves"):
        looking.measured(maps, moving, 0.3)


# ---- whose maps


@pytest.mark.parametrize("name", ["video", "image"])
def test_new_and_untrained_models_differ_where_they_should(name):
    def weights(state: str, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        model, _ = looking.model_of(VARIANTS[f"{name} {state}"], seed)
        state_dict = model.state_dict()
        inserted = {key for key in state_dict if "token_learner" in key or ".learner." in key}
        assert inserted
        return {k: v for k, v in state_dict.items() if k in inserted}, {
            k: v for k, v in state_dict.items() if k not in inserted
        }

    def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
        return all(some[key].shape == other.shape and torch.equal(some[key], other) for key, other in others.items())

    trained, new, again, other, untrained = (
        weights(*which) for which in (("trained", 0), ("new", 0), ("new", 0), ("new", 1), ("untrained", 0))
    )
    assert same(trained[1], new[1])
    assert not same(trained[0], new[0])
    assert same(new[0], again[0])
    assert not same(new[0], other[0])
    assert not same(trained[1], untrained[1])


def test_an_image_model_sees_frame_by_frame_and_a_video_model_clip_by_clip(data):
    pixels = looking.seen(data, 0, looking.Frames(fps=10.0)).pixels
    model, prepared = looking.model_of(VARIANTS["image trained"], 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    (maps,) = looking.maps_of(model, prepared, pixels)
    assert maps.shape == (2, 8, 8, 8, 8)
    small = torch.nn.functional.interpolate(pixels[1, 5:6], size=(32, 32), mode="bilinear", antialias=True)
    expected = tokenlearner.attention_maps(model, (small - mean) / std)[2]
    torch.testing.assert_close(maps[1, 5:6], expected, atol=1e-5, rtol=1e-4)

    model, prepared = looking.model_of(VARIANTS["video trained"], 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    found = looking.maps_of(model, prepared, pixels)
    expected = tokenlearner.attention_maps(model, ((pixels[1:] - mean) / std).transpose(1, 2))
    assert len(found) == len(expected) == 3
    for i, maps in enumerate(found):
        torch.testing.assert_close(maps[1:], expected[i], atol=1e-5, rtol=1e-4)


def test_a_seed_takes_one_of_three_trainings(data, tmp_path, monkeypatch):
    """Of a ViViT whose slices are of two frames."""
    monkeypatch.chdir(tmp_path)
    variant = TRAINED.variants(FRAMES)["vivit trained"]
    with pytest.raises(InputError, match="runs/ut-interaction/vivit-tl8-set1-seed0"):
        looking.model_of(variant, 0)
    prepared = Preprocessing((3, 16, 16), (0.5,) * 3, (0.2,) * 3, frames=4, fps=5.0)
    for training in range(3):
        model = ViViT(16, 8, num_frames=4, num_classes=2, embed_dim=16, depth=2, num_heads=2)
        tokenlearner.insert(model, 2 + training, 1)
        folder = Path(f"runs/ut-interaction/vivit-tl8-set1-seed{training}")
        tokenlearner.save(model, folder, preprocessing=prepared)
    models = [looking.model_of(variant, seed)[0] for seed in (0, 2, 4)]
    assert [next(iter(learners(m).values())).num_tokens for m in models] == [2, 4, 3]
    row = looking.look(a_job(data, variant, replace(FRAMES, frames=8, fps=1.0)))  # the model's own are taken
    flat = looking.look(a_job(data, VARIANTS["flat"]))
    assert row["frames_that_move"] == flat["frames_that_move"] / 2 == 2  # slices
    assert row["area_that_moves"] == flat["area_that_moves"]


def test_the_study_runs_and_judges(data, tmp_path):
    chosen = {name: VARIANTS[name] for name in ("flat", "video trained", "video new")}
    settings = replace(STUDY.sizes["cpu"], gap=0.4, least=0.001)
    study = replace(STUDY, variants=lambda _: chosen, sizes={"cpu": settings}, claims=STUDY.claims[:2])
    summary = run_study("looking", study, data, tmp_path, seeds=(0, 1), runs=tmp_path / "runs", log=lambda line: None)
    with (tmp_path / "looking.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["learners"] for row in rows if row["variant"] != "flat"} == {"3"}
    trained = [100 * float(row["lift"]) for row in rows if row["variant"] == "video trained"]
    assert summary["variants"]["video trained"]["mean"] == pytest.approx(sum(trained) / 2, abs=0.01)
    assert summary["claims"][0]["difference"] == pytest.approx(sum(trained) / 2 - 100, abs=0.01)
    assert (tmp_path / "looking.png").stat().st_size > 10_000
