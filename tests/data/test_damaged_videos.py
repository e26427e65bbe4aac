"""What broken videos are called, and that nothing of them is left open."""

import os
import pickle
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from making_videos import HEIGHT, WIDTH, grey_frames, which, write_silence, write_video

from tokenlearner.data.containers import VideoFile
from tokenlearner.data.images import DamagedImage
from tokenlearner.data.videos import DamagedVideo, probe, read_clip
from tokenlearner.errors import InputError


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def noisy(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(count)]


def cut(path: Path, share: float, **options) -> Path:
    content = write_video(path, noisy(90), **options).read_bytes()
    return write_bytes(path, content[: int(share * len(content))])


def sound_only(path: Path, cover: bool = False) -> Path:
    with av.open(str(path), "w") as container:
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        sound = container.add_stream("aac", rate=8000)
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(grey_frames(1)[0], format="rgb24")))
            container.mux(picture.encode(None))
        write_silence(container, sound, 1.0)
    return path


def without_frames(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        container.start_encoding()
    return path


def garbled(path: Path) -> Path:
    content = bytearray(write_video(path, noisy(30), gop=1, b_frames=0).read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 5] = bytes(len(content) // 5)
    return write_bytes(path, bytes(content))


UNKNOWN = "no video of a known format .*, or its header is damaged"
BROKEN = {
    "gone": (lambda f: f / "gone.mp4", "No such file or directory"),
    "empty": (lambda f: write_bytes(f / "a.mp4", b""), "the file is empty"),
    "text": (lambda f: write_bytes(f / "a.mp4", b"text\n" * 99), UNKNOWN),
    "a text FFmpeg would play": (lambda f: write_bytes(f / "a.txt", b"text\n" * 99), UNKNOWN),
    "zeros": (lambda f: write_bytes(f / "a.mp4", bytes(9999)), UNKNOWN),
    "a playlist": (lambda f: write_bytes(f / "a.m3u8", b"#EXTM3U\n#EXTINF:9,\nb.mp4\n#EXT-X-ENDLIST\n"), UNKNOWN),
    "sound only": (lambda f: sound_only(f / "a.mp4"), "holds no video, only sound"),
    "sound with a cover": (lambda f: sound_only(f / "a.mp4", cover=True), "holds no video, only sound"),
    "no frames": (lambda f: without_frames(f / "a.mkv"), "holds no frame: ends after its header"),
    "index cut off": (lambda f: cut(f / "a.mp4", 0.5), UNKNOWN),
    "frames cut off": (
        lambda f: cut(f / "a.mp4", 0.5, container_options={"movflags": "faststart"}),
        r"cut off: its index ends at byte \d+, the file at \d+",
    ),
    "the last byte cut off": (
        lambda f: cut(f / "a.mp4", 0.9999, container_options={"movflags": "faststart"}),
        "cut off: its index ends",
    ),
    "avi cut off": (lambda f: cut(f / "a.avi", 0.5, codec="mpeg4"), r"cut off: holds about \d+ of 90 frames"),
    "matroska cut off": (lambda f: cut(f / "a.mkv", 0.4), r"cut off: ends after 1\.\d\d s of 3\.00 s"),
    "garbled": (lambda f: garbled(f / "a.mp4"), "Invalid data found|is damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_broken_videos_are_called(tmp_path, kind):
    make, reason = BROKEN[kind]
    path = make(tmp_path)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(DamagedVideo, match=reason) as caught:
        read_clip(path, [k / 30 for k in range(88)])
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)
    if kind != "garbled":  # whose first frame is sound, which is all that is decoded
        with pytest.raises(DamagedVideo, match=reason):
            probe(path)
    del caught
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_a_clip_before_the_cut_can_be_read(tmp_path):
    assert read_clip(cut(tmp_path / "a.mkv", 0.4), [0.1, 0.2]).shape == (2, 48, 64, 3)


def test_clips_that_begin_after_the_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    assert which(read_clip(path, [0.99]).numpy()) == [29]
    with pytest.raises(DamagedVideo, match=r"ends at 1\.00 s, before the clip's first frame at 1\.20 s"):
        read_clip(path, [1.4, 1.2])


@pytest.mark.parametrize("times", [[], [-0.1], [float("nan")], [0.0, float("inf")]])
def test_times_that_are_none_are_the_callers_fault(tmp_path, times):
    path = write_video(tmp_path / "a.mp4", 3)
    with pytest.raises(InputError, match="give at least one, in seconds") as caught:
        read_clip(path, times)
    assert not isinstance(caught.value, DamagedVideo)


def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DamagedVideo, match="a pipe, socket or device, where a video file was expected"):
        read_clip(tmp_path / "pipe.mp4", [0.0])


def test_a_missing_library_is_no_damaged_file(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError):
        read_clip(path, [0.0])


def test_names_that_look_like_protocols_patterns_or_no_text(tmp_path):
    made = write_video(tmp_path / "made.mp4", 3)
    for name in ("pipe:1.mp4", "a%03d ü?.mp4", os.fsdecode(b"\xff\xfe.mp4")):
        os.link(made, tmp_path / name)
        assert which(read_clip(tmp_path / name, [0.05]).numpy()) == [1]
    write_bytes(tmp_path / os.fsdecode(b"\xff.mp4"), b"")
    with pytest.raises(DamagedVideo) as caught:
        read_clip(tmp_path / os.fsdecode(b"\xff.mp4"), [0.0])
    assert str(caught.value).encode().endswith(b"\\udcff.mp4: the file is empty")


def test_one_thread_and_nothing_left_open(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.ts", 60, gop=15)  # is opened again when seeks go wrong
    threads = []
    opened = VideoFile._open
    monkeypatch.setattr(
        VideoFile, "_open", lambda self: (opened(self), threads.append(self.stream.codec_context.thread_count))
    )
    before = len(list(Path("/proc/self/fd").iterdir()))
    for times in ([0.2], [1.5], [0.0, 1.9]):
        read_clip(path, times)
    assert set(threads) == {1}
    assert len(threads) > 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_damaged_video_survives_a_workers_pickling():
    error = DamagedVideo("a: b.mp4", "cut off: at 1 s")
    again = pickle.loads(pickle.dumps(error))
    assert (again.path, again.reason) == (error.path, error.reason)
    raised = DamagedVideo(
        f"Caught DamagedVideo in worker 0.\nTraceback …\nx.DamagedVideo: {DamagedVideo('c.mp4', 'why')}"
    )
    assert (raised.path, raised.reason) == ("c.mp4", "why")
    assert isinstance(error, DamagedImage)
