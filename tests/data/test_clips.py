"""Clips as training and evaluation take them: windows, views, what is done to pixels, labels, workers, damage."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from making_videos import HEIGHT, STEP, WIDTH, write_video
from PIL import Image
from torch.utils.data import DataLoader

from tokenlearner.data.clips import (
    ClipFiles,
    ClipTransform,
    ClipView,
    Event,
    EveryFrame,
    LabelledClips,
    random_start,
    uniform_starts,
    window_times,
)
from tokenlearner.data.images import Damaged, collate
from tokenlearner.data.videos import DamagedVideo, FrameFolder
from tokenlearner.errors import InputError
from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.training.material import training_transform
from tokenlearner.training.recipe import AugmentRecipe

PLAIN = ClipTransform(size=16, short_side=HEIGHT, flip=0.0, mean=(0, 0, 0), std=(1, 1, 1))


def numbers(clip: torch.Tensor) -> list[int]:
    """The numbers of the frames of (…, 3, t, h, w), by their grey levels."""
    levels = clip.movedim(-4, -1).mean(dim=(-3, -2, -1)) * 255 / STEP
    assert (levels - levels.round()).abs().max() < 0.4
    return levels.round().int().flatten().tolist()


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """60 frames, 2 seconds."""
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", 60, gop=20)


def of(*files, labels=None, **more) -> LabelledClips:
    return LabelledClips(tuple(files), labels or (0,) * len(files), ("x", "y", "z"), **more)


# ---- windows


def test_window_times():
    assert window_times(1.5, 4, 12.5) == pytest.approx([1.5, 1.58, 1.66, 1.74])


@pytest.mark.parametrize(
    ("duration", "length", "count", "expected"),
    [(10, 2, 1, [4]), (10, 2, 4, [1, 3, 5, 7]), (10, 2, 2, [2, 6]), (2, 2, 3, [0, 0, 0]), (1, 2, 2, [0, 0])],
)
def test_uniform_starts(duration, length, count, expected):
    assert uniform_starts(duration, length, count) == pytest.approx(expected)


def test_random_starts_fill_the_free_time():
    generator = torch.Generator().manual_seed(0)
    starts = [random_start(10.0, 2.0, generator) for _ in range(500)]
    assert 0 <= min(starts) < 0.1
    assert 7.9 < max(starts) <= 8
    assert abs(np.mean(starts) - 4) < 0.4
    assert random_start(10.0, 2.0, torch.Generator().manual_seed(0)) == starts[0]
    assert random_start(1.0, 2.0) == 0


def test_evaluation_takes_the_same_windows_every_time(video):
    dataset = ClipFiles(of(video), PLAIN, frames=3, fps=10.0, views=(2, 1))
    clip, label, index = dataset[0]
    assert (clip.shape, clip.dtype, label, index) == ((2, 3, 3, 16, 16), torch.float32, 0, 0)
    # 1.7 seconds are free: windows begin at 0.425 and 1.275, on frames 12.75 and 38.25.
    assert numbers(clip) == [12, 15, 18, 38, 41, 44]
    assert torch.equal(dataset[0][0], clip)


def test_training_draws_its_window_from_torchs_random_numbers(video):
    dataset = ClipFiles(of(video), PLAIN, frames=4, fps=15.0)
    torch.manual_seed(3)
    drawn = [numbers(dataset[0][0]) for _ in range(25)]
    assert dataset[0][0].shape == (3, 4, 16, 16)
    assert {tuple(b - a for a, b in pairwise(window)) for window in drawn} == {(2, 2, 2)}
    firsts = [window[0] for window in drawn]
    assert 0 <= min(firsts) < 12
    assert 40 < max(firsts) <= 52
    torch.manual_seed(3)
    assert [numbers(dataset[0][0]) for _ in range(25)] == drawn


def test_clips_shorter_than_the_window_repeat_their_last_frame(video, tmp_path):
    short = write_video(tmp_path / "b.mp4", 4)
    for views in (None, (1, 1)):
        clip = ClipFiles(of(short), PLAIN, frames=6, fps=15.0, views=views)[0][0]
        assert numbers(clip) == [0, 2, 3, 3, 3, 3]


def test_a_clip_may_be_a_span_of_its_video(video):
    spans = ((0.5, 1.0), None, (1.0, 1.2), (1.5, 9.0), (2.0, 3.0))
    clips = of(*[video] * 5, spans=spans)
    dataset = ClipFiles(clips, PLAIN, frames=3, fps=10.0, views=(1, 1))
    assert numbers(dataset[0][0]) == [18, 21, 24]  # 0.6 s on: centred in the span
    assert numbers(dataset[1][0]) == [25, 28, 31]
    assert numbers(dataset[2][0]) == [30, 33, 35]  # the span's last frame again, not the one after it
    assert numbers(dataset[3][0]) == [48, 51, 54]  # to the end of the video: centred in 1.5 to 2
    assert dataset[4] == Damaged(str(video), "ends at 2.00 s, before its clip from 2 s to 3 s")
    starts = {numbers(ClipFiles(clips, PLAIN, frames=2, fps=10.0)[0][0])[0] for _ in range(60)}
    assert starts >= set(range(16, 24))
    assert starts <= set(range(15, 25))
    assert ClipFiles(of(video, spans=((3.0, 1.0),)), PLAIN, frames=1, fps=1.0)[0].reason == (
        "its clip is listed from 3 s to 1 s"
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"frames": 0, "fps": 1.0}, "0 frames at 1.0 a second"),
        ({"frames": 1, "fps": 0.0}, "1 frames at 0.0 a second"),
        ({"frames": 1, "fps": 1.0, "views": (0, 3)}, "views is"),
        ({"frames": 1, "fps": 1.0, "label_by": "window"}, "takes multi-label clips with events"),
    ],
)
def test_what_no_clip_can_be(video, options, word):
    with pytest.raises(InputError, match=word):
        ClipFiles(of(video), PLAIN, **options)


# ---- pixels


def ramp(height: int, width: int) -> torch.Tensor:
    """(2, height, width, 3): red is the column, green the row, blue the frame."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.stack([columns, rows, torch.full_like(rows, t)], dim=-1) for t in (5, 9)]).byte()


