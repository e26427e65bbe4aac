"""Measures how much memory `tokenlearner tokens` takes for videos of 1, 5 and 10 minutes, each in a process of its own.

python benchmarks/streaming.py           # → benchmarks/streaming.json (about 10 minutes on one core)
python benchmarks/streaming.py FILM.mp4  # its frames over and over, in place of moving digits

The videos are 128×128 at 30 frames a second. The model is as wide as ViT-B (768) and two layers deep, for pictures of
64² in patches of 32, with random weights: what is to be seen is the memory, so the model is cheap and its tokens are
not. Ten minutes of them are 221 MB. The peak is the largest resident set of the process, which Linux counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tokenlearner  # before what imports torchvision
from tokenlearner.data.streaming import read_frames
from tokenlearner.data.write_video import write_video
from tokenlearner.inspection.summary import hardware

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

OUTPUT = Path(__file__).parent / "streaming.json"
MINUTES, FPS, SIDE = (1, 5, 10), 30, 128
MOST_FRAMES = 300  # of a film that is given


def digits() -> list[Image.Image]:
    """Every digit hopping once around its ring: 80 frames."""
    from tokenlearner.data.moving_digits import MEAN, STD, load

    clips = load().test
    frames = np.concatenate([clips[i][0][0].numpy() for i in range(10)]) * STD + MEAN
    return [Image.fromarray((255 * frame.clip(0, 1)).astype(np.uint8)).resize((SIDE, SIDE)) for frame in frames]


def frames_of(film: Path) -> list[Image.Image]:
    found = []
    for frame in read_frames(film):
        found.append(Image.fromarray(frame.pixels).resize((SIDE, SIDE)))
        if len(found) == MOST_FRAMES:
            break
    return found


def wide_model(folder: Path) -> Path:
    torch.manual_seed(0)
    host = VisionTransformer(img_size=64, patch_size=32, embed_dim=768, depth=2, num_heads=12, num_classes=0)
    model = tokenlearner.insert(host, num_tokens=8, at=1)
    return tokenlearner.save(model, folder, preprocessing=tokenlearner.Preprocessing((3, 64, 64), crop_pct=1.0))


CHILD = """
import sys
from pathlib import Path
from tokenlearner.cli import main
try:
    main(sys.argv[1:])
finally:
    print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def peak_of(arguments: list[str]) -> float:
    """The most memory in MB that the command takes in a process of its own.

    It is asked of /proc, because what a parent is told of its child counts the memory they shared before.
    """
    run = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    kilobytes = int(run.stdout.splitlines()[-1].split()[1])
    return round(kilobytes * 1024 / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path, nargs="?")
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES)
    parser.add_argument("--formats", nargs="+", default=["safetensors"])
    arguments = parser.parse_args()
    frames = frames_of(arguments.film) if arguments.film else digits()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = wide_model(folder / "model")
        for minutes in arguments.minutes:
            count = round(minutes * 60 * FPS)
            video = write_video([frames[i % len(frames)] for i in range(count)], folder / f"{minutes:g}.mp4", FPS)
            for kind in arguments.formats:
                out = folder / f"{minutes:g}-{kind}"
                peak = peak_of(["tokens", str(model), str(video), str(out), "--format", kind, "--device", "cpu"])
                (file,) = out.iterdir()
                size = {
                    "video_mb": round(video.stat().st_size / 1e6, 1),
                    "tokens_mb": round(file.stat().st_size / 1e6, 1),
                }
                rows.append({"minutes": minutes, "frames": count, "format": kind, **size, "peak_mb": peak})
                print(rows[-1], flush=True)
    document = {
        "command": "python benchmarks/streaming.py",
        "what": f"{SIDE}×{SIDE} at {FPS} frames a second; 8 tokens of 768 in float16 a frame, 32 frames at once",
        "frames_of": arguments.film.name if arguments.film else "moving digits",
        "hardware": hardware(),
        "torch": torch.__version__,
        "videos": rows,
    }
    OUTPUT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
