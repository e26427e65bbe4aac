"""The report and the summary: what they show is what was measured."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from tokenlearner.inspection.cost import describe_tokens
from tokenlearner.inspection.report import FilmLook, Look, draw_curves, write_report
from tokenlearner.inspection.summary import ModelResult, cells, columns, count, write_summary

PLAIN = ModelResult(
    name="plain",
    accuracy=0.97561,
    parameters=1_234_567,
    macs=8_000_000_000,
    images_per_second=1234.56,
    tokens_per_layer=(197,) * 12,
    images_per_second_spread=12.34,
    train_seconds=61.26,
    history=[
        {"epoch": 0, "val_accuracy": 0.1, "train_loss": 2.0},
        {"epoch": 1, "val_accuracy": 0.9, "train_loss": 1.0},
    ],
)
FEW = ModelResult(
    name="<few> & 'so'",
    accuracy=1.0,
    parameters=999,
    macs=3_456_000_000,
    images_per_second=2500.4,
    tokens_per_layer=(197,) * 6 + (9,) * 6,
    speedup=2.034,
    history=[{"epoch": 0, "val_accuracy": 0.2, "train_loss": 1.5}],
)
SVG_TEXT, SVG_PATH, SVG_USE = (f"{{http://www.w3.org/2000/svg}}{tag}" for tag in ("text", "path", "use"))
TABLE = [
    ("plain", "97.56%", "1,234,567", "8 G", "1,235", "197×12"),
    ("<few> & 'so'", "100.00%", "999", "3.46 G (0.43×)", "2,500 (2.03×)", "197×6 + 9×6"),
]


# ---- summary


def test_cells():
    assert [cells(result, PLAIN) for result in (PLAIN, FEW)] == TABLE
    assert len(columns([PLAIN])) == len(TABLE[0])


def test_columns_say_what_is_counted():
    assert columns([PLAIN, FEW])[3:5] == ("MACs / image", "images/s")
    of_clips = columns([replace(PLAIN, inputs="clips")])
    assert of_clips == ("model", "accuracy", "parameters", "MACs / clip", "clips/s", "tokens per layer")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1 k"),
        (12_345, "12.3 k"),
        (999_949, "1 M"),
        (999_400, "999 k"),
        (1_234_567, "1.23 M"),
        (17_580_000_000, "17.6 G"),
        (2.5e12, "2.5 T"),
    ],
)
def test_count(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [((), ""), ((5,), "5×1"), ((197,) * 6 + (9,) * 6, "197×6 + 9×6"), ((8, 36, 36, 8), "8×1 + 36×2 + 8×1")],
)
def test_describe_tokens(tokens, text):
    assert describe_tokens(tokens) == text


def test_summary_is_what_it_returns(tmp_path):
    path = tmp_path / "new" / "summary.json"
    summary = write_summary(path, 12.345, [PLAIN, FEW], data="photos", seed=3)
    assert json.loads(path.read_text()) == summary
    assert (summary["seconds"], summary["data"], summary["seed"]) == (12.3, "photos", 3)
    assert summary["torch"] == torch.__version__
    assert f"{torch.get_num_threads()} threads" in summary["hardware"]
    assert summary["models"][0] == {
        "name": "plain",
        "accuracy": 0.97561,
        "metric": "accuracy",
        "inputs": "images",
        "parameters": 1_234_567,
        "macs": 8_000_000_000,
        "flops": 16_000_000_000,
        "images_per_second": 1234.6,
        "images_per_second_spread": 12.3,
        "speedup": 1.0,
        "tokens_per_layer": [197] * 12,
        "train_seconds": 61.3,
    }
    assert (summary["models"][1]["name"], summary["models"][1]["speedup"]) == ("<few> & 'so'", 2.034)


# ---- report


def parts_of(page: str) -> list[tuple[str, dict[str, str | None], str]]:
    """Every element that has text of its own, or none: tag, attributes, text; unescaped as a browser would."""
    found: list[tuple[str, dict[str, str | None], str]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes), ""))
    parser.handle_data = lambda text: found.append((*found[-1][:2], found.pop()[2] + text)) if found else None
    parser.feed(page)
    return found


def texts(page: str, wanted: str) -> list[str]:
    return [text for tag, _, text in parts_of(page) if tag == wanted]


def test_the_table_is_the_results(tmp_path):
    page = write_report(tmp_path / "new" / "report.html", "Title", "Lead", [PLAIN, FEW]).read_text(encoding="utf-8")
    assert texts(page, "th") == list(columns([PLAIN]))
    assert texts(page, "td") == [cell for row in TABLE for cell in row]
    accuracy, loss = (ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page, re.DOTALL))
    assert {"held-out accuracy, %", "80", "plain", "<few> & 'so'"} <= {text.text for text in accuracy.iter(SVG_TEXT)}
    assert {"training loss", "1.8", "plain"} <= {text.text for text in loss.iter(SVG_TEXT)}
    assert "What each token looks at" not in page


def test_names_are_text_and_no_html(tmp_path):
    evil = "<script>alert('x')</script> & co"
    look = Look(Image.new("RGB", (4, 4)), evil, [])
    page = write_report(
        tmp_path / "r.html", evil, evil, [ModelResult(evil, 0, 1, 1, 1, (1,))], [look], evil
    ).read_text()
    assert "<script" not in page
    for tag in ("title", "h1", "p", "footer"):
        assert evil in [text.strip() for text in texts(page, tag)]
    assert texts(page, "td")[0] == evil
    assert texts(page, "figcaption") == [evil]


def test_looks_are_the_pictures_and_their_maps(tmp_path):
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    picture, *overlays = (Image.new("RGB", (4, 6), colour) for colour in colours)
    page = write_report(tmp_path / "r.html", "t", "l", [PLAIN], [Look(picture, "cat, is dog", overlays)]).read_text()
    sources = [attributes["src"] for tag, attributes, _ in parts_of(page) if tag == "img"]
    embedded = [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]
    assert [(image.size, image.getpixel((1, 1))) for image in embedded] == [((4, 6), colour) for colour in colours]
    assert texts(page, "figcaption") == ["cat, is dog", "token 1", "token 2"]
    assert "Held-out images." in page


def test_films_and_their_sheets_are_in_the_page_itself(tmp_path):
    (tmp_path / "film.mp4").write_bytes(b"film")
    (tmp_path / "sheet.png").write_bytes(b"sheet")
    film = FilmLook(tmp_path / "film.mp4", tmp_path / "sheet.png", "'up' & on, is <down>")
    clips = replace(PLAIN, inputs="clips")
    page = write_report(tmp_path / "r.html", "t", "l", [clips], films=[film, film]).read_text()
    assert texts(page, "th")[3:5] == ["MACs / clip", "clips/s"]
    labels = [attributes["data-label"] for tag, attributes, _ in parts_of(page) if tag == "td"]
    assert labels == list(columns([clips]))
    videos, images = (
        [attributes for tag, attributes, _ in parts_of(page) if tag == wanted] for wanted in ("video", "img")
    )
    assert [video["src"] for video in videos] == [f"data:video/mp4;base64,{base64.b64encode(b'film').decode()}"] * 2
    assert [image["src"] for image in images] == [f"data:image/png;base64,{base64.b64encode(b'sheet').decode()}"] * 2
    assert all({"controls", "loop", "muted", "playsinline"} <= set(video) for video in videos)
    assert texts(page, "figcaption") == ["'up' & on, is <down>"] * 2
    assert page.count("What each token looks at") == 1
    assert "Held-out clips." in page


# ---- curves


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of every data line; grid and ticks are thinner, and the legend's lines are not clipped to the axes."""
    paths = ElementTree.fromstring(svg).iter(SVG_PATH)
    thick = [
        path.get("d", "") for path in paths if "stroke-width: 1.8" in path.get("style", "") and path.get("clip-path")
    ]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)] for d in thick]


