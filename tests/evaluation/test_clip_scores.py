"""Scores of a model of clips whose answers are known: views, Charades' rules, and which clips are scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multilabel_average_precision

from tokenlearner.data.clip_sources import Listing, read_clips_to_score
from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation.accuracy import evaluate
from tokenlearner.evaluation.clips import clip_transform, clips_to_score, logits_of, takes_clips
from tokenlearner.evaluation.multilabel import evaluate_multilabel
from tokenlearner.evaluation.protocols import score
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.models.vivit import ViViT

NAMES = ("dark", "grey", "bright")
LEVELS = (20, 120, 220)
SIDE = 16


class ByBrightness(nn.Module):
    """Class j is the likelier the nearer the mean of a clip is to LEVELS[j]; ``seen`` has the shapes it was given."""

    takes_clips = True

    def __init__(self, fps: float | None = 10.0) -> None:
        super().__init__()
        self.preprocessing = Preprocessing((3, SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0, frames=4, fps=fps)
        self.label_names = NAMES
        self.num_frames = 4
        self.seen = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return -(x.mean(dim=(1, 2, 3, 4))[:, None] * 255 - torch.tensor(LEVELS)).abs()


def film(path: Path, *levels: int, each: int = 10, width: int = 24) -> Path:
    """``each`` grey frames of each level, 10 a second."""
    pictures = [Image.fromarray(np.full((SIDE, width, 3), v, np.uint8)) for v in levels for _ in range(each)]
    return write_video(pictures, path, fps=10)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of the dark ones one looks grey; of the grey ones the second half is bright."""
    for name, films in {"dark": ((20,), (120,)), "grey": ((110, 150),), "bright": ((220,),)}.items():
        for i, levels in enumerate(films):
            film(tmp_path / name / f"{i}.mp4", *levels)
    (tmp_path / "dark" / "broken.mp4").write_bytes(b"no film")
    return tmp_path


def clips_of(folder: Path) -> LabelledClips:
    return read_clips_to_score(folder, NAMES)[0]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_scores(folder, batch_size):
    result = evaluate(ByBrightness(), clips_of(folder), batch_size=batch_size, workers=0, views=(2, 3))
    assert result.top1 == pytest.approx(3 / 4)
    document = result.to_dict()
    assert (document["clips"], document["views"], "images" in document) == (4, [2, 3], False)
    assert document["mean_per_class"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert [Path(entry["file"]).name for entry in document["damaged"]["files"]] == ["broken.mp4"]


def test_a_batch_size_is_of_views(folder):
    model = ByBrightness()
    evaluate(model, clips_of(folder), batch_size=4, workers=0, views=(2, 3))
    assert model.seen[0] == (4, 3, 4, SIDE, SIDE)
    assert max(shape[0] for shape in model.seen) == 4
    assert sum(shape[0] for shape in model.seen) == 4 * 6


def test_the_outputs_of_all_views_are_averaged():
    x = torch.rand(2, 6, 3, 4, SIDE, SIDE)
    model = ByBrightness()
    expected = torch.stack([model(x[:, v]) for v in range(6)]).mean(dim=0)
    for most in (None, 1, 5, 100):
        assert torch.allclose(logits_of(model, x, most), expected, atol=1e-4)
    assert torch.equal(logits_of(model, x[:, 0]), model(x[:, 0]))


def test_windows_are_spread_over_the_clip(tmp_path):
    """What begins dark and ends bright is grey on the whole."""
    film(tmp_path / "grey" / "a.mp4", 60, 200)
    film(tmp_path / "dark" / "b.mp4", 20)
    assert evaluate(ByBrightness(), clips_of(tmp_path), workers=0, views=(2, 1)).top1 == 1.0


def test_preparation_of_clips():
    assert clip_transform(Preprocessing((3, 224, 224), crop_pct=0.875)).short_side == 256
    assert clip_transform(Preprocessing((3, 224, 224), crop_pct=0.9), 300).short_side == 300
    assert clip_transform(Preprocessing((1, 32, 32), (0.5,), (0.5,), crop_pct=1.0)).mean == (0.5,)
    with pytest.raises(InputError, match="prepared as squares"):
        clip_transform(Preprocessing((3, 32, 48)))


# ---- many labels


CHARADES = "id,actions\na,c000 0 1\nb,c001 0 1;c002 0 1\nc,\nd,c002 0 1\n"


@pytest.fixture
def charades(tmp_path) -> tuple[Path, Listing]:
    for name, level in {"a": 30, "b": 200, "c": 225, "d": 110}.items():
        film(tmp_path / "videos" / f"{name}.mp4", level)
    (tmp_path / "classes.txt").write_text("".join(f"c{i:03} {name}\n" for i, name in enumerate(NAMES)))
    (tmp_path / "test.csv").write_text(CHARADES)
    return tmp_path / "test.csv", Listing(videos=tmp_path / "videos", classes=tmp_path / "classes.txt")


def test_charades_by_hand_and_by_torchmetrics(charades):
    """c, without an action, would come first for bright and cost it precision: it is not scored.

    dark: a comes first, 1. grey: d before b before a, b the only one: 1/2. bright: b, d, a: b and d, 1.
    """
    path, listing = charades
    clips = read_clips_to_score(path, NAMES, listing)[0]
    result = evaluate_multilabel(ByBrightness(), clips, workers=0, views=(1, 1))
    assert result.average_precision == pytest.approx({"dark": 1.0, "grey": 1 / 2, "bright": 1.0})
    assert result.mean_average_precision == pytest.approx((1 + 1 / 2 + 1) / 3)
    levels = torch.tensor([30.0, 200.0, 110.0])
    targets = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 1]])
    ranks = (-(levels[:, None] - torch.tensor(LEVELS)).abs()).argsort(dim=0).argsort(dim=0) / 3
    theirs = multilabel_average_precision(ranks, targets, num_labels=3)
    assert result.mean_average_precision == pytest.approx(float(theirs))


