"""Clips by time: the right frame whatever the container, codec, rate or seek. Broken ones: test_damaged_videos.py."""

import csv
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from making_videos import HEIGHT, WIDTH, grey_frames, which, write_silence, write_video
from PIL import Image

from tokenlearner.data.containers import TOLERANCE, VideoFile
from tokenlearner.data.videos import DamagedVideo, FrameFolder, VideoInfo, find_videos, probe, read_clip
from tokenlearner.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "videos"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared videos are not here")

KINDS = {
    "long GOP with B-frames": ("a.mp4", {}),
    "short GOPs": ("a.mp4", {"gop": 10}),
    "open GOPs": ("a.mp4", {"gop": 15, "options": {"x264-params": "open-gop=1:scenecut=0:bframes=3:b-adapt=0"}}),
    "intra refresh": ("a.mp4", {"gop": 15, "options": {"x264-params": "intra-refresh=1:scenecut=0"}}),
    "matroska": ("a.mkv", {"gop": 15}),
    "open GOPs, matroska": ("a.mkv", {"gop": 15, "options": {"x264-params": "open-gop=1:scenecut=0:bframes=3"}}),
    "webm": ("a.webm", {"codec": "libvpx-vp9", "b_frames": None, "gop": 15}),
    "avi, MPEG-4 with B-frames": ("a.avi", {"codec": "mpeg4", "gop": 12, "options": {"qmin": "1", "qmax": "1"}}),
    "avi, H.264, no stamps": ("a.avi", {"gop": 12}),
    "avi, motion JPEG": ("a.avi", {"codec": "mjpeg", "pixels": "yuvj420p", "b_frames": None}),
    "transport stream": ("a.ts", {"gop": 15}),
    "mov": ("a.mov", {"gop": 20}),
    "starts at 3 s": ("a.mp4", {"gop": 20, "stamps": range(90, 150)}),
    "starts at 3 s, matroska": ("a.mkv", {"gop": 20, "stamps": range(90, 150)}),
}


def naive(path: Path) -> tuple[list[float], list[np.ndarray]]:
    """Seconds from the first frame, and frames, of everything there is, in one go."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    zero = frames[0].pts * frames[0].time_base
    return [float(f.pts * f.time_base - zero) for f in frames], [f.to_ndarray(format="rgb24") for f in frames]


def shown_at(stamps: list[float], time: float) -> int:
    return max((i for i, stamp in enumerate(stamps) if stamp <= time + TOLERANCE), default=0)


def random_times(duration: float, draw: random.Random) -> list[float]:
    if draw.random() < 0.3:
        return [draw.uniform(0, duration) for _ in range(5)]
    start, fps = draw.uniform(0, duration * 0.99), draw.choice([1, 6, 12, 30])
    times = [start + k / fps for k in range(draw.choice([1, 4, 16]))]
    draw.shuffle(times)
    return times


# ---- the right frames


@pytest.mark.parametrize("kind", KINDS)
def test_the_frames_are_those_that_decoding_everything_gives(tmp_path, kind):
    name, options = KINDS[kind]
    path = write_video(tmp_path / name, **options)
    stamps, frames = naive(path)
    assert which(np.stack(frames)) == list(range(60))
    assert probe(path) == VideoInfo(2.0, 60, 30.0, WIDTH, HEIGHT)
    for seed in range(12):
        times = random_times(2.0, random.Random(seed))
        clip = read_clip(path, times).numpy()
        assert which(clip) == [min(int((time + TOLERANCE) * 30), 59) for time in times]
        assert np.array_equal(clip, np.stack([frames[shown_at(stamps, time)] for time in times]))


def test_gif(tmp_path):
    pictures = [np.full((HEIGHT, WIDTH, 3), 255 * (i % 2), np.uint8) for i in range(12)]
    for i, picture in enumerate(pictures):
        picture[:, : 2 * i] = 255 - picture[:, : 2 * i]  # so that each frame is built on the ones before
    path = write_video(tmp_path / "a.gif", pictures, codec="gif", rate=10, pixels="rgb8", b_frames=None)
    assert probe(path) == VideoInfo(1.2, 12, 10.0, WIDTH, HEIGHT)
    times = [1.05, 0.0, 0.55, 0.59, 0.6, 3.0]
    expected = np.stack([pictures[i] for i in (10, 0, 5, 5, 6, 11)])
    assert np.array_equal(read_clip(path, times).numpy() > 128, expected > 128)  # in the few colours of a palette


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_uneven_stamps(tmp_path, name):
    stamps = [0, 7, 40, 41, 90, 200, 210, 500, 501, 999, 1500, 1600]  # milliseconds
    path = write_video(tmp_path / name, len(stamps), stamps=stamps, time_base=Fraction(1, 1000), gop=4)
    for shift, before in ((-0.0015, 1), (-0.0005, 0), (0.0, 0), (0.0003, 0)):  # half a millisecond is rounding
        times = [stamp / 1000 + shift for stamp in stamps[1:]]
        assert which(read_clip(path, times).numpy()) == [i - before for i in range(1, len(stamps))]
    assert which(read_clip(path, [0.3, 0.05, 1.2, 0.9]).numpy()) == [6, 3, 9, 8]


@pytest.mark.parametrize(("fps", "expected"), [(6, range(5, 55, 5)), (12, [5, 7, 10, 12, 15]), (30, range(5, 40))])
def test_windows_at_other_rates_than_the_videos(tmp_path, fps, expected):
    path = write_video(tmp_path / "a.mp4", gop=25)
    times = [5 / 30 + k / fps for k in range(len(expected))]
    assert which(read_clip(path, times).numpy()) == list(expected)


def test_the_last_frame_is_repeated_after_the_end(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    times = [k / 15 for k in range(64)]
    assert which(read_clip(path, times).numpy()) == [0, 2] + [4] * 62
    assert which(read_clip(path, [9.0, 0.01, 0.01]).numpy()) == [4, 0, 0]


def test_times_may_depend_on_the_duration(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    given = []
    assert which(read_clip(str(path), lambda seconds: [given.append(seconds) or seconds / 2]).numpy()) == [15]
    assert given == [1.0]


def test_only_what_is_needed_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 60, gop=10, b_frames=0, options={"x264-params": "scenecut=0"})
    decoded = []
    whole = VideoFile._decoded

    def counting(self, last=None):
        for time, frame in whole(self, last):
            decoded.append(round(time * 30))
            yield time, frame

    monkeypatch.setattr(VideoFile, "_decoded", counting)
    assert which(read_clip(path, [47 / 30]).numpy()) == [47]
    assert decoded == list(range(40, 49))  # the frame after it says how long it is shown
    decoded.clear()
    assert which(read_clip(path, [57 / 30, 3 / 30]).numpy()) == [57, 3]
    assert decoded == [*range(5), *range(50, 59)]  # the key frames between are skipped


def test_frames_without_stamps_are_counted_from_the_beginning(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 30, gop=5)

    class Unstamped:
        """The decoder's frames with their stamps taken away."""

        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            for packet in self.container.demux(stream):
                yield UnstampedPacket(packet)

    class UnstampedPacket:
        def __init__(self, packet):
            self.packet, self.size, self.is_keyframe, self.pts = packet, packet.size, packet.is_keyframe, None

        def decode(self):
            for frame in self.packet.decode():
                frame.pts = None
                yield frame

    opened = VideoFile._open
    monkeypatch.setattr(
        VideoFile, "_open", lambda self: (opened(self), setattr(self, "container", Unstamped(self.container)))
    )
    times = [20 / 30, 0.0, 11.5 / 30, 28.2 / 30]
    assert which(read_clip(path, times).numpy()) == [20, 0, 11, 28]


