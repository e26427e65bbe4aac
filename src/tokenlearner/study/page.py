"""The page of several studies: what was claimed, what they measured, and the verdicts.

It computes nothing but means and deviations: the verdicts are those of :mod:`tokenlearner.study.claims`.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenlearner.inspection.summary import count
from tokenlearner.study.claims import CLAIM_RULES, PAIRED, RULE
from tokenlearner.study.rows import read_rows
from tokenlearner.study.study import Study, current, open_study, studies_in

# Of a variant's numbers, those that are no column of its own.
HIDDEN = {"label", "epochs", "macs", "parameters", "tokens_per_layer", "train_loss", "seconds", "cpu_seconds"}
HIDDEN |= {"runs", "mean", "deviation", "deviations", "against_first"}
NOT_PRINTED = "not printed"  # what Claim.paper begins with where the paper has no number


@dataclass(frozen=True)
class Comparison:
    """A claim as one study judged it: ``found`` is an entry of ``claims`` in its JSON."""

    link: str
    found: Mapping[str, Any]
    percent: bool = True


@dataclass(frozen=True)
class Result:
    """What a study came to at one of its sizes; ``summary`` is None where it was not run."""

    name: str
    study: Study
    size: str
    stem: str
    summary: Mapping[str, Any] | None
    rows: Sequence[Mapping[str, str]]

    def variants(self) -> Mapping[str, Any]:
        return self.study.variants(self.study.sizes[self.size])

    def comparisons(self) -> list[Comparison]:
        at = f"`{self.name}`" + ("" if self.size == next(iter(self.study.sizes)) else f", {self.size}")
        claims = self.summary["claims"] if self.summary else [claim.judged({}) for claim in self.study.claims]
        link = f"[{at}](#{self.stem})"
        return [
            Comparison(link, found, self.study.unit == 100 and found["score"] in ("", self.study.score))
            for found in claims
        ]


def results_in(folder: Path, studies: Path) -> list[Result]:
    """Of every study its first size, and others that have been run."""
    found = []
    for name in studies_in(studies):
        study = open_study(name, studies)
        for number, size in enumerate(study.sizes):
            stem = name if number == 0 else f"{name}-{size}"
            path = folder / f"{stem}.json"
            if path.is_file() or number == 0:
                rows = current(read_rows(folder / f"{name}.csv"), study, size)
                summary = json.loads(path.read_text()) if path.is_file() else None
                found.append(Result(name, study, size, stem, summary, rows))
    return found


def page(
    results: Sequence[Result],
    claims: Mapping[int, str],
    *,
    head: Sequence[str],
    others: Sequence[Comparison] = (),
    tail: Sequence[str] = (),
    figures: str = "",
) -> str:
    """In Markdown: how it stands with ``claims`` (by number), then each of ``results``.

    Args:
        head, tail: Paragraphs before and after.
        others: Comparisons of the same claims that are not from ``results``.
        figures: Where the results' pictures are, seen from the page; ends with a slash unless empty.
    """
    comparisons = [c for result in results for c in result.comparisons()] + list(others)
    parts = [
        *head,
        _how_to_read(),
        "## In short",
        _in_short(comparisons, claims),
        _contradictions(comparisons),
        _not_run(results),
        "## The claims",
    ]
    for number, text in claims.items():
        parts += [f"### {number}. {text}", _claim_table([c for c in comparisons if c.found["number"] == number])]
    parts.append("## The studies")
    for result in results:
        parts += _section(result, figures)
    return "\n\n".join(part for part in [*parts, *tail] if part) + "\n"


def _how_to_read() -> str:
    rules = "\n".join(f"- *{kind}*: {rule.format(slack='the slack')}." for kind, rule in CLAIM_RULES.items())
    told = [
        "Numbers are mean ± sample deviation over seeds, with the number of runs in brackets",
        "Differences have their 95 % margin",
        *(rule[0].upper() + rule[1:] for rule in (RULE, PAIRED)),
        "A claim that A beats, reaches or equals B is judged so, with the slack that its row names:",
    ]
    return ". ".join(told) + f"\n\n{rules}"


def _in_short(comparisons: Sequence[Comparison], claims: Mapping[int, str]) -> str:
    lines = ["| claim | so far | comparisons that decide it | also about it |", "|---|---|---|---|"]
    for number, text in claims.items():
        about = [c for c in comparisons if c.found["number"] == number]
        deciding = [c for c in about if c.found["decides"]]
        others = [c for c in about if not c.found["decides"]]
        cells = (
            f"{number}. {text}",
            f"**{_standing(deciding)}**",
            _counted(deciding) or "no study yet",
            _counted(others),
        )
        lines.append(f"| {' | '.join(cells)} |")
    told = (
        "A claim *holds* where all comparisons that decide it and have a verdict do, *does not* where none of these "
        "does, and is *mixed* where they differ; it is *undecided* where they have no verdict but that."
    )
    return "\n".join([*lines, "", told])


def _standing(comparisons: Sequence[Comparison]) -> str:
    found = {_verdict(c) for c in comparisons} & {"holds", "does not"}
    if len(found) == 2:
        return "mixed"
    return found.pop() if found else "undecided" if any(map(_is_run, comparisons)) else "not run"


def _counted(comparisons: Sequence[Comparison]) -> str:
    counts = Counter(map(_verdict, comparisons))
    order = ("holds", "does not", "undecided", "too few runs", "not run")
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict])


def _contradictions(comparisons: Sequence[Comparison]) -> str:
    against = [c for c in comparisons if c.found["verdict"] == "does not"]
    if not against:
        return "Nothing measured so far contradicts the paper by the rules above."
    lines = [
        f'- Claim {c.found["number"]}, {c.link}: "{c.found["text"]}" does not hold: {_spread(c, 0)} and '
        f"{_spread(c, 1)}, difference {_difference(c)}; the paper: {c.found['paper']}."
        for c in against
    ]
    printed = [line for c, line in zip(against, lines) if not c.found["paper"].startswith(NOT_PRINTED)]
    others = [line for line in lines if line not in printed]
    parts = ["**What contradicts the paper:**", "", *printed] if printed else []
    if others:
        parts += ["", "**What does not hold either, on which the paper prints nothing:**", "", *others]
    return "\n".join(parts).strip()


def _not_run(results: Sequence[Result]) -> str:
    lines = [f"- `{result.name}`: {result.study.title}." for result in results if result.summary is None]
    done = {(result.name, result.size) for result in results if result.summary}
    other = [
        f"`{name}` ({size})"
        for name, study in {result.name: result.study for result in results}.items()
        for size in list(study.sizes)[1:]
        if (name, size) not in done
    ]
    lines += [f"- Other sizes: {', '.join(other)}."] if other else []
    return "\n".join(["**Not run:**", "", *lines]) if lines else ""


def _claim_table(comparisons: Sequence[Comparison]) -> str:
    if not comparisons:
        return "Not run: no study is about it yet."
    lines = [
        "| what is compared | study | paper | ours, first | ours, second | difference | verdict | rule |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        verdict = _verdict(c)
        emphasised = f"**{verdict}**" if c.found["verdict"] else verdict
        lines.append(
            f"| {c.found['text']} | {c.link} | {c.found['paper']} | {_spread(c, 0)} | {_spread(c, 1)} | "
            f"{_difference(c)} | {emphasised} | {_rule_name(c)} |"
        )
    return "\n".join(lines)


def _is_run(c: Comparison) -> bool:
    return all(c.found["scores"])


def _verdict(c: Comparison) -> str:
    if not _is_run(c):
        return "not run"
    return c.found["verdict"] or "too few runs"


def _rule_name(c: Comparison) -> str:
    slack = "" if c.found["kind"] == "better" else f", {c.found['slack']:g}"
    return f"{c.found['kind']}{slack}" + (f", by {c.found['score']}" if c.found["score"] else "")


def _spread(c: Comparison, side: int) -> str:
    scores = c.found["scores"][side]
    return spread(scores, " %" if c.percent else "") if scores else ""


def spread(scores: Sequence[float], unit: str = "") -> str:
    """Mean ± sample deviation and the number of runs."""
    mean = statistics.mean(scores)
    if mean >= 10_000:  # multiply-adds, which don't differ
        return f"{count(mean)}{unit} ({len(scores)})"
    deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{mean:.2f}{deviation}{unit} ({len(scores)})".replace("-", "−")


def _difference(c: Comparison) -> str:
    difference, margin = c.found["difference"], c.found["margin"]
    if difference is None:
        return ""
    if c.found["kind"] == "at most":
        first, second = map(statistics.mean, c.found["scores"])
        return f"{first / second:.2f}×"
    if abs(difference) >= 10_000:
        return f"{'+' if difference > 0 else '−'}{count(abs(difference))}, {c.found['outcome']}"
    told = f"{difference:+.2f}".replace("-", "−")
    return told if margin is None else f"{told} ± {margin:.2f}, {c.found['outcome']}"


def _section(result: Result, figures: str) -> list[str]:
    size = "" if result.size == next(iter(result.study.sizes)) else f", {result.size}"
    head = [f'### <a id="{result.stem}"></a>{result.study.title} (`{result.name}`{size})', result.study.question]
    if result.summary is None or not result.summary["variants"]:
        return [*head, "Not run."]
    seeds = sorted({int(row["seed"]) for row in result.rows})
    commands = ", ".join(f"`{command}`" for command in sorted({row["command"] for row in result.rows} - {""}))
    commits = ", ".join(sorted({row["commit"] for row in result.rows}))
    seconds = sum(float(row.get("seconds") or 0) for row in result.rows)
    took = f"{seconds:,.0f} seconds" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
    told = f"Size {result.size}, seeds {', '.join(map(str, seeds))}; {'; '.join(result.summary['hardware'])}"
    told += f"; {len(result.rows)} runs of {took} in all"
    told += f"; commit {commits}" + (f"; {commands}." if commands else ".")
    told += f" A seed is {result.study.seeds}." if result.study.seeds else ""
    missing = [v.label for name, v in result.variants().items() if name not in result.summary["variants"]]
    waiting = f"Not run: {'; '.join(missing)}." if missing else ""
    figure = f"![{result.study.title}]({figures}{result.stem}.png)"
    settings = ", ".join(_flat(result.summary["settings"]))
    details = f"<details><summary>Settings</summary>{settings}</details>"
    return [*head, told, _variants_table(result), waiting, figure, details]


def _flat(settings: Mapping[str, Any], before: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name} {value}"


def _variants_table(result: Result) -> str:
    assert result.summary is not None
    variants = list(result.summary["variants"].values())
    keys = [key for key in dict.fromkeys(k for v in variants for k in v) if key not in HIDDEN | {result.study.score}]
    more = [key for key in keys if any(isinstance(v.get(key), float | int) for v in variants)]
    texts = [key for key in keys if key not in more and any(v.get(key) for v in variants)]
    costs = ["MACs"] if "macs" in variants[0] else []
    unit = " (%)" if result.study.unit == 100 else ""
    columns = ["", *costs, f"{result.study.score}{unit}", "against the first", *(key.replace("_", " ") for key in more)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for variant in variants:
        cells = [variant["label"], *([_macs(variant, variants[0])] if costs else []), _mean(variant)]
        cells += [_against_first(variant), *(_number(variant.get(key), variant["deviations"].get(key)) for key in more)]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{key.replace('_', ' ')}: {'; '.join(_distinct(variants, key))}." for key in texts]
    return "\n".join([*lines, "", *notes]) if notes else "\n".join(lines)


def _distinct(variants: Iterable[Mapping[str, Any]], key: str) -> list[str]:
    return sorted({str(variant[key]) for variant in variants if variant.get(key)})


def _mean(variant: Mapping[str, Any]) -> str:
    deviation = "" if variant["deviation"] is None else f" ± {variant['deviation']:.2f}"
    return f"{variant['mean']:.2f}{deviation} ({variant['runs']})"


def _macs(variant: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    return f"{count(variant['macs'])} ({variant['macs'] / first['macs']:.2f}×)"


def _against_first(variant: Mapping[str, Any]) -> str:
    found = variant["against_first"]
    if found is None:
        return ""
    difference = f"{found['difference']:+.2f}".replace("-", "−")
    if found["verdict"] is None:
        return f"{difference}, too few runs"
    return f"{difference} ± {found['margin']:.2f}, {found['verdict']}"


def _number(value: Any, deviation: float | None = None) -> str:
    if not isinstance(value, float | int):
        return ""
    told = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return (
        told if deviation is None else f"{told} ± {deviation:,.0f}" if deviation >= 100 else f"{told} ± {deviation:.2g}"
    )
