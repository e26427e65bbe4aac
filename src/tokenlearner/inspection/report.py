"""One self-contained HTML page about a run: the table, the curves, and what each token looks at.

No script and nothing fetched; it follows the reader's light or dark setting and fits a phone.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from tokenlearner.insertion.saving import write_whole
from tokenlearner.inspection.summary import ModelResult, cells, columns

_INK = "#010203"  # stands for the page's own text colour, which differs in the dark
_SERIES = ("#4477aa", "#ee6677", "#228833", "#aa8800")  # Paul Tol's bright scheme: told apart by the colour-blind too

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #4477aa; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
       background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
@media (max-width: 40rem) {  /* a phone: one card a model instead of a wide table */
  thead { display: none; } tr { display: block; margin: .8rem 0; border-bottom: 2px solid var(--line); }
  td, td:first-child { display: flex; justify-content: space-between; border: 0; padding: .15rem 0; }
  td::before { content: attr(data-label); opacity: .75; } td:first-child { font-weight: 600; }
}
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
.curves svg { width: 100%; height: auto; }
.look { display: grid; grid-template-columns: repeat(auto-fit, minmax(4.4rem, 1fr)); gap: .4rem; margin: 0 0 1rem;
        padding: .6rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--soft); }
.look figure { margin: 0; } .look img { width: 100%; display: block; border-radius: .25rem; }
.look figcaption { font-size: .75rem; text-align: center; }
.film { margin: 0 0 1rem; padding: .6rem; border: 1px solid var(--line); border-radius: .5rem;
        background: var(--soft); }
.film video { display: block; width: 100%; max-width: 30rem; height: auto; margin: 0 auto .6rem; }
.film img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.film video, .film img { border-radius: .25rem; } .film figcaption { text-align: center; margin-bottom: .4rem; }
footer { margin: 2rem 0 1rem; font-size: .85rem; opacity: .8; }
"""


@dataclass(frozen=True)
class Look:
    """One picture, what the model made of it, and a picture of each token's map."""

    picture: Image.Image
    caption: str
    overlays: Sequence[Image.Image]


@dataclass(frozen=True)
class FilmLook:
    """One clip, what the model made of it, and where each token looks in it: a film, and a sheet of some frames."""

    video: Path
    """An MPEG-4 file, which shows each frame and then its maps, row by row."""
    sheet: Path
    """A PNG file."""
    caption: str


def write_report(
    path: Path,
    title: str,
    lead: str,
    results: Sequence[ModelResult],
    looks: Sequence[Look] = (),
    footer: str = "",
    films: Sequence[FilmLook] = (),
) -> Path:
    """Writes the page to ``path`` and returns it.

    Args:
        path: Of the page; its folder is made if it is not there.
        title, lead: The heading and the sentence under it.
        results: One a model, at least one; the first is what the others are compared with.
        looks: Of held-out images, in the order in which they are shown.
        footer: The last line.
        films: Of held-out clips; their files are copied into the page, which needs them no more.
    """
    first, titles = results[0], columns(results)
    rows = "".join(f"<tr>{_row(titles, cells(result, first))}</tr>" for result in results)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in titles)
    key = {"accuracy": "val_accuracy", "cosine": "val_cosine"}.get(first.metric, "val_map")
    curves = "".join(
        draw_curves(
            {r.name: [(row["epoch"] + 1, row[key] * scale) for row in r.history if key in row] for r in results}, label
        )
        for key, label, scale in ((key, *_scale(first.metric)), ("train_loss", "training loss", 1))
    )
    body = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>",
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>',
        f'<h2>Training</h2><div class="curves">{curves}</div>',
    ]
    if looks or films:
        body.append(f"<h2>What each token looks at</h2><p>{_intro(bool(films))}</p>")
        body += [*map(_look, looks), *map(_film, films)]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}<footer>{html.escape(footer)}</footer></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: page.encode()})
    return path


def _row(titles: Sequence[str], row: Sequence[str]) -> str:
    return "".join(
        f'<td data-label="{html.escape(title)}">{html.escape(cell)}</td>'
        for title, cell in zip(titles, row, strict=True)
    )


def draw_curves(series: Mapping[str, Sequence[tuple[float, float]]], label: str) -> str:
    """An inline SVG with one line per series, in the page's text colour."""
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 10}
    for part in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"):
        settings[part] = _INK
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axis = figure.subplots()
        for (name, points), colour in zip(series.items(), cycle(_SERIES)):
            if points:
                dot = "o" if len(points) == 1 else None  # a line through one point is not seen
                axis.plot(*zip(*points), label=name, color=colour, linewidth=1.8, marker=dot)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, color=_INK)
        if any(series.values()):
            axis.legend(frameon=False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # they hold addresses, and the date changes
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _scale(metric: str) -> tuple[str, int]:
    return ("held-out cosine", 1) if metric == "cosine" else (f"held-out {metric}, %", 100)


def _intro(films: bool) -> str:
    told = "Brighter means the token takes more from there; each map is scaled to its own maximum"
    if not films:
        return f"Held-out images. {told}."
    return (
        f"Held-out clips. {told}. A film shows the frame and then the map of each token in order, row by row; frames "
        "that the model reads together share their maps."
    )


def _look(look: Look) -> str:
    shown = [(look.picture, look.caption), *((o, f"token {i + 1}") for i, o in enumerate(look.overlays))]
    inner = "".join(
        f'<figure><img alt="" src="{_data_uri(image)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for image, caption in shown
    )
    return f'<div class="look">{inner}</div>'


def _film(film: FilmLook) -> str:
    caption = html.escape(film.caption)
    video, sheet = _encoded("video/mp4", film.video.read_bytes()), _encoded("image/png", film.sheet.read_bytes())
    return (
        f'<figure class="film"><figcaption>{caption}</figcaption>'
        f'<video controls loop muted playsinline aria-label="{caption}" src="{video}"></video>'
        f'<img alt="" src="{sheet}"></figure>'
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return _encoded("image/png", buffer.getvalue())


def _encoded(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
