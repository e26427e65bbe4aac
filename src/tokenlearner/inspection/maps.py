"""Pictures of what each token looks at."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tokenlearner.insertion.saving import Preprocessing

SMALLEST_SIDE = 96  # pixels a picture is at least shown with


def picture_of(x: Float[Tensor, "c height width"], preprocessing: Preprocessing) -> Image.Image:
    """The picture a model saw: its input with the normalisation undone, cropped as it was."""
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    pixels = (x.cpu().float() * std + mean).clamp(0, 1).mul(255).round().byte()
    picture = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
    scale = -(-SMALLEST_SIDE // min(picture.size))
    return (
        picture
        if scale <= 1
        else picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    )


def overlay(picture: Image.Image, attention: Float[Tensor, "h w"]) -> Image.Image:
    """One map over its picture, from dark (least) to bright (most) within this map; grey shows through underneath."""
    low, high = attention.min(), attention.max()
    scaled = ((attention - low) / (high - low).clamp_min(1e-12)).cpu().float().numpy()
    heat = Image.fromarray(np.uint8(scaled * 255)).resize(picture.size, Image.Resampling.BICUBIC)
    weight = np.asarray(heat, dtype=np.float32)[..., None] / 255
    colours = colormaps["inferno"](weight[..., 0])[..., :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    return Image.fromarray(np.uint8(0.45 * grey + 0.55 * colours))


def draw_sheet(
    pictures: Sequence[Image.Image], maps: Float[Tensor, "b s h w"], path: Path, titles: Sequence[str] | None = None
) -> Path:
    """Writes a sheet with a column for each picture and, under it, a row for each token; returns ``path``."""
    rows, columns = maps.shape[1] + 1, len(pictures)
    aspect = pictures[0].height / pictures[0].width
    figure = Figure(figsize=(1.5 * columns + 0.8, 1.5 * rows * aspect + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for column, picture in enumerate(pictures):
        axes[0][column].imshow(picture)
        if titles:
            axes[0][column].set_title(_shortened(titles[column]), fontsize=8, parse_math=False)  # a$b$.png is a name
        for token in range(maps.shape[1]):
            axes[token + 1][column].imshow(overlay(picture, maps[column, token]))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for token in range(maps.shape[1]):
        axes[token + 1][0].set_ylabel(f"token {token + 1}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # boxes for a script it lacks will do
        figure.savefig(path, dpi=110)
    return path


def _shortened(title: str, length: int = 22) -> str:
    title = title.encode(errors="backslashreplace").decode()  # file names need not be valid UTF-8
    return title if len(title) <= length else f"…{title[1 - length :]}"
