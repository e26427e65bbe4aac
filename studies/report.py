"""Turns what the studies wrote into ``docs/results.md``: the paper's claims, our numbers beside them, and verdicts.

    python studies/report.py            # writes it
    python studies/report.py --check    # says whether it is up to date

It reads the CSVs in ``studies/results``, which ``tokenlearner study`` wrote, makes their summaries and figures again,
and reads the summaries of older studies in folders of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlearner.study.claims import Claim
from tokenlearner.study.page import Comparison, Result, page, results_in
from tokenlearner.study.rows import read_rows
from tokenlearner.study.study import current, open_study, studies_in, write_up

HERE = Path(__file__).parent
REPOSITORY = HERE.parent

CLAIMS = {
    1: "At ¾ depth TokenLearner is at least as accurate as the plain ViT, and cheaper",
    2: "At ½ depth it is about as accurate, at about half the compute",
    3: "At depth 0 it is clearly worse",
    4: "It beats spatial pooling at equal compute",
    5: "TokenFuser adds a little accuracy for about 1 % of compute; Unpool is worse; Reprojection costs more",
    6: "Saved compute, spent on more layers, beats the baseline at equal compute",
    7: "In the bottleneck model of videos, α by convolutions beats a fixed grid, which is at least as good as "
    "averages, which beat one dense layer",
    8: "The maps follow the people and things in the frame over time",
}


@dataclass(frozen=True)
class Older:
    """A study from before ``tokenlearner study``: its summary, the scores by variant in it, and what they say."""

    title: str
    summary: str
    scores: Callable[[Mapping[str, Any]], Mapping[str, Sequence[float]]]
    claims: tuple[Claim, ...]
    percent: bool = True


def _models(summary: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    return {name: model["top1"] for name, model in summary["models"].items()}


def _methods(summary: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    chosen = [m for m in summary["methods"] if m["budget"] == "macs" and m["epochs"] == summary["epochs"]]
    return {method["method"]: method["points"] for method in reversed(chosen)}  # of several settings the first


PHOTOS = (
    Claim(
        1,
        "At ¾ depth it is at least as accurate",
        "tl8-three-quarters",
        "plain",
        "68.0 and 63.0 % (5-shot)",
        "at least",
    ),
    Claim(2, "At ½ depth it is about as accurate", "tl8-half", "plain", "83.65 and 84.73 % (table 1)", "about", 2.0),
    Claim(5, "TokenFuser adds accuracy, 8 tokens", "tl8-half-fuser", "tl8-half", "83.7 and 83.2 %"),
)
OLDER = (
    Older("CIFAR-10", "photos/cifar10/summary.json", _models, PHOTOS),
    Older("Flowers", "photos/flowers/summary.json", _models, PHOTOS),
    Older(
        "UT-Interaction",
        "ut_interaction/summary.json",
        _models,
        (
            Claim(
                2,
                "ViViT, 8 tokens a slice at ½ depth are about as accurate",
                "vivit-tl8",
                "vivit",
                "83.5 and 83.4 % (Kinetics-400, 16 tokens)",
                "about",
                2.0,
            ),
            Claim(
                7,
                "X(2+1)D with learned tokens is at least as accurate as without",
                "x2plus1d-tl8",
                "x2plus1d",
                "66.3 and 62.7 mAP (Charades, 12 fps)",
                "at least",
                decides=False,
            ),
        ),
    ),
    Older(
        "A trained ViT made cheaper",
        "compress/summary.json",
        _methods,
        (
            Claim(
                2,
                "Inserted into a trained ViT, 8 tokens at ½ are about as accurate as the host trained on (points from "
                "the host as it was)",
                "tokenlearner",
                "host",
                "not printed; its authors said that it does not help",
                "about",
                2.0,
                decides=False,
            ),
        ),
        percent=False,
    ),
)


def older_comparisons() -> list[Comparison]:
    found = []
    for older in OLDER:
        scores = older.scores(json.loads((HERE / older.summary).read_text()))
        link = f"[{older.title}](../studies/{Path(older.summary).parent})"
        found += [Comparison(link, claim.judged(scores), older.percent) for claim in older.claims]
    return found


def document(results: Sequence[Result]) -> str:
    """All of ``docs/results.md``."""
    written = "Written by `python studies/report.py` from what `tokenlearner study` measured; not by hand."
    sizes = (
        "The size `cpu` is of small models trained from scratch for minutes on one core, the paper's are B/16 to L/8 "
        "after JFT: a claim that does not hold here does not hold at this size, and nothing more is said."
    )
    return page(
        results,
        CLAIMS,
        head=("# Results", written, sizes),
        others=older_comparisons(),
        tail=("### Studies from before `tokenlearner study`", older_list()),
        figures="../studies/results/",
    )


def older_list() -> str:
    lines = []
    for older in OLDER:
        summary = json.loads((HERE / older.summary).read_text())
        folder = Path(older.summary).parent
        lines.append(f"- [{older.title}](../studies/{folder}): {'; '.join(summary['hardware'])}.")
    return "\n".join(lines)


def write_summaries(results: Path) -> None:
    """Every study's JSON and figure again, from its CSV."""
    for name in studies_in(HERE):
        study, rows = open_study(name, HERE), read_rows(results / f"{name}.csv")
        for size in study.sizes:
            if current(rows, study, size):
                write_up(name, study, rows, results, size)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs/results.md")
    given = parser.parse_args(arguments)
    if not given.check:
        write_summaries(given.results)
    text = document(results_in(given.results, HERE))
    if not given.check:
        given.output.write_text(text)
    elif not given.output.is_file() or given.output.read_text() != text:
        sys.exit(f"{given.output} is not what the studies came to: run python studies/report.py")


if __name__ == "__main__":
    main()
