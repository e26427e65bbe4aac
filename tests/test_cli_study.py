"""`tokenlearner study`, in this process: what it lists, runs and refuses."""

import json
from pathlib import Path

import pytest

from tokenlearner.study.rows import read_rows

TINY = '''"""A study without training."""
import sys
from dataclasses import dataclass
from tokenlearner.errors import InputError
from tokenlearner.study import Claim, Study
from tokenlearner.study.figures import bars

@dataclass(frozen=True)
class Variant:
    label: str
    files: int

def count(job):
    found = len(list(job.data.iterdir()))
    if found == 0:
        raise InputError(f"{job.data} is empty")
    print("counting", job.variant.label, file=sys.stderr)
    return {"share": found / job.variant.files + job.seed / 100}

STUDY = Study(
    title="Counting files",
    question="Are there enough?",
    run=count,
    variants=lambda _: {"few": Variant("of four", 4), "many": Variant("of eight", 8)},
    sizes={"cpu": Variant("", 0)},
    draw=bars,
    score="share",
    claims=(Claim(1, "Few beat many", "few", "many", "50 and 25 %"),),
)
'''


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder of studies, one of two files, and an empty one."""
    for name in ("studies", "data", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "studies" / "counting.py").write_text(TINY)
    for name in ("one", "two"):
        (tmp_path / "data" / name).touch()
    return tmp_path


def options(place: Path, data: str = "data") -> list[object]:
    folders = {"--studies": "studies", "--data": data, "--output": "results", "--runs": "runs"}
    return [part for option, name in folders.items() for part in (option, place / name)]


def test_the_studies_there_are_can_be_listed(run, place):
    listed = run("study", "--list", "--studies", place / "studies", "--json")
    assert listed.code == 0
    assert json.loads(listed.out) == {"counting": {"title": "Counting files", "question": "Are there enough?"}}
    table = run("study", "--list", "--studies", place / "studies").out
    assert all(word in table for word in ("counting", "Counting files", "Are there enough?"))


def test_a_study_runs_and_tells_its_verdicts(run, place):
    ran = run("study", "counting", *options(place), "--seeds", 0, 1)
    assert ran.code == 0
    assert ran.err.splitlines() == ["counting of four", "counting of eight"] * 2
    assert "counting, of eight, seed 1: share 0.2600" in ran.out
    assert "50.50" in ran.out
    assert "± 0.71" in ran.out
    assert "Few beat many: holds (+25.00 ± 3.04); paper: 50 and 25 %" in ran.out
    assert f"written to {place / 'results'}" in ran.out
    rows = read_rows(place / "results" / "counting.csv")
    assert [(row["variant"], row["seed"]) for row in rows] == [
        ("few", "0"),
        ("many", "0"),
        ("few", "1"),
        ("many", "1"),
    ]
    command = "tokenlearner study counting --studies DIR --data DIR --output DIR --runs DIR --seeds 0 1"
    assert rows[0]["command"] == command
    assert {path.name for path in (place / "results").iterdir()} == {"counting.csv", "counting.json", "counting.png"}

    again = run("study", "counting", *options(place), "--seeds", 0, 1)
    assert (again.code, again.err) == (0, "")  # nothing is run twice
    assert "Few beat many: holds" in again.out


def test_a_study_file_and_some_of_its_variants(run, place):
    file = place / "studies" / "counting.py"
    ran = run("study", file, *options(place), "--variants", "many", "--seeds", 3, "--json")
    assert ran.code == 0
    summary = json.loads(ran.out)
    assert list(summary["variants"]) == ["many"]
    assert summary["variants"]["many"]["mean"] == 28.0
    assert summary["claims"][0]["verdict"] is None
    assert "counting, of eight, seed 3: share 0.2800" in ran.err
    table = run("study", file, *options(place), "--seeds", 3).out
    assert "Few beat many: too few runs; paper: 50 and 25 %" in table


@pytest.mark.parametrize(
    ("arguments", "data", "sentence"),
    [
        ([], "data", "give the NAME of a study, or --list to see the studies"),
        (["other"], "data", "there is no study {place}/studies/other.py; there are: counting"),
        (["counting", "--variants", "none"], "data", "counting has no variant 'none'; it has few, many"),
        (["counting", "--size", "gpu"], "data", "counting has no size 'gpu'; it has cpu"),
        (["counting"], "nowhere", "there is no folder {place}/nowhere of data"),
        (["counting"], "empty", "{place}/empty is empty"),
        (["counting", "--seeds", "-1"], "data", "a seed must be from 0 to 2^32 - 1, not -1"),
        (["broken"], "data", "{place}/studies/broken.py can't be read as a study: NameError: name 'x' is not defined"),
    ],
    ids=["no name", "unknown", "variant", "size", "no data", "refused by the run", "seed", "broken"],
)
def test_bad_input_gets_one_sentence(run, place, arguments, data, sentence):
    if arguments == ["broken"]:
        (place / "studies/broken.py").write_text("STUDY = x\n")
    refused = run("study", *arguments, *options(place, data))
    assert refused == (1, "", f"tokenlearner: {sentence.format(place=place)}\n")


def test_a_study_that_needs_no_files_needs_no_data_folder(run, place, monkeypatch):
    monkeypatch.chdir(place)
    assert run("study", "counting").code == 0


@pytest.mark.parametrize("arguments", [["--size", "tpu"], ["--seeds", "one"], ["--sseds", "1"]])
def test_bad_usage_is_exit_code_2(run, place, arguments):
    assert run("study", "counting", *options(place), *arguments).code == 2


def test_what_is_in_the_way_is_said(run, place):
    (place / "results").touch()
    refused = run("study", "counting", *options(place))
    assert (
        refused.err == f"tokenlearner: {place}/results is a file: give a folder for the CSV, the JSON and the figure\n"
    )
    (place / "results").unlink()
    (place / "results").mkdir()
    (place / "results/counting.csv").write_text("a,b\n1,2\n")
    assert "is no table of a study's runs" in run("study", "counting", *options(place)).err
    (place / "results/counting.csv").unlink()
    assert run("study", "counting", *options(place)).code == 0
    next((place / "runs").glob("*/row.json")).write_text("{")
    (place / "results/counting.csv").unlink()
    assert "row.json is not readable JSON" in run("study", "counting", *options(place)).err
    assert "there are no studies in" in run("study", "--list", "--studies", place / "data").err
