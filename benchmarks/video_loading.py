"""Measures how fast one worker reads clips, against bare PyAV decoding the same frames of the same files.

python benchmarks/video_loading.py VIDEOS   # a folder of videos → benchmarks/video_loading.json (about a minute)

Bare PyAV decodes from the beginning to the last frame wanted, on one thread, and turns the wanted frames alone into RGB
arrays, once at their own size and once resized as the reader does it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import tokenlearner  # noqa: F401 - before what imports torchvision
from tokenlearner.data.clips import uniform_starts
from tokenlearner.data.containers import TOLERANCE
from tokenlearner.data.videos import find_videos, probe, read_clip, scaled
from tokenlearner.inspection.summary import hardware

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

OUTPUT = Path(__file__).parent / "video_loading.json"
FRAMES, SHORT_SIDE = 16, 112
WINDOWS = {"12 fps, centred": 12.0, "spread over the video": None}


def wanted_times(duration: float, fps: float | None) -> list[float]:
    fps = fps or FRAMES / duration
    (start,) = uniform_starts(duration, FRAMES / fps, 1)
    return [start + k / fps for k in range(FRAMES)]


def bare(path: Path, times: list[float], resize: bool) -> np.ndarray:
    """The frames at ``times``, which ascend, the way a loop over PyAV's decoder gives them."""
    shown, position = [], 0
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            step = 1 / stream.average_rate
            while position < len(times) and times[position] + TOLERANCE < frame.time + step:
                if resize:
                    width, height = scaled(frame.width, frame.height, SHORT_SIDE)
                    small = reformatter.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1)
                    shown.append(small.to_ndarray())
                else:
                    shown.append(frame.to_ndarray(format="rgb24"))
                position += 1
            if position == len(times):
                break
    return np.stack(shown)


def frames_per_second(read: Callable[[Path, list[float]], object], plan: dict[Path, list[float]]) -> float:
    start = time.perf_counter()
    for path, times in plan.items():
        read(path, times)
    return len(plan) * FRAMES / (time.perf_counter() - start)


def measure(files: list[Path], fps: float | None, rounds: int) -> dict:
    plan = {path: wanted_times(probe(path).duration, fps) for path in files}
    readers = {
        "reader": lambda path, times: read_clip(path, times, short_side=SHORT_SIDE),
        "bare_resized": lambda path, times: bare(path, times, True),
        "bare": lambda path, times: bare(path, times, False),
    }
    same = sum(np.array_equal(readers["reader"](p, t).numpy(), bare(p, t, True)) for p, t in plan.items())
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):  # in turn, so that what else the machine does falls on all of them
        for name, read in readers.items():
            speeds[name].append(frames_per_second(read, plan))
    ratios = {
        name: round(statistics.median(r / b for r, b in zip(speeds["reader"], speeds[name])), 3)
        for name in ("bare_resized", "bare")
    }
    medians = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    return {"files": len(plan), "files_with_equal_frames": same, "frames_per_second": medians, "ratio_over": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--every", type=int, default=2, help="Takes each so many-th file of the folder.")
    arguments = parser.parse_args()
    files = find_videos(arguments.videos)[:: arguments.every]
    torch.set_num_threads(1)
    document = {
        "command": "python benchmarks/video_loading.py VIDEOS",
        "what": f"{FRAMES} frames of each video, short side {SHORT_SIDE}, one process, one thread",
        "videos": arguments.videos.name,
        "hardware": hardware(),
        "pyav": av.__version__,
        "rounds": arguments.rounds,
        "windows": {name: measure(files, fps, arguments.rounds) for name, fps in WINDOWS.items()},
    }
    OUTPUT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