def corner(clip: torch.Tensor) -> tuple[int, int]:
    """(column, row) of the upper left pixel of what came out of PLAIN."""
    left, top = (clip[:2, 0, 0, 0] * 255).round().int().tolist()
    return left, top


def test_evaluation_crops_lie_along_the_longer_side():
    wide, tall = ramp(24, 40), ramp(60, 24)
    assert [corner(PLAIN(wide, PLAIN.view(a))) for a in (0.0, 0.5, 1.0)] == [(0, 4), (12, 4), (24, 4)]
    assert [corner(PLAIN(tall, PLAIN.view(a))) for a in (0.0, 0.5, 1.0)] == [(4, 0), (4, 22), (4, 44)]
    assert corner(PLAIN(wide)) == (12, 4)


def test_a_clip_is_cropped_flipped_and_normalised_alike():
    clip = ramp(24, 40)
    transform = ClipTransform(size=20, short_side=24, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    out = transform(clip, ClipView(24, 0.25, 1.0, True))
    cropped = clip[:, 4:24, 5:25].flip(2).float() / 255
    expected = (cropped - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 1.0, 2.0])
    assert torch.allclose(out, expected.permute(3, 0, 1, 2), atol=1e-6)
    assert out.is_contiguous()
    assert clip.equal(ramp(24, 40))


def test_other_sizes_are_resized_to_the_short_side():
    out = PLAIN(ramp(48, 80), PLAIN.view(0.0))
    assert out.shape == (3, 2, 16, 16)
    columns = (out[0, 0, 8] * 255).round()
    assert (columns.diff() - 2).abs().max() <= 1  # each pixel stands for two
    assert abs(columns[8] - (2 * 8 + 0.5)) <= 1


def test_draws():
    transform = ClipTransform(size=10, short_side=12, largest_short_side=16, flip=0.25)
    views = [transform.draw() for _ in range(800)]
    assert {view.short_side for view in views} == {12, 13, 14, 15, 16}
    assert abs(np.mean([view.flip for view in views]) - 0.25) < 0.06
    for name in ("along", "across"):
        values = [getattr(view, name) for view in views]
        assert min(values) < 0.02
        assert max(values) > 0.98
        assert abs(np.mean(values) - 0.5) < 0.05
    assert abs(np.corrcoef([v.along for v in views], [v.across for v in views])[0, 1]) < 0.15
    assert not any(ClipTransform(size=10, short_side=12, flip=0.0).draw().flip for _ in range(50))


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 30, "short_side": 20}, {"short_side": 256, "largest_short_side": 250}]
)
def test_sizes_that_do_not_fit(options):
    with pytest.raises(InputError, match="give pixels that do not fall"):
        ClipTransform(**options)


