"""Pictures to an mp4 and back."""

import numpy as np
import pytest
from PIL import Image

from tokenlearner.data.videos import probe, read_clip
from tokenlearner.data.write_video import write_video
from tokenlearner.errors import InputError


def test_what_is_written_is_read_again(tmp_path):
    frames = [Image.new("L", (33, 24), 40 * t) for t in range(6)]
    path = write_video(frames, tmp_path / "new" / "clip.mp4", fps=4)
    info = probe(path)
    assert (info.frames, info.width, info.height) == (6, 32, 24)
    assert info.duration == pytest.approx(1.5, abs=0.01)
    clip = np.asarray(read_clip(path, [t / 4 for t in range(6)]))
    assert np.abs(clip.astype(int).mean(axis=(1, 2, 3)) - [40 * t for t in range(6)]).max() < 4


@pytest.mark.parametrize(
    ("frames", "fps", "why"),
    [([], 4, "at least one frame"), ([(8, 8)], 0, "a rate above 0"), ([(8, 8), (8, 10)], 4, "have one size")],
)
def test_what_is_no_video_is_refused(tmp_path, frames, fps, why):
    with pytest.raises(InputError, match=why):
        write_video([Image.new("RGB", size) for size in frames], tmp_path / "clip.mp4", fps=fps)
