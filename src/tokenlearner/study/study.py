"""What a study is, and how it is run: seed by seed, each run once, a row each."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from tokenlearner.errors import InputError
from tokenlearner.insertion.saving import read_json, refuse_file, write_whole
from tokenlearner.inspection.summary import git_commit, hardware
from tokenlearner.study.claims import RULE, Claim, compare
from tokenlearner.study.figures import draw_figure
from tokenlearner.study.rows import read_rows, write_rows

FOLDER = Path("studies")
ROW = "row.json"


@dataclass(frozen=True)
class Job:
    """One run of a study: what differs, by what settings, with which seed, on which data, and a folder of its own, next
    to those of all other runs."""

    variant: Any
    settings: Any
    seed: int
    data: Path
    folder: Path
    command: str = ""


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    ``run`` does one :class:`Job` and returns its numbers, ``score`` among them (a share is from 0 to 1). Two studies
    whose ``run``, variant and settings are the same share that run. Variants and settings are dataclasses of plain
    values; a variant has a ``label``.
    """

    title: str
    question: str
    run: Callable[[Job], Mapping[str, Any]]
    variants: Callable[[Any], Mapping[str, Any]]
    """By name, for the settings of a size; all are compared with the first."""
    sizes: Mapping[str, Any]
    draw: Callable[[Axes, dict[str, Any]], None] | Sequence[Callable[[Axes, dict[str, Any]], None]]
    """Draws the summary that :func:`run_study` returns; of several, each has a panel."""
    score: str = "accuracy"
    unit: float = 100.0
    """What a score is multiplied with in summary, figure and claims: 100 for a share in percent."""
    claims: tuple[Claim, ...] = ()
    same: tuple[str, ...] = ()
    """Columns that all rows of a size must share, or their means would be of different things."""
    seeds: str = ""
    """What a seed is, where variants share more of it than a number: then they are compared seed by seed."""


def open_study(name: str, folder: Path = FOLDER) -> Study:
    """The study of ``folder/name.py``, or of the file ``name``.

    Raises:
        InputError: No such file, or one without a ``STUDY``.
    """
    path = Path(name) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        known = ", ".join(studies_in(folder)) or f"none: there is no folder {folder}; give a checkout's with --studies"
        raise InputError(f"there is no study {path}; there are: {known}")
    spec = importlib.util.spec_from_file_location(f"tokenlearner_study_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up there
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:  # somebody's own code
        raise InputError(f"{path} can't be read as a study: {type(error).__name__}: {error}") from error
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise InputError(f"{path} is no study: it names no STUDY of tokenlearner.study.Study")
    return study


def studies_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if "STUDY = " in path.read_text(encoding="utf-8"))


