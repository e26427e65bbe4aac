"""Pictures to an mp4, for the overlays that `maps` draws."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image

from tokenlearner.errors import InputError


def write_video(frames: Sequence[Image.Image], path: str | Path, fps: float) -> Path:
    """Writes ``frames`` of one size as H.264 with ``fps`` frames a second and returns ``path``.

    Odd sides lose their last row or column, as the codec wants even ones.

    Raises:
        InputError: No frame, frames of different sizes, or a rate that is not above 0.
    """
    import av

    if not frames or fps <= 0:
        raise InputError(f"a video needs at least one frame and a rate above 0, not {len(frames)} and {fps}")
    if len({frame.size for frame in frames}) > 1:
        raise InputError(f"the frames of a video have one size, not {sorted({frame.size for frame in frames})}")
    width, height = (side // 2 * 2 for side in frames[0].size)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_image(frame.convert("RGB").crop((0, 0, width, height)))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path