def test_views_are_windows_by_crops(tmp_path):
    pictures = []
    for i in range(30):
        pictures.append(np.full((24, 64, 3), 4 * i, np.uint8))
        pictures[-1][:, 40:] += 100
    video = write_video(tmp_path / "a.mp4", pictures)
    clip = ClipFiles(of(video), PLAIN, frames=2, fps=10.0, views=(2, 3))[0][0]
    assert clip.shape == (6, 3, 2, 16, 16)
    levels = (clip.mean(dim=(1, 3, 4)) * 255).round().reshape(2, 3, 2)
    # 0.8 s are free: frames 6 and 9, then 18 and 21; crops from columns 0, 24 and 48: dark, up to the edge, bright.
    expected = torch.tensor([[24.0, 36.0], [72.0, 84.0]])
    assert (levels[:, 0] - expected).abs().max() <= 2
    assert (levels[:, 2] - expected - 100).abs().max() <= 2
    assert (levels[:, 1] - levels[:, 0]).abs().max() <= 8


def test_training_decodes_at_the_drawn_size(tmp_path):
    draw = np.random.default_rng(0)
    video = write_video(tmp_path / "a.mp4", [draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)] * 3)
    transform = ClipTransform(size=24, short_side=24, largest_short_side=48, mean=(0, 0, 0), std=(1, 1, 1))
    clips = [ClipFiles(of(video), transform, frames=1, fps=1.0)[0][0] for _ in range(20)]
    spreads = [clip.std().item() for clip in clips]
    assert max(spreads) > 1.5 * min(spreads)  # noise is smoothed by the factor of the resize


# ---- labels


def test_labels_of_the_video_or_of_the_window(video):
    events = ((Event(0, 0.0, 0.5), Event(2, 0.9, 40.0), Event(2, 1.2, 1.3), Event(1, 1.05, 1.05)), ())
    clips = of(video, video, labels=((0, 1, 2), ()), events=events)
    options = {"frames": 3, "fps": 10.0, "views": (1, 1)}
    assert ClipFiles(clips, PLAIN, **options)[0][1].tolist() == [1, 1, 1]
    by_window = ClipFiles(clips, PLAIN, label_by="window", **options)  # 0.85 to 1.15 s
    assert by_window[0][1].tolist() == [0, 1, 1]
    assert by_window[1][1].tolist() == [0, 0, 0]
    both_ends = ClipFiles(clips, PLAIN, label_by="window", frames=3, fps=10.0, views=(2, 1))  # 0.425 and 1.275 s
    assert both_ends[0][1].tolist() == [1, 0, 1]


def test_labelled_clips():
    files = (Path("a.mp4"), Path("b.mp4"), FrameFolder(Path("c"), 5.0))
    clips = of(*files, labels=(0, 1, 2), spans=(None, (1, 2), None), missing=(Path("gone.mp4"),))
    assert (len(clips), clips.multilabel) == (3, False)
    assert clips.subset([2, 1]) == of(files[2], files[1], labels=(2, 1), spans=(None, (1, 2)))
    several = clips.as_multilabel()
    assert several.labels == ((0,), (1,), (2,))
    assert (several.multilabel, several.spans, several.as_multilabel() is several) == (True, clips.spans, True)
    with pytest.raises(InputError, match="2 spans for 3 files: give one for each"):
        of(*files, spans=(None, None))