def test_curves_have_a_line_for_each_series_with_its_values():
    series = {"a": [(1, 10.0), (2, 40.0), (4, 20.0)], "b": [(1, 20.0), (2, 30.0), (4, 60.0)], "none": []}
    first, second = lines_of(draw_curves(series, "accuracy"))
    origin, unit = first[0], (first[1][0] - first[0][0], (first[1][1] - first[0][1]) / 30)
    for line, points in ((first, series["a"]), (second, series["b"])):
        read = [(1 + (x - origin[0]) / unit[0], 10 + (y - origin[1]) / unit[1]) for x, y in line]
        assert read == [pytest.approx(point, abs=1e-3) for point in points]
    assert unit[0] > 0 > unit[1]  # to the right, and up on a page whose y runs down


@pytest.mark.parametrize("number", [1, 2, 5])
def test_no_series_is_left_out(number):
    svg = draw_curves({f"run <{i}>": [(1, i), (2, 2 * i), (3, i)] for i in range(number)}, "loss")
    assert len(lines_of(svg)) == number
    written = [text.text for text in ElementTree.fromstring(svg).iter(SVG_TEXT)]
    assert {f"run <{i}>" for i in range(number)} | {"epoch", "loss"} <= set(written)


def test_curves_take_the_colour_of_the_page_and_nothing_from_elsewhere():
    svg = draw_curves({"a": [(1, 1), (2, 2)]}, "loss")
    assert "currentColor" in svg
    assert not re.search("#0{6}|#010203|black", svg)
    assert not re.search("https?:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", svg))
    assert svg == draw_curves({"a": [(1, 1), (2, 2)]}, "loss")  # no date, no random names


def test_a_single_point_is_seen():
    """One epoch makes a line without length, so a dot is drawn in its colour: here and in the legend."""
    dots = [use.get("style", "") for use in ElementTree.fromstring(draw_curves({"a": [(1, 5)]}, "loss")).iter(SVG_USE)]
    assert sum("#4477aa" in style for style in dots) == 2


def test_curves_without_a_point_are_drawn_empty():
    assert lines_of(draw_curves({"a": []}, "loss")) == []
