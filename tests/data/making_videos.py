"""Tiny videos whose frames say which they are: frame i is grey of level 4·i, and survives lossy codecs to the level."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 32, 24
STEP = 4  # grey levels from one frame to the next


def write_video(
    path: Path,
    frames: Sequence[np.ndarray] | int = 60,
    *,
    codec: str = "libx264",
    rate: int = 30,
    stamps: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    gop: int = 250,
    b_frames: int | None = 2,
    pixels: str = "yuv420p",
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Pictures (h, w, 3), or so many grey ones, stamped 0, 1, … or as told in units of ``time_base`` (1/rate)."""
    pictures = grey_frames(frames) if isinstance(frames, int) else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamps[i] if stamps else i
            frame.time_base = time_base or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def grey_frames(count: int) -> list[np.ndarray]:
    return [np.full((HEIGHT, WIDTH, 3), STEP * i, np.uint8) for i in range(count)]


def which(clip: np.ndarray) -> list[int]:
    """The numbers of a clip's frames, by their grey levels: (t, h, w, 3) → t."""
    levels = np.asarray(clip, np.float64).reshape(len(clip), -1)
    assert (levels.max(axis=1) - levels.min(axis=1) <= 2).all()
    assert (abs(levels.mean(axis=1) / STEP - np.rint(levels.mean(axis=1) / STEP)) <= 1.5 / STEP).all()
    return np.rint(levels.mean(axis=1) / STEP).astype(int).tolist()


def write_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    for i in range(round(seconds * 8000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 1024 * i
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
