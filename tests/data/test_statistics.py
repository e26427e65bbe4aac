"""What `tokenlearner data` counts in pictures and videos, prints, draws, and names as damaged or missing."""

import json
from pathlib import Path

import numpy as np
import pytest
from making_videos import write_video
from PIL import Image

from tokenlearner.cli import main
from tokenlearner.data.clip_sources import Listing
from tokenlearner.data.sharding import write_shards
from tokenlearner.data.statistics import NO_CLASS, statistics, table_rows
from tokenlearner.errors import InputError
from tokenlearner.inspection.statistics import draw_statistics

SHARED = Path(__file__).parents[3] / "shared" / "data" / "videos"


def draw(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height)).save(path)
    return path


@pytest.fixture
def videos(tmp_path) -> Path:
    """Four sound videos of three lengths and two rates, and two that are not."""
    root = tmp_path / "videos"
    write_video(root / "hug" / "a.mp4", 30)
    write_video(root / "hug" / "b.mp4", 60)
    write_video(root / "kick" / "c.avi", 20, rate=10, codec="mpeg4")
    write_video(root / "kick" / "d.mkv", [np.zeros((48, 80, 3), np.uint8)] * 90)
    (root / "kick" / "empty.mp4").touch()
    (root / "kick" / "text.webm").write_text("no video")
    (root / "kick" / "notes.txt").touch()
    return root


def test_videos(videos):
    seen = []
    found = statistics(videos, progress=lambda done, total: seen.append((done, total)))
    assert (found["data"], found["kind"], found["items"], found["files"], found["classes"]) == (
        "videos",
        "videos",
        6,
        6,
        2,
    )
    assert found["parts"] == {"videos/": {"items": 6, "classes": {"hug": 2, "kick": 4}}}
    assert found["hours"] == pytest.approx(8 / 3600, abs=1e-4)
    assert found["frames"] == 200
    seconds = {name: found["seconds"][name] for name in ("min", "median", "mean", "max")}
    assert seconds == {"min": 1, "median": 2, "mean": 2, "max": 3}
    assert sum(found["seconds"]["histogram"]["counts"]) == 4
    assert found["fps"] == [{"fps": 30.0, "files": 3}, {"fps": 10.0, "files": 1}]
    assert found["sizes"]["width"] == {"min": 32, "median": 32, "mean": 44, "max": 80}
    assert found["sizes"]["most"] == [
        {"width": 32, "height": 24, "files": 3},
        {"width": 80, "height": 48, "files": 1},
    ]
    assert [Path(entry["file"]).name for entry in found["damaged"]["files"]] == ["empty.mp4", "text.webm"]
    assert found["damaged"]["files"][0]["reason"] == "the file is empty"
    assert seen == [(i, 6) for i in range(1, 7)]
    assert json.loads(json.dumps(found)) == found


def test_videos_without_classes_and_in_two_parts(videos, tmp_path):
    flat = statistics(videos / "hug")
    assert flat["parts"] == {"hug/": {"items": 2, "classes": {NO_CLASS: 2}}}
    assert (flat["classes"], statistics(videos / "hug" / "a.mp4")["files"]) == (0, 1)
    split = tmp_path / "split"
    split.mkdir()
    (split / "train").symlink_to(videos)
    write_video(split / "val" / "hug" / "x.mp4", 3)
    found = statistics(split)
    assert found["parts"]["val/"] == {"items": 1, "classes": {"hug": 1}}
    assert found["parts"]["train/"]["items"] == 6


def test_a_list_of_clips(videos):
    path = videos / "clips.csv"
    rows = "hug/b.mp4,x,0.5,1\nhug/b.mp4,y,1.5,9\nhug/a.mp4,x;y,,\ngone.mp4,y,,\n"
    path.write_text(f"file,label,start,end\n{rows}")
    found = statistics(path)
    assert (found["items"], found["files"], found["frames"]) == (3, 2, 90)
    assert found["parts"] == {"clips.csv": {"items": 3, "classes": {"x": 2, "y": 2}}}
    assert (found["seconds"]["min"], found["seconds"]["max"]) == (0.5, 1)
    assert found["seconds"]["mean"] == pytest.approx((0.5 + 0.5 + 1) / 3, abs=0.01)
    assert found["missing"] == {"count": 1, "files": [str(videos / "gone.mp4")]}


def test_folders_of_pictures_as_videos(tmp_path):
    for i in range(6):
        draw(tmp_path / "a" / "v_1" / f"{i}.png", 20, 10)
    assert statistics(tmp_path, listing=Listing(frame_fps=12.0))["seconds"]["max"] == 0.5


