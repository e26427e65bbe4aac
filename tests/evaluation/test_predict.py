"""Labels and probabilities of models whose answers are known, and the sheets of a small ViT's maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from by_colour import SHARPNESS, STEP, by_colour, draw, level, nearest
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenlearner.data.videos import FrameFolder
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation import predict as module
from tokenlearner.evaluation.predict import predict, write_sheets
from tokenlearner.insertion.insert import attention_maps, insert
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import picture_of

NAMES = ("walrus", "ant", "zebra", "bee")


def probabilities(position: int) -> dict[str, float]:
    """The softmax by hand; the -SHARPNESS·g² that the model leaves out is the same for every class."""
    grey = level(position) / 255
    weights = {name: 2.718281828459045 ** (-SHARPNESS * (grey - STEP * j / 255) ** 2) for j, name in enumerate(NAMES)}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Pictures of the classes 2, 0, 3, 1, 1, of which the second file and the last are damaged."""
    paths = [draw(tmp_path / f"{i}.png", position) for i, position in enumerate((2, 0, 3, 1, 1))]
    paths[1].write_text("damaged")
    paths[4].write_bytes(b"")
    return paths


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_labels_and_probabilities_in_the_order_of_the_files(files, batch_size):
    found = list(predict(by_colour(NAMES), files, batch_size=batch_size))
    assert [prediction.file for prediction in found] == [str(file) for file in files]
    for prediction, position in zip(found, (2, None, 3, 1, None)):
        if position is None:
            assert prediction.labels == ()
            assert prediction.error in ("the file is empty", found[1].error)
            continue
        assert prediction.error is None
        assert [name for name, _ in prediction.labels] == nearest(position, NAMES)
        assert dict(prediction.labels) == pytest.approx(probabilities(position), rel=1e-4)
    assert found[1].error.startswith("not an image of a known format")


def test_only_the_likeliest(files):
    (found,) = predict(by_colour(NAMES), files[:1], top=2)
    assert [name for name, _ in found.labels] == ["zebra", "bee"]  # a little brighter than zebra is nearer to bee
    with pytest.raises(InputError, match="top must be at least 1, not 0"):
        list(predict(by_colour(NAMES), files, top=0))


def test_outputs_without_names_go_by_number(files):
    model = by_colour(NAMES)
    model.label_names = None
    assert [name for name, _ in next(predict(model, files)).labels] == ["2", "3", "1", "0"]


def test_raise_comes_at_the_damaged_file(files):
    with pytest.raises(InputError, match=r"1\.png: not an image"):
        list(predict(by_colour(NAMES), files, on_error="raise"))


def test_a_model_that_does_not_say_how_images_are_prepared(files):
    for use in (lambda: list(predict(nn.Flatten(), files)), lambda: write_sheets(nn.Flatten(), files, files[0].parent)):
        with pytest.raises(InputError, match="does not say how its images are prepared"):
            use()


# ---- videos


class ByBrightness(nn.Module):
    """Says light the more surely the brighter the clip is; ``sizes`` are those of the batches it was given."""

    takes_clips = True
    label_names = ("dark", "light")
    preprocessing = Preprocessing((3, 24, 24), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0, frames=2, fps=10.0)

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        assert x.shape[1:] == (3, 2, 24, 24)
        light = 20 * (x.mean((1, 2, 3, 4)) - 0.45)
        return torch.stack([-light, light], dim=1)


@pytest.fixture
def videos(tmp_path) -> list[Path | FrameFolder]:
    """60 frames of levels 0, 4, …, 236 in two seconds; text; the same frames as pictures, whole and one damaged."""
    frames = [Image.new("L", (32, 24), 4 * i) for i in range(60)]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        for i, frame in enumerate(frames):
            frame.save(tmp_path / name / f"{i}.png")
    (tmp_path / "broken" / "40.png").write_text("damaged")
    (tmp_path / "text.mp4").write_text("damaged")
    folders = [FrameFolder(tmp_path / name, 30) for name in ("whole", "broken")]
    clip = write_video(frames, tmp_path / "clip.mp4", 30).rename(tmp_path / "clip.odd")
    return [clip, tmp_path / "text.mp4", *folders]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_a_video_gets_the_mean_of_its_views(videos, batch_size):
    """Windows at 0.45 s and 1.35 s show the frames 13 and 16, 40 and 43, of which the mean is 28."""
    model = ByBrightness()
    found = list(predict(model, videos, batch_size=batch_size, views=(2, 2)))
    assert [prediction.file for prediction in found] == [str(video) for video in videos]
    light = 1 / (1 + np.exp(-2 * 20 * (28 * 4 / 255 - 0.45)))
    for prediction in (found[0], found[2]):
        assert [name for name, _ in prediction.labels] == ["dark", "light"]
        assert dict(prediction.labels)["light"] == pytest.approx(light, abs=0.02)
    assert found[1].error.startswith("no video of a known format")
    assert found[3].error.startswith("40.png: not an image")
    assert max(model.sizes) <= batch_size
    assert sum(model.sizes) == 2 * 4


