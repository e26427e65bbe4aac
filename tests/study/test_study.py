"""Running a study: what is done once, what goes on, what is shared, and the numbers of the summary."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from tokenlearner.errors import InputError
from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars, scatter
from tokenlearner.study.rows import read_rows, write_rows
from tokenlearner.study.study import Job, Study, built_upon, key_of, open_study, run_study, studies_in

QUIET: dict[str, Any] = {"log": lambda line: None}


@dataclass(frozen=True)
class Variant:
    label: str
    value: float


@dataclass(frozen=True)
class Settings:
    base: float = 0.5


JOBS: list[Job] = []


@pytest.fixture(autouse=True)
def _no_jobs() -> None:
    JOBS.clear()


def measure(job: Job) -> Mapping[str, Any]:
    """Its score is 0.01 higher for every seed."""
    JOBS.append(job)
    score = job.settings.base + job.variant.value + 0.01 * job.seed
    return {"accuracy": score, "rate": 10 * (job.variant.value + 1) + job.seed, "kind": "made up"}


def upon(job: Job) -> Mapping[str, Any]:
    other, row = built_upon(job, measure, Variant("another name", 0.0), job.settings)
    return {"accuracy": row["accuracy"] + job.variant.value, "of": other.folder.name}


STUDY = Study(
    title="Tiny",
    question="Is b better?",
    run=measure,
    variants=lambda _: {"a": Variant("first", 0.0), "b": Variant("second", 0.2)},
    sizes={"cpu": Settings(), "gpu": Settings(0.7)},
    draw=bars,
    claims=(
        Claim(1, "b beats a", "b", "a", "2 and 1 %"),
        Claim(2, "a is as fast", "a", "b", "none", "about", 3.0, "rate"),
    ),
)


@pytest.fixture
def place(tmp_path) -> dict[str, Path]:
    (tmp_path / "data").mkdir()
    return {"data": tmp_path / "data", "output": tmp_path / "results", "runs": tmp_path / "runs"}


def rows_of(place: Mapping[str, Path], name: str = "tiny") -> list[tuple[str, str]]:
    return [(row["variant"], row["seed"]) for row in read_rows(place["output"] / f"{name}.csv")]


def test_every_run_is_done_once_and_leaves_a_row(place):
    run_study("tiny", STUDY, **place, seeds=(0, 1), command="tokenlearner study tiny", **QUIET)
    assert [(job.variant.label, job.seed) for job in JOBS] == [
        ("first", 0),
        ("second", 0),
        ("first", 1),
        ("second", 1),
    ]
    assert {job.data for job in JOBS} == {place["data"]}
    row = read_rows(place["output"] / "tiny.csv")[3]
    assert (row["variant"], row["label"], row["seed"], row["size"]) == ("b", "second", "1", "cpu")
    assert (float(row["accuracy"]), row["kind"], row["command"]) == (0.71, "made up", "tokenlearner study tiny")
    assert row["commit"]
    assert "threads" in row["hardware"]
    assert float(row["seconds"]) >= 0

    told: list[str] = []
    run_study("tiny", STUDY, **place, seeds=(0, 1), log=told.append)
    assert (len(JOBS), told) == (4, [f"tiny: 4 of 4 runs are in {place['output'] / 'tiny.csv'} already"])
    (place["output"] / "tiny.csv").unlink()  # the runs have it all
    run_study("tiny", STUDY, **place, seeds=(0, 1), **QUIET)
    assert (len(JOBS), len(rows_of(place))) == (4, 4)


def test_a_study_that_was_stopped_goes_on(place):
    def stopping(job: Job) -> Mapping[str, Any]:
        if len(JOBS) == 2:
            raise KeyboardInterrupt
        return measure(job)

    study = replace(STUDY, run=stopping)
    with pytest.raises(KeyboardInterrupt):
        run_study("tiny", study, **place, seeds=(0, 1), **QUIET)
    assert rows_of(place) == [("a", "0"), ("b", "0")]
    JOBS.append(JOBS[0])  # so that it is stopped no more
    summary = run_study("tiny", study, **place, seeds=(0, 1), **QUIET)
    assert rows_of(place) == [("a", "0"), ("b", "0"), ("a", "1"), ("b", "1")]
    assert summary["variants"]["b"]["runs"] == 2


def test_studies_share_a_run_whatever_they_call_it(place):
    other = replace(STUDY, variants=lambda _: {"x": Variant("renamed", 0.2), "y": Variant("new", 0.3)}, claims=())
    run_study("tiny", STUDY, **place, seeds=(0,), **QUIET)
    run_study("other", other, **place, seeds=(0,), **QUIET)
    assert [job.variant.label for job in JOBS] == ["first", "second", "new"]
    assert read_rows(place["output"] / "other.csv")[0]["accuracy"] == "0.7"
    assert read_rows(place["output"] / "other.csv")[0]["label"] == "renamed"


def test_what_makes_a_run_another_one():
    key = key_of(measure, Variant("a", 0.1), Settings(), 0)
    assert key_of(measure, Variant("b", 0.1), Settings(), 0) == key
    others = [
        key_of(measure, Variant("a", 0.2), Settings(), 0),
        key_of(measure, Variant("a", 0.1), Settings(0.6), 0),
        key_of(measure, Variant("a", 0.1), Settings(), 1),
        key_of(upon, Variant("a", 0.1), Settings(), 0),
    ]
    assert len({key, *others}) == 5


def test_a_run_that_starts_from_another_does_that_once(place):
    study = replace(STUDY, run=upon, claims=())
    run_study("upon", study, **place, seeds=(0,), command="the first", **QUIET)
    assert [job.variant.label for job in JOBS] == ["another name"]
    run_study("tiny", STUDY, **place, seeds=(0,), command="the second", **QUIET)
    assert [job.variant.label for job in JOBS] == ["another name", "second"]  # "first" is that one
    rows = read_rows(place["output"] / "upon.csv")
    assert [float(row["accuracy"]) for row in rows] == [0.5, 0.7]
    assert {row["of"] for row in rows} == {JOBS[0].folder.name}
    assert [row["command"] for row in read_rows(place["output"] / "tiny.csv")] == ["the first", "the second"]


def test_rows_of_other_processes_are_kept_and_none_is_doubled(place):
    path = place["output"] / "tiny.csv"

    def beside(job: Job) -> Mapping[str, Any]:
        """Meanwhile another process ends a run of its own, and this very one."""
        numbers = measure(job)
        row = {"variant": "ab"[len(JOBS) - 1], "label": "theirs", "size": "cpu", "hardware": "theirs", **numbers}
        theirs = [{**row, "seed": seed, "run": key_of(beside, job.variant, job.settings, seed)} for seed in (5, 0)]
        write_rows(path, [*read_rows(path), *theirs])
        return numbers

    summary = run_study("tiny", replace(STUDY, run=beside), **place, seeds=(0,), **QUIET)
    assert sorted(rows_of(place)) == [("a", "0"), ("a", "5"), ("b", "0"), ("b", "5")]
    assert {name: v["runs"] for name, v in summary["variants"].items()} == {"a": 2, "b": 2}


def test_some_variants_alone(place):
    summary = run_study("tiny", STUDY, **place, seeds=(0, 1), only=("b",), **QUIET)
    assert rows_of(place) == [("b", "0"), ("b", "1")]
    assert list(summary["variants"]) == ["b"]
    assert [claim["verdict"] for claim in summary["claims"]] == [None, None]
    run_study("tiny", STUDY, **place, seeds=(0,), only=("a",), **QUIET)
    assert rows_of(place) == [("b", "0"), ("b", "1"), ("a", "0")]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": "tpu"}, r"tiny has no size 'tpu'; it has cpu, gpu"),
        ({"only": ("a", "c")}, r"tiny has no variant 'c'; it has a, b"),
        ({"data": Path("nowhere")}, r"there is no folder nowhere of data"),
    ],
)
def test_what_is_not_there_is_refused(place, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        run_study("tiny", STUDY, **{**place, **changes}, **QUIET)
    assert JOBS == []


def test_rows_that_differ_in_what_all_must_share_are_refused(place):
    sets = ["one"]
    study = replace(STUDY, same=("kind",), run=lambda job: {**measure(job), "kind": " ".join(sets)})
    run_study("tiny", study, **place, seeds=(0,), **QUIET)
    sets.append("two")
    with pytest.raises(InputError, match="kind is one two for first, seed 1, and one in the rows there are"):
        run_study("tiny", study, **place, seeds=(1,), **QUIET)
    assert len(rows_of(place)) == 2
    run_study("tiny", study, **place, size="gpu", seeds=(1,), **QUIET)  # another size has its own
    assert len(rows_of(place)) == 4


def test_rows_of_other_settings_count_as_not_there(place):
    run_study("tiny", STUDY, **place, seeds=(0, 1), **QUIET)
    changed = replace(STUDY, sizes={"cpu": Settings(0.1)})
    summary = run_study("tiny", changed, **place, seeds=(0,), only=("a",), **QUIET)
    assert (summary["settings"], list(summary["variants"])) == ({"base": 0.1}, ["a"])
    assert summary["variants"]["a"]["mean"] == 10.0
    run_study("tiny", changed, **place, seeds=(0, 1), **QUIET)
    assert len(JOBS) == 8
    assert len(rows_of(place)) == 4  # the new ones took the others' places
    summary = run_study("tiny", STUDY, **place, seeds=(0, 1), **QUIET)
    assert (len(JOBS), summary["variants"]["a"]["mean"]) == (8, 50.5)  # the runs are kept


def test_the_summary_has_means_deviations_and_verdicts(place):
    summary = run_study("tiny", STUDY, **place, **QUIET)
    a, b = [50.0, 51.0, 52.0], [70.0, 71.0, 72.0]
    assert summary["variants"]["a"]["mean"] == statistics.mean(a)
    assert summary["variants"]["a"]["deviation"] == 1.0
    assert summary["variants"]["a"]["runs"] == 3
    assert summary["variants"]["a"]["against_first"] is None
    assert summary["variants"]["b"]["rate"] == 13.0  # the median of 12, 13 and 14
    assert summary["variants"]["b"]["kind"] == "made up"
    against = {"difference": 20.0, "pooled_standard_error": 0.82, "margin": 2.27, "verdict": "better"}
    assert summary["variants"]["b"]["against_first"] == against
    first, second = summary["claims"]
    assert (first["scores"], first["difference"], first["verdict"]) == ([b, a], 20.0, "holds")
    assert second["scores"] == [[10.0, 11.0, 12.0], [12.0, 13.0, 14.0]]  # its own column, as it is
    assert (second["difference"], second["margin"], second["verdict"]) == (-2.0, 2.27, "undecided")
    assert (summary["score"], summary["unit"], summary["size"]) == ("accuracy", 100.0, "cpu")
    assert json.loads((place["output"] / "tiny.json").read_text()) == summary


def test_another_size_has_files_of_its_own(place):
    run_study("tiny", STUDY, **place, seeds=(0,), **QUIET)
    of_cpu = (place["output"] / "tiny.json").read_text()
    summary = run_study("tiny", STUDY, **place, size="gpu", seeds=(0,), **QUIET)
    assert summary["variants"]["a"]["mean"] == 70.0
    assert (place["output"] / "tiny.json").read_text() == of_cpu
    assert json.loads((place["output"] / "tiny-gpu.json").read_text()) == summary
    assert (place["output"] / "tiny-gpu.png").is_file()
    assert [row["size"] for row in read_rows(place["output"] / "tiny.csv")] == ["cpu", "cpu", "gpu", "gpu"]


def test_a_figure_has_a_panel_for_everything_that_draws(place):
    seen = []

    def draw(axis, summary):
        scatter(axis, summary, x="rate", xlabel="rate", scale=2.0, key=True)
        seen.extend(text.xy for text in axis.texts)
        seen.extend(text.get_text() for text in axis.get_legend().get_texts())

    run_study("tiny", STUDY, **place, seeds=(0,), **QUIET)
    run_study("two", replace(STUDY, draw=(draw, bars)), **place, seeds=(0,), **QUIET)
    assert seen == [(20.0, 50.0), (24.0, 70.0), "1 first", "2 second"]
    assert [imread(place["output"] / f"{name}.png").shape[1] for name in ("tiny", "two")] == [1200, 1650]


def test_a_study_is_opened_by_name_or_file(tmp_path):
    (tmp_path / "mine.py").write_text("from tokenlearner.study.study import Study\nSTUDY = 3\n")
    (tmp_path / "helper.py").write_text("x = 1\n")
    assert studies_in(tmp_path) == ["mine"]
    with pytest.raises(InputError, match=r"there is no study .*other\.py; there are: mine"):
        open_study("other", tmp_path)
    with pytest.raises(InputError, match=r"there are: none: there is no folder .*nowhere; give a checkout's"):
        open_study("other", tmp_path / "nowhere")
    for name in ("mine", str(tmp_path / "helper.py")):
        with pytest.raises(InputError, match="is no study: it names no STUDY"):
            open_study(name, tmp_path)


@dataclass(frozen=True)
class OfASet:
    data: str = "photos"


def test_numbers_of_other_data_are_not_taken_for_these(place):
    study = replace(STUDY, run=lambda job: {"accuracy": 0.5}, sizes={"cpu": OfASet()}, claims=())
    (place["data"] / "photos").mkdir()
    (place["data"] / "photos/a.png").write_bytes(b"1")
    (place["data"] / "others.txt").touch()  # no set of the settings
    run_study("tiny", study, **place, seeds=(0,), **QUIET)
    (place["data"] / "others.txt").unlink()
    run_study("tiny", study, **place, seeds=(0,), **QUIET)
    elsewhere = place["data"].parent / "elsewhere"
    (elsewhere / "photos").mkdir(parents=True)
    (elsewhere / "photos/a.png").write_bytes(b"12")
    with pytest.raises(
        InputError, match=r"tiny\.csv has runs on other data: give the same --data, or another --output"
    ):
        run_study("tiny", study, **{**place, "data": elsewhere}, seeds=(0,), **QUIET)
    with pytest.raises(InputError, match=r"is of other data than .*elsewhere: give the same, or another --runs"):
        run_study("tiny", study, elsewhere, place["data"].parent / "new", runs=place["runs"], seeds=(0,), **QUIET)
    run_study("tiny", study, elsewhere, place["data"].parent / "new", runs=elsewhere / "runs", seeds=(0,), **QUIET)