def test_pictures(tmp_path):
    for i in range(3):
        draw(tmp_path / "set" / "train" / "cat" / f"{i}.png", 20 + i, 30)
    draw(tmp_path / "set" / "train" / "dog" / "1.gif", 64, 48)
    draw(tmp_path / "set" / "val" / "cat" / "1.png", 10, 12)
    (tmp_path / "set" / "val" / "cat" / "bad.jpg").write_bytes(b"none")
    found = statistics(tmp_path / "set")
    assert (found["kind"], found["items"], found["classes"]) == ("images", 6, 2)
    assert found["parts"] == {
        "train/": {"items": 4, "classes": {"cat": 3, "dog": 1}},
        "val/": {"items": 2, "classes": {"cat": 2, "dog": 0}},
    }
    assert found["sizes"]["width"] == {"min": 10, "median": 21, "mean": 27.4, "max": 64}
    assert found["sizes"]["height"]["min"] == 12
    assert [Path(entry["file"]).name for entry in found["damaged"]["files"]] == ["bad.jpg"]
    assert "hours" not in found
    flat = statistics(tmp_path / "set" / "train" / "cat")
    assert flat["parts"] == {"cat": {"items": 3, "classes": {NO_CLASS: 3}}}


def test_pictures_in_shards(tmp_path):
    for i in range(4):
        draw(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", 20, 30)
    write_shards(tmp_path / "set", tmp_path / "tars", size=20)
    found = statistics(tmp_path / "tars")
    assert (found["kind"], found["items"], found["damaged"]["count"]) == ("images", 4, 0)
    assert [part["classes"] for part in found["parts"].values()] == [{"a": 2, "b": 2}]


def test_what_is_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not exist: give a folder"):
        statistics(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no class folder"):
        statistics(tmp_path / "empty")


def test_the_tables_show_the_largest_classes(tmp_path):
    for i in range(5):
        for k in range(i + 1):
            draw(tmp_path / f"c{i}" / f"{k}.png", 8, 8)
    (columns, rows), (_, facts) = table_rows(statistics(tmp_path), most=2)
    assert columns == ("class", f"{tmp_path.name}/")
    assert rows == [("c4", "5"), ("c3", "4"), ("… and 3 more", "")]
    assert ("images", "15") in facts


def bars(path: Path) -> list[int]:
    """Heights in pixels of the blue bars in the upper left quarter, from left to right."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    quarter = pixels[: pixels.shape[0] // 2, : pixels.shape[1] // 2]
    columns = (quarter[..., 2] - quarter[..., 0] > 80).sum(axis=0).tolist()
    return [height for left, height in zip([0, *columns], columns) if height > 2 >= left]


def test_the_drawing_shows_the_counts(videos, tmp_path):
    found = statistics(videos)
    kick, hug = bars(draw_statistics(found, tmp_path / "new" / "a.png"))
    assert kick == pytest.approx(2 * hug, abs=4)
    many = {f"class_{i} $x$": i for i in range(100)}
    found["parts"] = {"train/": {"items": 1, "classes": many}, "val/": {"items": 1, "classes": {"Übung 猫": 3}}}
    assert len(bars(draw_statistics(found, tmp_path / "b.png"))) >= 1
    found["parts"] = {"train/": {"items": 0, "classes": {}}}
    assert bars(draw_statistics(found, tmp_path / "c.png")) == []


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_the_command(videos, tmp_path, capsys):
    code, out, err = run(capsys, "data", videos, "--output", tmp_path / "x.png", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == statistics(videos)
    assert (tmp_path / "x.png").stat().st_size > 5000
    (videos / "clips.csv").write_text("file,label\nhug/a.mp4,x\nkick/empty.mp4,y\ngone.mp4,y\n")
    code, out, err = run(capsys, "data", videos / "clips.csv")
    assert code == 0
    assert "1 damaged file skipped:" in err
    assert "empty.mp4: the file is empty" in err
    assert "1 listed file is not there:" in err
    assert "gone.mp4" in err
    assert "seconds" in out
    assert run(capsys, "data", tmp_path / "gone")[0] == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared videos are not here")
def test_real_videos():
    found = statistics(SHARED / "asl_words")
    assert (found["items"], found["damaged"]["count"]) == (20, 0)
    assert found["fps"] == [{"fps": 30.0, "files": 20}]
