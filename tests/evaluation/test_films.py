"""Films and sheets of what a small ViViT's tokens look at: the right frames, maps, names and seconds."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from tokenlearner.data.clips import LabelledClips
from tokenlearner.data.videos import FrameFolder, probe
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError
from tokenlearner.evaluation import films as module
from tokenlearner.evaluation.clips import clip_files
from tokenlearner.evaluation.films import draw_film, overlaid, write_films
from tokenlearner.insertion.insert import attention_maps, insert
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import overlay, picture_of
from tokenlearner.models.vivit import ViViT

PREPROCESSING = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), frames=4, fps=10.0)


def model_of(frames: int = 4, **insertion) -> ViViT:
    """Slices of two frames and a grid of 2×2; two tokens a slice."""
    host = ViViT(32, 16, frames, 2, embed_dim=16, depth=3, num_heads=2, num_classes=3)
    model = (insert(host, 2, at=1, **insertion) if insertion else host).eval()
    model.preprocessing = PREPROCESSING
    return model


@pytest.fixture
def vivit() -> ViViT:
    """With a learner for each of the last two layers."""
    return model_of(fuser="fuser")


@pytest.fixture
def drawn(monkeypatch) -> dict[str, tuple]:
    """What the sheet and the film are made from, in place of making them."""
    calls: dict[str, tuple] = {}
    monkeypatch.setattr(module, "draw_sheet", lambda *args: calls.setdefault("sheet", args)[2])
    monkeypatch.setattr(module, "write_video", lambda *args: calls.setdefault("film", args)[1])
    return calls


# ---- one clip


@pytest.mark.parametrize(("layer", "at"), [(None, 1), (2, 2)])
def test_sheet_and_film_show_the_maps_of_the_layer(vivit, drawn, tmp_path, layer, at):
    clip = torch.rand(3, 4, 32, 32)
    found = draw_film(vivit, clip, PREPROCESSING, tmp_path, "a.b", layer=layer)
    maps = attention_maps(vivit, clip[None])[at][0]
    assert torch.allclose(found.maps, maps, atol=1e-6)
    assert maps.shape == (2, 2, 2, 2)
    pictures = [picture_of(clip[:, t], PREPROCESSING) for t in range(4)]
    shown, of_slice, path, titles = drawn["sheet"]
    assert path == found.sheet == tmp_path / "a.b.png"
    assert [picture.tobytes() for picture in shown] == [pictures[1].tobytes(), pictures[3].tobytes()]
    assert torch.equal(of_slice, found.maps)
    assert titles == ["0.10 s", "0.30 s"]
    frames, path, fps = drawn["film"]
    assert (path, fps) == (tmp_path / "a.b.mp4", 10)
    expected = overlaid(pictures, found.maps[[0, 0, 1, 1]])  # a slice is two frames
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in expected]


@pytest.mark.parametrize(
    ("columns", "titles"),
    [(1, ["0.90 s"]), (3, ["0.30 s", "0.90 s", "1.30 s"]), (9, [f"{0.2 * i + 0.1:.2f} s" for i in range(8)])],
)
def test_a_sheet_has_at_most_so_many_slices(drawn, tmp_path, columns, titles):
    found = draw_film(
        model_of(16, kind="mlp"), torch.rand(3, 16, 32, 32), PREPROCESSING, tmp_path, "a", columns=columns
    )
    assert drawn["sheet"][3] == titles
    assert torch.equal(drawn["sheet"][1], found.maps[[round(float(title[:-2]) / 0.2 - 0.5) for title in titles]])


def test_a_clip_of_no_rate(vivit, tmp_path):
    with pytest.raises(InputError, match="preprocessing has no fps"):
        draw_film(vivit, torch.rand(3, 4, 32, 32), Preprocessing(frames=4), tmp_path, "a")


@pytest.mark.parametrize(
    ("tokens", "size", "last"),
    [(1, (60, 24), (30, 0)), (5, (180, 24), (150, 0)), (8, (90, 70), (60, 46)), (10, (120, 70), (60, 46))],
)
def test_tiles_lie_in_a_row_or_near_a_square_of_even_sides(tokens, size, last):
    picture = Image.new("RGB", (30, 23), (0, 200, 0))
    maps = torch.rand(1, tokens, 2, 2)
    (grid,) = overlaid([picture], maps)
    assert grid.size == size
    assert grid.crop((0, 0, 30, 23)).tobytes() == picture.tobytes()
    tile = grid.crop((*last, last[0] + 30, last[1] + 23))
    assert tile.tobytes() == overlay(picture, maps[0, -1]).tobytes()


# ---- videos


@pytest.fixture
def files(tmp_path) -> list[Path | FrameFolder]:
    """Two seconds; a fifth of one, which is shorter than the window; no video; and a folder of frames."""
    (tmp_path / "b" / "long.0").mkdir(parents=True)
    for i in range(10):
        Image.new("RGB", (40, 32), (20 * i, 0, 0)).save(tmp_path / "b" / "long.0" / f"{i}.png")
    (tmp_path / "text.mp4").write_text("damaged")
    frames = [Image.new("L", (32, 24), 4 * i) for i in range(60)]
    return [
        write_video(frames, tmp_path / "a" / "long.mp4", 30),
        write_video(frames[:6], tmp_path / "b" / "LONG.avi", 30),
        tmp_path / "text.mp4",
        FrameFolder(tmp_path / "b" / "long.0", 10.0),
    ]


def test_every_video_gets_a_sheet_and_a_film_of_its_own(vivit, files, tmp_path):
    found = write_films(vivit, files, tmp_path / "new")
    assert [film.file for film in found.films] == [str(files[i]) for i in (0, 1, 3)]
    for film, name in zip(found.films, ("long", "LONG-2", "long.0"), strict=True):
        assert (film.sheet.name, film.video.name) == (f"{name}.png", f"{name}.mp4")
        with Image.open(film.sheet) as sheet:
            assert sheet.width > 300
        info = probe(film.video)
        assert (info.frames, info.fps, info.width, info.height) == (4, 10, 3 * 96, 96)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["films"][0] == {
        "file": str(files[0]),
        "sheet": str(tmp_path / "new" / "long.png"),
        "video": str(tmp_path / "new" / "long.mp4"),
        "seconds": [0.8, 1.2],
    }
    assert [film["seconds"] for film in document["films"][1:]] == [[0, 0.2], [0.3, 0.7]]
    assert document["damaged"]["count"] == 1
    assert document["damaged"]["files"][0]["file"] == str(files[2])


def test_the_window_is_the_one_that_is_scored(vivit, files, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        module,
        "draw_film",
        lambda *args, **options: calls.append((args, options)) or module.Drawn(Path(), Path(), args[1]),
    )
    write_films(vivit, files, tmp_path, layer=2, columns=5)
    scored = clip_files(vivit, LabelledClips(tuple(files), (0,) * 4, ("",)), (1, 1))
    for (args, options), i in zip(calls, (0, 1, 3), strict=True):
        assert torch.equal(args[1], scored[i][0][0])
        assert (options["layer"], options["columns"]) == (2, 5)
    assert [options["seconds"] for _, options in calls] == [
        pytest.approx(seconds) for seconds in ([0.8, 0.9, 1.0, 1.1], [0, 0.1, 0.2, 0.2], [0.3, 0.4, 0.5, 0.6])
    ]


def test_no_video_is_written_over(vivit, files):
    before = files[0].read_bytes()
    (film,) = write_films(vivit, files[:1], files[0].parent).films
    assert film.video.name == "long-2.mp4"
    assert files[0].read_bytes() == before


def test_what_no_film_can_be_drawn_of(vivit, files, tmp_path):
    images = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    silent = model_of(fuser="fuser")
    silent.preprocessing = Preprocessing((3, 32, 32))
    for model, paths, options, reason in (
        (images, files, {}, "VisionTransformer takes images, and these are videos"),
        (silent, files, {}, "does not say how its clips are prepared"),
        (model_of(), files, {}, "no TokenLearner"),
        (vivit, files, {"layer": 0}, "no TokenLearner at layer 0; there is one at 1, 2"),
        (vivit, files, {"columns": 0}, "columns must be at least 1, not 0"),
        (vivit, files, {"on_error": "raise"}, r"text\.mp4: no video"),
        (vivit, files[2:3], {}, r"none of the 1 files could be read; the first: .*text\.mp4: no video"),
    ):
        with pytest.raises(InputError, match=reason):
            write_films(model, paths, tmp_path, **options)
