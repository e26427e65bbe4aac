"""Labels and probabilities of a model whose answers are known, and the sheets of a small ViT's maps."""

from pathlib import Path

import pytest
import torch
from by_colour import SHARPNESS, STEP, by_colour, draw, level, nearest
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

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
        (vit, [files[4]], {}, r"none of the 1 files could be read; the first: .*4\.png: the file is empty"),
        (vit, files, {"on_error": "raise"}, r"1\.png: not an image"),
        (plain, files, {}, "no TokenLearner"),
    ):
        with pytest.raises(InputError, match=reason):
            write_sheets(model, paths, tmp_path, **options)
    assert not drawn