def run_study(
    name: str,
    study: Study,
    data: Path,
    output: Path,
    *,
    size: str = "cpu",
    seeds: Sequence[int] = (0, 1, 2),
    only: Sequence[str] = (),
    runs: Path = Path("runs/studies"),
    command: str = "",
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Does the runs that ``runs`` has not yet, and writes ``name.csv``, ``name.json`` and ``name.png`` to ``output``;
    of a size but the first ``name-size.json`` and ``name-size.png``.

    Stopped at any moment, the same call goes on. ``only`` names the variants to run; the others stay as they are. A row
    from before the variant or the settings were changed counts as not there, and the new one takes its place.

    Raises:
        InputError: No such size or variant, no such folder, a row that differs in what all must share, or what the runs
            refuse.
    """
    if size not in study.sizes:
        raise InputError(f"{name} has no size {size!r}; it has {', '.join(study.sizes)}")
    settings = study.sizes[size]
    variants = study.variants(settings)
    if unknown := [variant for variant in only if variant not in variants]:
        raise InputError(f"{name} has no variant {unknown[0]!r}; it has {', '.join(variants)}")
    if not data.is_dir():
        raise InputError(f"there is no folder {data} of data")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise InputError(f"a seed must be from 0 to 2^32 - 1, not {wrong[0]}")
    refuse_file(output, "the CSV, the JSON and the figure")
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{name}.csv"
    if (rows := read_rows(path)) and not {"variant", "seed", "size"} <= set(rows[0]):
        raise InputError(f"{path} is no table of a study's runs: it has no columns variant, seed and size")
    places = {(variant, seed, size) for variant in (only or variants) for seed in seeds}
    if known := places & {*map(_place, current(rows, study, size))}:
        log(f"{name}: {len(known)} of {len(places)} runs are in {path} already")
    for seed in seeds:
        for variant, what in variants.items():
            key = key_of(study.run, what, settings, seed)
            row = {"variant": variant, "label": what.label, "seed": seed, "size": size, "run": key}
            if only and variant not in only:
                continue
            there = [other for other in current(read_rows(path), study, size) if _place(other) == _place(row)]
            if there:
                _refuse_other_data(path, there[0], data_digest(data, settings))
                continue
            numbers = done_once(study.run, Job(what, settings, seed, data, runs / key, command))
            row |= numbers
            rows = read_rows(path)  # another process may have added some, this one too
            _refuse_different(name, study, current(rows, study, size), row)
            write_rows(path, [*(other for other in rows if _place(other) != _place(row)), row])
            log(f"{name}, {what.label}, seed {seed}: {study.score} {numbers[study.score]:.4f}")
    return write_up(name, study, read_rows(path), output, size)


def current(rows: Sequence[Mapping[str, str]], study: Study, size: str) -> list[Mapping[str, str]]:
    """Those of ``rows`` that are of a size, and of its variants and settings as they are now."""
    settings = study.sizes[size]
    variants = study.variants(settings)
    chosen = [row for row in rows if row.get("size") == size and row.get("variant") in variants]
    keys = [key_of(study.run, variants[row["variant"]], settings, int(row["seed"])) for row in chosen]
    return [row for row, key in zip(chosen, keys) if row.get("run") == key]


def _place(row: Mapping[str, Any]) -> tuple[str, int, str]:
    return row["variant"], int(row["seed"]), row["size"]


def _refuse_other_data(path: Path, row: Mapping[str, str], digest: str) -> None:
    if row.get("data_digest") and digest and row["data_digest"] != digest:
        raise InputError(f"{path} has runs on other data: give the same --data, or another --output")


def _refuse_different(name: str, study: Study, rows: Sequence[Mapping[str, str]], row: Mapping[str, Any]) -> None:
    for column in study.same:
        if others := sorted({other[column] for other in rows} - {str(row[column])}):
            raise InputError(
                f"{name}: {column} is {row[column]} for {row['label']}, seed {row['seed']}, and {others[0]} in the "
                "rows there are: give the same --data, or start over with another --output and --runs"
            )


def key_of(run: Callable[[Job], Mapping[str, Any]], variant: Any, settings: Any, seed: int) -> str:
    """A folder's name for a run: the same for the same run in any study, whatever the variant is called."""
    content: dict[str, Any] = {"v": asdict(variant), "s": asdict(settings)}
    content["v"].pop("label", None)
    content |= {"run": f"{run.__module__}.{run.__qualname__}", "seed": seed}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"{run.__name__}-{digest[:12]}-{seed}"


def data_digest(data: Path, settings: Any) -> str:
    """Of the names and sizes of all files in the sets that ``settings`` name as ``data``; empty where none is there."""

    def named(values: Mapping[str, Any]) -> set[str]:
        inner = [named(value) for value in values.values() if isinstance(value, Mapping)]
        return set().union({str(values["data"])} if "data" in values else set(), *inner)

    return _digest(data.resolve(), tuple(sorted(named(asdict(settings)))))


@functools.cache
def _digest(data: Path, names: tuple[str, ...]) -> str:
    files = sorted(path for name in names for path in (data / name).rglob("*") if path.is_file())
    content = "\n".join(f"{path.relative_to(data).as_posix()} {path.stat().st_size}" for path in files)
    return hashlib.sha256(content.encode()).hexdigest()[:12] if files else ""


def done_once(run: Callable[[Job], Mapping[str, Any]], job: Job) -> dict[str, Any]:
    """The row of ``job``, done now unless its folder has it.

    Raises:
        InputError: The row there is of other data.
    """
    file = job.folder / ROW
    digest = data_digest(job.data, job.settings)
    if file.is_file():
        row = read_json(file)
        if row.get("data_digest", digest) != digest:
            raise InputError(f"{job.folder} is of other data than {job.data}: give the same, or another --runs")
        return row
    job.folder.mkdir(parents=True, exist_ok=True)
    wall, cpu, commit = time.perf_counter(), time.process_time(), git_commit(Path.cwd())
    numbers = dict(run(job))
    row = {
        **numbers,
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "commit": commit,
        "command": job.command,
        "hardware": hardware(),
        "data_digest": digest,
    }
    write_whole({file: (json.dumps(row, indent=1) + "\n").encode()})
    return row


def built_upon(
    job: Job, run: Callable[[Job], Mapping[str, Any]], variant: Any, settings: Any
) -> tuple[Job, dict[str, Any]]:
    """The run that ``job`` starts from, which may be another study's too: its job and its row, done now unless it is
    there."""
    folder = job.folder.parent / key_of(run, variant, settings, job.seed)
    other = replace(job, variant=variant, settings=settings, folder=folder)
    return other, done_once(run, other)


def write_up(name: str, study: Study, rows: Sequence[Mapping[str, str]], output: Path, size: str) -> dict[str, Any]:
    """The summary of a size's ``rows``, written and drawn."""
    summary = summarise(name, study, rows, size)
    stem = name if size == next(iter(study.sizes)) else f"{name}-{size}"
    if summary["variants"]:
        draws = study.draw if isinstance(study.draw, Sequence) else (study.draw,)
        draw_figure(study.title, draws, summary, output / f"{stem}.png")
    write_whole({output / f"{stem}.json": (json.dumps(summary, indent=1) + "\n").encode()})
    return summary


def summarise(name: str, study: Study, rows: Sequence[Mapping[str, str]], size: str) -> dict[str, Any]:
    """Mean and deviation of every variant, beside the first, and the claims judged."""
    chosen = current(rows, study, size)
    scores = scores_of(chosen, study, study.score, size)
    first = next(iter(scores), None)
    return {
        "study": name,
        "title": study.title,
        "question": study.question,
        "size": size,
        "settings": json.loads(json.dumps(asdict(study.sizes[size]))),
        "score": study.score,
        "unit": study.unit,
        "rule": RULE,
        "hardware": sorted({row["hardware"] for row in chosen}),
        "variants": {
            variant: {
                **numbers_of([row for row in chosen if row["variant"] == variant]),
                "runs": len(values),
                "mean": round(statistics.mean(values), 2),
                "deviation": round(statistics.stdev(values), 2) if len(values) > 1 else None,
                "against_first": compare(values, scores[first], paired=bool(study.seeds))
                if first and variant != first
                else None,
            }
            for variant, values in scores.items()
        },
        "claims": [
            claim.judged(scores_of(chosen, study, claim.score or study.score, size), paired=bool(study.seeds))
            for claim in study.claims
        ],
    }


def scores_of(rows: Sequence[Mapping[str, str]], study: Study, column: str, size: str) -> dict[str, list[float]]:
    """By variant, of those that have been run, in the study's order; of a study by ``seeds`` those of the seeds that
    all of them have, in their order."""
    unit = study.unit if column == study.score else 1.0
    if study.seeds:
        of_variant = [
            {int(row["seed"]) for row in rows if row["variant"] == v} for v in {row["variant"] for row in rows}
        ]
        shared = set.intersection(*of_variant) if of_variant else set()
        rows = sorted((row for row in rows if int(row["seed"]) in shared), key=lambda row: int(row["seed"]))
    found = {
        variant: [unit * float(row[column]) for row in rows if row["variant"] == variant]
        for variant in study.variants(study.sizes[size])
    }
    return {variant: values for variant, values in found.items() if values}


def numbers_of(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Label, and the means of the numbers of a variant's ``rows``; the deviations of those that differ, by column."""
    found: dict[str, Any] = {"label": rows[0]["label"], "deviations": {}}
    for column in rows[0]:
        if column in ("variant", "label", "seed", "size", "run", "commit", "command", "hardware", "data_digest"):
            continue
        try:
            values = [float(row[column]) for row in rows]
            found[column] = statistics.mean(values)
            if len(set(values)) > 1:
                found["deviations"][column] = round(statistics.stdev(values), 6)
        except (ValueError, KeyError):
            found[column] = rows[0][column]
    return found
