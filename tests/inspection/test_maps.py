"""Pictures of attention maps: the right pixels in the right places."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenlearner.insertion.saving import Preprocessing
from tokenlearner.inspection.maps import draw_sheet, overlay, picture_of

ODD = Preprocessing((3, 100, 140), (0.2, 0.5, 0.7), (0.1, 0.3, 0.6))


def normalised(pixels: np.ndarray, preprocessing: Preprocessing) -> torch.Tensor:
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    return torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std).permute(2, 0, 1)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def brightness(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int).sum(-1)


def brightest(picture: Image.Image) -> tuple[float, float]:
    """(x, y) of the brightest pixels' middle, from 0 to 1."""
    bright = brightness(picture)
    y, x = np.nonzero(bright == bright.max())
    return x.mean() / picture.width, y.mean() / picture.height


# ---- picture_of


def test_picture_of_undoes_the_normalisation():
    pixels = noise(100, 140)
    picture = picture_of(normalised(pixels, ODD), ODD)
    assert picture.size == (140, 100)
    assert np.abs(np.asarray(picture).astype(int) - pixels).max() <= 1


def test_picture_of_enlarges_small_pictures_without_blurring_them():
    pixels = noise(12, 20)
    picture = picture_of(normalised(pixels, ODD), ODD)
    assert picture.size == (160, 96)  # 8 times, so that the shorter side is 96
    assert np.abs(np.asarray(picture).astype(int) - pixels.repeat(8, 0).repeat(8, 1)).max() <= 1


def test_picture_of_clips_what_augmentation_left_outside():
    x = torch.stack([torch.full((96, 96), value) for value in (-50.0, 0.0, 50.0)])
    assert picture_of(x, ODD).getpixel((5, 5)) == (0, round(0.5 * 255), 255)


# ---- overlay


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 4), (0, 4), (1, 0), (1, 2)])
def test_overlay_is_brightest_where_the_map_is_largest(row, column):
    """On a picture and a grid that are not square, where swapped axes show."""
    attention = torch.zeros(2, 5)
    attention[row, column] = 0.7
    shown = overlay(Image.new("RGB", (150, 60), (90, 90, 90)), attention)
    x, y = brightest(shown)
    assert shown.size == (150, 60)
    assert column / 5 <= x <= (column + 1) / 5
    assert row / 2 <= y <= (row + 1) / 2


def test_overlay_is_scaled_within_the_map():
    picture = Image.new("RGB", (64, 64), (90, 90, 90))
    attention = torch.rand(4, 4)
    assert overlay(picture, attention).tobytes() == overlay(picture, attention * 0.5 + 3).tobytes()
    bright = brightness(overlay(picture, attention))
    assert bright.max() - bright.min() > 250


def test_overlay_lets_the_picture_show_through_in_grey():
    picture = Image.new("RGB", (64, 64), (0, 255, 0))
    picture.paste((0, 0, 0), (0, 0, 32, 64))
    shown = np.asarray(overlay(picture, torch.ones(4, 4)))
    left, right = shown[:, :32].mean((0, 1)), shown[:, 32:].mean((0, 1))
    luma = 0.587 * 255  # of pure green
    assert right - left == pytest.approx([0.45 * luma] * 3, abs=1)


def test_overlay_of_a_flat_map_is_dark_all_over():
    shown = overlay(Image.new("RGB", (30, 20)), torch.full((2, 3), 0.25))
    assert brightness(shown).max() < 10


# ---- draw_sheet


def bands(ink: np.ndarray, shortest: int) -> list[slice]:
    """The stretches of True in a row of bools."""

    def runs() -> Iterator[slice]:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], ink.astype(int), [0]])))
        for start, stop in zip(edges[::2], edges[1::2]):
            if stop - start >= shortest:
                yield slice(int(start), int(stop))

    return list(runs())


def panels(path: Path, columns: int) -> list[list[Image.Image]]:
    """The pictures of a sheet: by row, then by column."""
    sheet = Image.open(path).convert("RGB")
    ink = (np.asarray(sheet) < 245).any(-1)
    across = bands(ink.mean(0) > 0.5, 30)
    assert len(across) == columns
    found = []
    for x in across:
        down = bands(ink[:, x].mean(1) > 0.9, 30)
        found.append([sheet.crop((x.start, y.start, x.stop, y.stop)) for y in down])
    assert len({len(column) for column in found}) == 1
    return [list(row) for row in zip(*found)]


@pytest.mark.parametrize("titles", [None, ["a$_1$.png", f"{'x' * 40}.png"]])
def test_a_sheet_has_a_column_for_each_picture_and_a_row_for_each_token(tmp_path, titles):
    pictures = [Image.new("RGB", (120, 96), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    peaks = [[(0, 0), (1, 2), (1, 0)], [(1, 2), (0, 0), (0, 2)]]  # by picture, then token: row and column of the grid
    maps = torch.zeros(2, 3, 2, 3)
    for picture, places in enumerate(peaks):
        for token, place in enumerate(places):
            maps[picture, token][place] = 1
    path = draw_sheet(pictures, maps, tmp_path / "new" / "maps.png", titles)
    assert path == tmp_path / "new" / "maps.png"
    rows = panels(path, columns=2)
    assert len(rows) == 1 + 3
    for column, picture in enumerate(pictures):
        assert rows[0][column].getpixel((20, 20)) == picture.getpixel((0, 0))
        for token, (y_cell, x_cell) in enumerate(peaks[column]):
            panel = rows[1 + token][column]
            assert panel.width / panel.height == pytest.approx(120 / 96, abs=0.1)
            x, y = brightest(panel)
            assert (int(x * 3), int(y * 2)) == (x_cell, y_cell)


@pytest.mark.parametrize("title", ["cost_$5_$6.png", "日本.png", "x\udcff.png"])
def test_any_file_name_can_be_a_title(tmp_path, title):
    """Dollars would be mathematics, and matplotlib warns of letters its font lacks and fails at a stray byte."""
    light, maps = Image.new("RGB", (96, 96), (255, 255, 200)), torch.rand(1, 1, 2, 2)
    sheets = [draw_sheet([light], maps, tmp_path / f"{len(text)}.png", [text]) for text in (title, "")]
    written, bare = ((np.asarray(Image.open(sheet).convert("L"))[:30] < 128).sum() for sheet in sheets)
    assert written > 50 > bare