def test_raise_comes_at_the_damaged_video(videos):
    with pytest.raises(InputError, match=r"text\.mp4: no video"):
        list(predict(ByBrightness(), videos, on_error="raise"))


def test_models_are_not_given_what_they_do_not_take(videos, files):
    with pytest.raises(InputError, match="takes images, and these are videos"):
        list(predict(by_colour(NAMES), videos[2:]))
    with pytest.raises(InputError, match="takes clips, and these are images"):
        write_sheets(ByBrightness(), files, files[0].parent)


# ---- sheets


@pytest.fixture
def vit() -> nn.Module:
    """Three layers, the last two with a learner of their own; blue, green and red are normalised differently."""
    host = VisionTransformer(img_size=8, patch_size=2, num_classes=2, embed_dim=16, depth=3, num_heads=2)
    model = insert(host, 2, at=1, fuser="fuser").eval()
    model.preprocessing = Preprocessing((3, 8, 8), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "nearest", 1.0)
    return model


@pytest.fixture
def drawn(monkeypatch) -> list[tuple]:
    """What each sheet is drawn from, in place of drawing it; tests/inspection/test_maps.py has the drawing."""
    calls: list[tuple] = []
    monkeypatch.setattr(module, "draw_sheet", lambda *args: calls.append(args) or args[2])
    return calls


@pytest.mark.parametrize(("layer", "at"), [(None, 1), (1, 1), (2, 2)])
def test_sheets_show_the_maps_of_the_layer(files, tmp_path, vit, drawn, layer, at):
    sheets = write_sheets(vit, files, tmp_path / "maps", layer=layer, columns=2)
    readable = [files[0], files[2], files[3]]
    x = torch.stack([vit.preprocessing.transform()(Image.open(file)) for file in readable])
    expected = attention_maps(vit, x)[at]
    assert not torch.allclose(*attention_maps(vit, x).values(), atol=1e-3)  # or the layers could not be told apart
    for (pictures, maps, path, titles), part, name in zip(
        drawn, (slice(0, 2), slice(2, 3)), ("maps-1.png", "maps-2.png"), strict=True
    ):
        assert torch.allclose(maps, expected[part], atol=1e-6)
        assert [picture.tobytes() for picture in pictures] == [
            picture_of(image, vit.preprocessing).tobytes() for image in x[part]
        ]
        assert path == tmp_path / "maps" / name
        assert titles == [file.name for file in readable[part]]
    assert [sheet.files for sheet in sheets.sheets] == [(str(files[0]), str(files[2])), (str(files[3]),)]
    assert [damaged.path for damaged in sheets.damaged] == [str(files[1]), str(files[4])]
    assert sheets.to_dict()["damaged"]["files"][1] == {"file": str(files[4]), "reason": "the file is empty"}


def test_what_no_sheet_can_be_drawn_of(files, tmp_path, vit, drawn):
    plain = by_colour(NAMES)
    for model, paths, options, reason in (
        (vit, files, {"layer": 0}, "no TokenLearner at layer 0; there is one at 1, 2"),
        (vit, files, {"columns": 0}, "columns must be at least 1, not 0"),
        (vit, [], {}, "none of the 0 files could be read$"),
        (vit, [files[4]], {}, r"none of the 1 files could be read; the first: .*4\.png: the file is empty"),
        (vit, files, {"on_error": "raise"}, r"1\.png: not an image"),
        (plain, files, {}, "no TokenLearner"),
    ):
        with pytest.raises(InputError, match=reason):
            write_sheets(model, paths, tmp_path, **options)
    assert not drawn
