"""A video's frames one after the other: the same that reading clips gives, at the same seconds."""

import math
from itertools import pairwise
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
from making_videos import HEIGHT, WIDTH, which, write_video
from PIL import Image
from test_videos import KINDS, naive

from tokenlearner.data import streaming as module
from tokenlearner.data.images import Damaged
from tokenlearner.data.streaming import Pictures, find_sources, read_frames
from tokenlearner.data.videos import DamagedVideo, FrameFolder, read_clip


def write_pictures(folder: Path, levels: list[int], width: int = WIDTH) -> Path:
    """Named 0.png, 1.png, …, 10.png, so that their order is not that of letters."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, level in enumerate(levels):
        Image.new("RGB", (width, HEIGHT), (level,) * 3).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_all_frames_come_once_and_in_order(tmp_path, kind):
    name, options = KINDS[kind]
    path = write_video(tmp_path / name, **options)
    stamps, frames = naive(path)
    found = list(read_frames(path))
    assert [frame.number for frame in found] == list(range(60))
    assert np.array_equal(np.stack([frame.pixels for frame in found]), np.stack(frames))
    assert [frame.seconds for frame in found] == pytest.approx(stamps, abs=1e-3)
    assert all(a.share < b.share for a, b in pairwise(found))
    assert 0.95 < found[-1].share <= 1


@pytest.mark.parametrize("fps", [0.4, 4.0, 7.0, 30.0, 45.0])
@pytest.mark.parametrize("kind", ["long GOP with B-frames", "short GOPs", "avi, motion JPEG", "matroska"])
def test_frames_at_a_rate_are_those_of_a_clip(tmp_path, kind, fps):
    name, options = KINDS[kind]
    path = write_video(tmp_path / name, **options)
    found = list(read_frames(path, fps))
    times = [k / fps for k in range(math.ceil(2 * fps))]  # the video is two seconds long
    assert [frame.seconds for frame in found] == times
    assert np.array_equal(np.stack([frame.pixels for frame in found]), read_clip(path, times).numpy())
    assert which(found[-1].pixels[None]) == [int((times[-1] + 1e-9) * 30)]


def test_frames_can_be_read_smaller(tmp_path):
    path = write_video(tmp_path / "a.mp4", rotation=90)
    found = np.stack([frame.pixels for frame in read_frames(path, 3.0, short_side=12)])
    assert found.shape == (6, 16, 12, 3)
    assert np.array_equal(found, read_clip(path, [k / 3 for k in range(6)], short_side=12).numpy())


def test_only_as_much_is_decoded_as_is_asked_for(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    converted = []

    class Counting(module.Converter):
        def __call__(self, frame):
            converted.append(frame.pts)
            return super().__call__(frame)

    monkeypatch.setattr(module, "Converter", Counting)
    frames = read_frames(path)
    next(frames), next(frames)
    assert len(converted) == 2
    frames.close()


# ---- folders of pictures


def test_a_folder_of_frames_has_times(tmp_path):
    folder = FrameFolder(write_pictures(tmp_path / "a", [10 * i for i in range(12)]), 6.0)
    found = list(read_frames(folder))
    assert [frame.seconds for frame in found] == [i / 6 for i in range(12)]
    assert [frame.pixels[0, 0, 0] for frame in found] == [10 * i for i in range(12)]
    assert [frame.name for frame in found] == [f"{i}.png" for i in range(12)]
    assert found[5].share == 0.5
    slower = list(read_frames(folder, 4.0))
    assert [frame.seconds for frame in slower] == [k / 4 for k in range(8)]
    assert [frame.pixels[0, 0, 0] for frame in slower] == [0, 10, 30, 40, 60, 70, 90, 100]  # ⌊6·k/4⌋


def test_pictures_have_no_times_and_damaged_ones_keep_their_place(tmp_path):
    folder = write_pictures(tmp_path / "a", [0, 50, 100])
    (folder / "1.png").write_text("no picture")
    Image.new("RGB", (8, 6), (7, 7, 7)).save(folder / "0.png")
    first, damaged, last = read_frames(Pictures(folder))
    assert isinstance(damaged, Damaged)
    assert damaged.path == str(folder / "1.png")
    assert [(frame.number, frame.name) for frame in (first, last)] == [(0, "0.png"), (2, "2.png")]
    assert first.seconds is last.seconds is None
    assert (first.pixels.shape, last.pixels.shape) == ((6, 8, 3), (HEIGHT, WIDTH, 3))
    first, _, last = read_frames(Pictures(folder), short_side=12)
    assert first.pixels.shape == last.pixels.shape == (12, 16, 3)


def test_a_single_picture(tmp_path):
    path = write_pictures(tmp_path, [77]) / "0.png"
    (found,) = read_frames(*find_sources(path))
    assert (found.number, found.seconds, found.name, found.share) == (0, None, "", 1.0)
    assert (found.pixels == 77).all()


def test_what_a_folder_holds(tmp_path):
    write_pictures(tmp_path / "b" / "frames", [0])
    write_pictures(tmp_path, [0])
    (tmp_path / "b" / "a.MP4").touch()
    (tmp_path / "c.txt").touch()
    video, folders = tmp_path / "b" / "a.MP4", [tmp_path, tmp_path / "b" / "frames"]
    assert find_sources(tmp_path) == [video, *map(Pictures, folders)]
    assert find_sources(tmp_path, 5.0) == [video, *(FrameFolder(folder, 5.0) for folder in folders)]
    assert find_sources(video) == [video]


# ---- what can't be read


@pytest.mark.parametrize(("fps", "most"), [(None, 30), (10.0, 10)])
def test_a_video_that_is_cut_off_says_so_when_its_end_is_reached(tmp_path, fps, most):
    noise = [np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8) for i in range(60)]
    path = write_video(tmp_path / "a.mkv", noise, gop=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    seen = []
    with pytest.raises(DamagedVideo, match=r"a\.mkv: cut off: ends after 0\.\d\d s of 2\.00 s"):
        seen.extend(map(attrgetter("number"), read_frames(path, fps)))
    assert seen == list(range(len(seen)))
    assert 0 < len(seen) < most


def test_an_empty_folder(tmp_path):
    with pytest.raises(DamagedVideo, match="holds no picture"):
        next(read_frames(FrameFolder(tmp_path, 5.0)))