def test_clips_of_one_video_stay_together_in_a_split():
    files = [Path(f"{i // 3:02}.mp4") for i in range(60)]
    clips = of(*files, labels=tuple((i // 3) % 2 for i in range(60)), spans=tuple((i, i + 1.0) for i in range(60)))
    train, val = clips.split(0.3, seed=1)
    assert (len(train), len(val)) == (42, 18)
    assert not set(train.files) & set(val.files)
    assert sorted(span for part in (train, val) for span in part.spans) == sorted(clips.spans)
    assert sorted(val.labels) == [0] * 9 + [1] * 9
    assert clips.split(0.3, seed=1)[1] == val != clips.split(0.3, seed=2)[1]


# ---- in a loader


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> LabelledClips:
    """Ten videos of 3 to 12 frames; numbers 2 and 7 are damaged."""
    folder = tmp_path_factory.mktemp("several")
    files = [write_video(folder / f"{i}.mp4", 3 + i) for i in range(10)]
    files[2].write_bytes(b"")
    files[7].write_bytes(files[7].read_bytes()[:700])
    return of(*files, labels=tuple(i % 3 for i in range(10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_good_video_comes_once_and_every_damaged_one_is_named(several, workers):
    dataset = ClipFiles(several, PLAIN, frames=16, fps=30.0, views=(1, 1))
    batches = list(DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers, collate_fn=collate))
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == [0, 1, 3, 4, 5, 6, 8, 9]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), indices % 3)
    for clip, index in zip(torch.cat([batch.images for batch in batches]), indices.tolist()):
        assert numbers(clip) == [min(t, 2 + index) for t in range(16)]
    damaged = {Path(one.path).name: one.reason for batch in batches for one in batch.damaged}
    assert damaged["2.mp4"] == "the file is empty"
    assert "no video of a known format" in damaged["7.mp4"]
    assert len(damaged) == 2


def failure_of(loader: DataLoader) -> DamagedVideo:
    """Without its traceback, which would hold on to the loader: torch takes 10 s to end workers it finds as garbage."""
    try:
        list(loader)
    except DamagedVideo as error:
        return error.with_traceback(None)
    pytest.fail("nothing was raised")


@pytest.mark.parametrize("workers", [0, 1])
def test_raise_names_the_file_also_from_a_worker(several, workers):
    dataset = ClipFiles(several.subset([1, 2]), PLAIN, frames=2, fps=30.0, on_error="raise")
    error = failure_of(DataLoader(dataset, num_workers=workers, collate_fn=collate))
    assert (error.path, error.reason) == (str(several.files[2]), "the file is empty")


def test_a_transform_that_fails_is_not_a_damaged_file(video):
    class Broken(ClipTransform):
        def __call__(self, clip, view=None):
            raise ValueError("in the transform")

    with pytest.raises(ValueError, match="in the transform"):
        ClipFiles(of(video), Broken(size=16, short_side=WIDTH), frames=1, fps=1.0)[0]


# ---- transforms of pictures


def test_a_random_transform_of_pictures_is_alike_for_every_frame():
    """Everything timm draws at random, from any of the three generators."""
    preprocessing = Preprocessing((3, 24, 24))
    augment = AugmentRecipe("rand-m9-n2-mstd0.5", scale=(0.2, 1.0), color_jitter=0.4, erasing=1.0)
    transform = EveryFrame(training_transform(preprocessing, augment))
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 40, 50, 3), np.uint8))
    clip = noise.expand(3, -1, -1, -1).contiguous()
    first, second = transform(clip), transform(clip)
    assert first.shape == (3, 3, 24, 24)
    for frames in (first, second):
        assert torch.equal(frames[:, 0], frames[:, 1])
        assert torch.equal(frames[:, 0], frames[:, 2])
    assert not torch.equal(first, second)


def test_the_generators_go_on_as_if_nothing_had_been_drawn_but_a_seed():
    def after(frames: int) -> tuple[float, float, float]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        EveryFrame(draws)(torch.zeros(frames, 2, 2, 3, dtype=torch.uint8))
        return random.random(), np.random.random(), torch.rand(()).item()

    def draws(picture):
        return torch.tensor([random.random(), np.random.random()]) + torch.rand(2)

    assert after(1) == after(5)


def test_a_training_clip_is_what_augment_makes_of_its_window(video):
    seen = []

    def augment(clip: torch.Tensor) -> torch.Tensor:
        seen.append(clip)
        return torch.full((1,), 7.0)

    clips = of(video, labels=(2,))
    sample = ClipFiles(clips, PLAIN, frames=4, fps=30, augment=augment)[0]
    assert (sample[0].tolist(), sample[1:]) == ([7.0], (2, 0))
    assert (seen[0].shape, seen[0].dtype) == ((4, HEIGHT, WIDTH, 3), torch.uint8)
    assert ClipFiles(clips, PLAIN, frames=4, fps=30, views=(1, 1), augment=augment)[0][0].shape == (1, 3, 4, 16, 16)


def test_grey_frames_are_as_pillow_makes_them():
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8))
    grey = ClipTransform(16, 16, mean=(0.0,), std=(1.0,))(clip) * 255
    expected = np.stack([np.asarray(Image.fromarray(frame.numpy()).convert("L")) for frame in clip])
    assert grey.shape == (1, 2, 16, 16)
    assert (grey[0] - torch.from_numpy(expected)).abs().max() < 1.01  # Pillow rounds to whole levels