def test_the_same_by_its_command(charades):
    path, listing = charades
    document = score(ByBrightness(), path.parent, path, protocol="map", workers=0, views=(1, 1), listing=listing)
    assert (document["clips"], document["mean_average_precision"]) == (3, pytest.approx(5 / 6))
    assert document["missing"] == {"count": 0, "files": []}


# ---- which clips


def test_what_training_held_out_is_scored(folder, tmp_path):
    (folder / "held_out.json").write_text(json.dumps({"folder": "x", "files": ["dark/0.mp4", "bright/0.mp4"]}))
    model = ByBrightness()
    clips, which = clips_to_score(model, folder, folder)
    assert ([file.parent.name for file in clips.files], which) == (
        ["bright", "dark"],
        "the 2 clips held out in training (of 5)",
    )
    assert len(clips_to_score(model, folder, folder, "all")[0]) == 5
    with pytest.raises(InputError, match="score everything with --images all"):
        clips_to_score(model, folder / "elsewhere", folder, "held-out")


def test_wrong_inputs_are_told(folder, tmp_path):
    clips = clips_of(folder)
    images = nn.Linear(1, 1)
    images.label_names = NAMES
    with pytest.raises(InputError, match="Linear takes images, and these are videos"):
        evaluate(images, clips, workers=0)
    with pytest.raises(InputError, match="Linear takes images, and these are videos"):
        score(images, folder, folder, workers=0)
    with pytest.raises(InputError, match="does not say how its clips are prepared"):
        evaluate(ByBrightness(fps=None), clips, workers=0)
    with pytest.raises(InputError, match="'fewshot' is for images, and the model takes clips"):
        score(ByBrightness(), folder, folder, protocol="fewshot")
    unnamed = ByBrightness()
    unnamed.label_names = None
    with pytest.raises(InputError, match="names no labels"):
        score(unnamed, folder, folder)


def test_models_of_clips_are_known():
    model = ViViT(16, 8, 4, 2, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    assert takes_clips(model)
    assert Preprocessing.of(model) is None
    model.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "input_size": (3, 224, 224)}
    assert Preprocessing.of(model).model_input == (3, 4, 16, 16)
    assert not takes_clips(nn.Linear(1, 1))