def test_formats_that_refuse_to_seek_are_decoded_from_the_beginning(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 60, gop=10)
    monkeypatch.setattr(VideoFile, "_seek", lambda self, seconds: False)
    assert which(read_clip(path, [1.9, 0.0, 1.0]).numpy()) == [57, 0, 30]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_that_goes_on_after_the_pictures_does_not_count(tmp_path, name):
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for i, picture in enumerate(grey_frames(30)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        write_silence(container, sound, 5.0)
    assert probe(tmp_path / name).duration == pytest.approx(1.0, abs=0.02)
    assert probe(tmp_path / name).frames == 30
    assert which(read_clip(tmp_path / name, [0.5, 2.0, 4.0]).numpy()) == [15, 29, 29]


# ---- size and orientation


def test_resizing_keeps_the_shape_and_the_picture(tmp_path):
    ramp = np.zeros((90, 161, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, 161)
    ramp[..., 1] = np.linspace(255, 0, 90)[:, None]
    path = write_video(tmp_path / "a.mp4", [ramp] * 3, pixels="yuv444p", options={"crf": "1"})
    assert read_clip(path, [0.0]).shape == (1, 90, 161, 3)
    for side, shape in ((45, (45, 80)), (30, (30, 54)), (89, (89, 159)), (180, (180, 322))):
        clip = read_clip(path, [0.0, 0.05], short_side=side)
        assert tuple(clip.shape) == (2, *shape, 3)
        expected = np.asarray(Image.fromarray(ramp).resize(shape[::-1], Image.Resampling.BILINEAR), np.float32)
        assert abs(clip[1].numpy() - expected).mean() < 2.5
    with pytest.raises(InputError, match="short_side is 0: give pixels"):
        read_clip(path, [0.0], short_side=0)


@pytest.mark.parametrize(("width", "height"), [(33, 25), (35, 17), (16, 64)])
def test_odd_sizes(tmp_path, width, height):
    picture = np.full((height, width, 3), 40, np.uint8)
    picture[:, width // 2 :] = 200
    path = write_video(tmp_path / "a.mp4", [picture] * 2, pixels="yuv444p", options={"crf": "1"})
    assert (probe(path).width, probe(path).height) == (width, height)
    assert abs(read_clip(path, [0.0])[0].numpy().astype(int) - picture).max() <= 3
    assert min(read_clip(path, [0.0], short_side=11).shape[1:3]) == 11


@pytest.mark.parametrize("angle", [0, 90, 180, -90])
def test_frames_are_turned_upright(tmp_path, angle):
    picture = np.full((24, 40, 3), 30, np.uint8)
    picture[:12, :20] = 220  # the upper left
    path = write_video(tmp_path / "a.mp4", [picture] * 3, rotation=angle)
    upright = np.rot90(picture, angle // 90)  # counter-clockwise
    clip = read_clip(path, [0.0])[0].numpy()
    assert clip.shape == upright.shape
    assert abs(clip.astype(int) - upright).mean() < 4
    assert (probe(path).width, probe(path).height) == upright.shape[1::-1]
    assert min(read_clip(path, [0.0], short_side=12).shape[1:3]) == 12


# ---- folders of pictures


def test_a_folder_of_pictures(tmp_path):
    for i, picture in enumerate(grey_frames(12)):
        Image.fromarray(picture).save(tmp_path / f"i_{i}.png")  # 10 and 11 come after 9, not after 1
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "notes.txt").touch()
    folder = FrameFolder(tmp_path, 10.0)
    assert probe(folder) == VideoInfo(1.2, 12, 10.0, WIDTH, HEIGHT)
    assert which(read_clip(folder, [1.1, 0.0, 0.55, 0.3, 0.3, 5.0]).numpy()) == [11, 0, 5, 3, 3, 11]
    assert which(read_clip(folder, lambda seconds: [seconds / 2], short_side=12).numpy()) == [6]
    assert read_clip(folder, [0.0], short_side=12).shape == (1, 12, 16, 3)
    (tmp_path / "i_4.png").write_bytes(b"")
    assert which(read_clip(folder, [0.3, 0.5]).numpy()) == [3, 5]
    with pytest.raises(DamagedVideo, match=r"i_4\.png: the file is empty"):
        read_clip(folder, [0.4])


def test_what_is_no_folder_of_pictures(tmp_path):
    for source, reason in (
        (FrameFolder(tmp_path, 5.0), f"{tmp_path}: holds no picture"),
        (FrameFolder(tmp_path / "gone", 5.0), f"{tmp_path / 'gone'}: No such file or directory"),
        (tmp_path, f"{tmp_path}: a folder, where a video file was expected; FrameFolder takes"),
    ):
        with pytest.raises(DamagedVideo) as caught:
            read_clip(source, [0.0])
        assert str(caught.value).startswith(reason)
    with pytest.raises(InputError, match="fps is 0: give the pictures a second, above 0"):
        FrameFolder(tmp_path, 0)


# ---- finding


def test_find_videos(tmp_path):
    for name in ("b/2.MP4", "b/10.webm", "a.mkv", "c/d/e.gif", "x.txt", ".h.mp4", ".c/x.mp4", "f/1.jpg", "f/2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    found = [tmp_path / name for name in ("a.mkv", "b/10.webm", "b/2.MP4", "c/d/e.gif")]
    assert find_videos(tmp_path) == found
    assert find_videos(str(tmp_path), frame_fps=5.0) == [*found, FrameFolder(tmp_path / "f", 5.0)]
    assert find_videos(tmp_path / "x.txt") == [tmp_path / "x.txt"]
    for path, word in (
        (tmp_path / "f", "holds no video: looked at any depth for"),
        (tmp_path / "no", "does not exist"),
    ):
        with pytest.raises(InputError, match=word):
            find_videos(path)


# ---- real files


@needs_shared
@pytest.mark.parametrize("folder", ["ut_interaction", "surveillance_fight", "asl_words", "long"])
def test_real_videos(folder):
    with (SHARED / folder / "clips.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for seed, row in enumerate(random.Random(0).sample(rows, 4)):
        path = SHARED / folder / row["file"]
        info = probe(path)
        assert (info.frames, info.width, info.height) == tuple(int(row[k]) for k in ("frames", "width", "height"))
        assert info.fps == pytest.approx(float(row["fps"]), rel=0.02)
        stamps, frames = naive(path)
        for more in range(3):
            times = random_times(info.duration, random.Random(3 * seed + more))
            expected = np.stack([frames[shown_at(stamps, time)] for time in times])
            assert np.array_equal(read_clip(path, times).numpy(), expected)


@needs_shared
def test_a_real_folder_of_pictures():
    folder = FrameFolder(SHARED / "frame_folders" / "ApplyEyeMakeup" / "v_000001", 25.0)
    assert probe(folder) == VideoInfo(1.0, 25, 25.0, 170, 128)
    clip = read_clip(folder, [0.0, 0.4, 0.96])
    for frame, name in zip(clip, ("i_0001.jpg", "i_0011.jpg", "i_0025.jpg")):
        assert np.array_equal(frame, np.asarray(Image.open(folder.path / name).convert("RGB")))
