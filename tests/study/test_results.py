"""docs/results.md: what it says follows from what the studies measured, here and for studies made up."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tokenlearner.study import page as pages
from tokenlearner.study.page import results_in
from tokenlearner.study.rows import read_rows
from tokenlearner.study.study import open_study, run_study, summarise

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "studies/results").glob("*.json"))

MADE_UP = """
from dataclasses import dataclass
from tokenlearner.study.claims import Claim
from tokenlearner.study.figures import bars
from tokenlearner.study.study import Study

@dataclass(frozen=True)
class Variant:
    label: str
    value: float

def measure(job):
    return {"accuracy": job.variant.value + 0.01 * job.seed, "macs": 2_000_000, "lift": 1.5, "data": "made up"}

STUDY = Study(
    title="Made up",
    question="Which is best?",
    run=measure,
    variants=lambda _: {"a": Variant("the first", 0.5), "b": Variant("the second", 0.6)},
    sizes={"cpu": Variant("", 0), "gpu": Variant("", 1)},
    draw=bars,
    claims=(
        Claim(3, "a beats b", "a", "b", "2 and 1 %"),
        Claim(3, "b beats a", "b", "a", "1 and 2 %"),
        Claim(8, "b is about as high", "b", "a", "3", "about", 0.5, "lift"),
    ),
)
"""


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("studies_report", ROOT / "studies/report.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def studies(tmp_path) -> Path:
    """One study that is run and one that is not."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "studies" / "ran.py").write_text(MADE_UP)
    (tmp_path / "studies" / "waits.py").write_text(MADE_UP.replace("Made up", "Later"))
    return tmp_path


def ran(studies: Path, **options) -> None:
    places = {"data": studies / "data", "output": studies / "results", "runs": studies / "runs"}
    study = open_study("ran", studies / "studies")
    run_study("ran", study, **places, command="a command", log=lambda line: None, **options)


def page_of(studies: Path, claims: dict[int, str]) -> str:
    return pages.page(results_in(studies / "results", studies / "studies"), claims, head=("# Made up",), figures="to/")


def judged_again(difference: float, margin: float, rule: str) -> str:
    """The verdict by the rules as the page tells them."""
    kind, *slack = rule.split(", ")
    if kind == "better":
        return "holds" if difference > margin else "does not" if difference < -margin else "undecided"
    allowed = float(slack[0])
    if kind == "at least":
        if difference < -margin:
            return "does not"
        return "holds" if difference > margin or difference - margin > -allowed else "undecided"
    if difference - margin >= -allowed and difference + margin <= allowed:
        return "holds"
    return "does not" if difference - margin > allowed or difference + margin < -allowed else "undecided"


def claim_rows(page: str) -> list[list[str]]:
    """The rows of the claims' tables, by their cells."""
    part = page[page.index("## The claims") : page.index("## The studies")]
    lines = [line for line in part.splitlines() if line.startswith("| ") and "| what is compared" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def check_verdicts(page: str) -> int:
    """How many verdicts there are, each of which follows from the numbers beside it."""
    count = 0
    for _, _, _, first, second, difference, verdict, rule in claim_rows(page):
        if not (first and second):
            assert verdict == "not run"
            continue
        if re.search(r"×| [kMGT], ", difference):  # of multiply-adds, which have no spread
            assert verdict in ("**holds**", "**does not**")
            if "×" in difference:
                assert (float(difference[:-1]) <= float(rule.split(", ")[1])) == (verdict == "**holds**")
            continue
        found = re.fullmatch(r"([+−][\d.]+)(?: ± ([\d.]+), (better|worse|undecided))?", difference)
        if found[2] is None:
            assert verdict == "too few runs"
            assert "(1)" in (first + second)
            continue
        by, margin = float(found[1].replace("−", "-")), float(found[2])
        means = [float(side.split()[0].replace("−", "-")) for side in (first, second)]
        assert by == pytest.approx(means[0] - means[1], abs=0.016)
        assert verdict == f"**{judged_again(by, margin, rule)}**"
        assert found[3] == ("better" if by > margin else "worse" if by < -margin else "undecided")
        count += 1
    return count


# ---- the page of this repository


def test_the_page_is_what_the_studies_came_to(report):
    report.main(["--check"])


def test_the_verdicts_follow_from_the_numbers_beside_them(report):
    page = (ROOT / "docs/results.md").read_text()
    assert check_verdicts(page) >= len(report.PHOTOS) * 2  # the older studies at least
    assert re.findall(r"^### (\d)\. ", page, flags=re.MULTILINE) == list("12345678")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_summary_is_that_of_its_rows(path):
    found = json.loads(path.read_text())
    study = open_study(found["study"], ROOT / "studies")
    rows = read_rows(path.with_name(f"{found['study']}.csv"))
    assert json.loads(json.dumps(summarise(found["study"], study, rows, found["size"]))) == found
    assert path.with_suffix(".png").is_file()


def test_links_and_figures_are_there():
    page = (ROOT / "docs/results.md").read_text()
    for link in set(re.findall(r"\]\(([^)#]+)\)", page)):
        assert (ROOT / "docs" / link).exists(), link
    anchors = set(re.findall(r'<a id="([^"]+)">', page))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


# ---- a page of made-up studies


def test_a_page_of_made_up_studies(report, studies):
    ran(studies)
    page = page_of(studies, report.CLAIMS)
    assert check_verdicts(page) == 3
    rows = {(cells[0], cells[1]): cells[2:] for cells in claim_rows(page)}
    assert rows["a beats b", "[`ran`](#ran)"] == [
        "2 and 1 %",
        "51.00 ± 1.00 % (3)",
        "61.00 ± 1.00 % (3)",
        "−10.00 ± 2.27, worse",
        "**does not**",
        "better",
    ]
    assert rows["b beats a", "[`ran`](#ran)"][-2] == "**holds**"
    by_lift = ["3", "1.50 ± 0.00 (3)", "1.50 ± 0.00 (3)", "+0.00 ± 0.00, undecided", "**holds**", "about, 0.5, by lift"]
    assert rows["b is about as high", "[`ran`](#ran)"] == by_lift
    assert rows["a beats b", "[`waits`](#waits)"] == ["2 and 1 %", "", "", "", "not run", "better"]
    assert "| 3. At depth 0 it is clearly worse | **mixed** | 1 holds, 1 does not, 2 not run |  |" in page
    assert "| **not run** | no study yet |  |" in page

    against = page[page.index("**What contradicts the paper:**") : page.index("**Not run:**")]
    assert against.count("\n- ") == 1
    assert '"a beats b" does not hold: 51.00 ± 1.00 % (3) and 61.00 ± 1.00 % (3)' in against
    assert "the paper: 2 and 1 %" in against
    waiting = page[page.index("**Not run:**") : page.index("## The claims")]
    assert "- `waits`: Later." in waiting
    assert "- Other sizes: `ran` (gpu), `waits` (gpu)." in waiting


def test_a_section_has_sizes_hardware_and_the_rows_numbers(report, studies):
    ran(studies, seeds=(0, 4))
    ran(studies, seeds=(0,), size="gpu", only=("b",))
    page = page_of(studies, report.CLAIMS)
    cpu, gpu, waits = page[page.index("## The studies") :].split("\n### ")[1:4]
    assert "Size cpu, seeds 0, 4; " in cpu
    assert "threads; 4 runs of 0 seconds in all; commit " in cpu
    assert "`a command`." in cpu
    assert "|  | MACs | accuracy (%) | against the first | lift |" in cpu
    assert "| the second | 2 M (1.00×) | 62.00 ± 2.83 (2) | +10.00 ± 12.17, undecided | 1.5 |" in cpu
    assert "data: made up." in cpu
    assert "(to/ran.png)" in cpu
    assert gpu.startswith('<a id="ran-gpu"></a>Made up (`ran`, gpu)')
    assert "<details><summary>Settings</summary>label , value 0</details>" in cpu
    assert "Not run:" not in cpu
    assert "| the second | 2 M (1.00×) | 60.00 (1) |  | 1.5 |" in gpu
    assert "Not run: the first." in gpu
    assert waits.rstrip().endswith("Not run.")
    assert "- Other sizes: `waits` (gpu)." in page


def test_check_notices_a_page_that_is_out_of_date(report, studies, tmp_path):
    page = tmp_path / "results.md"
    arguments = ["--results", str(studies / "results"), "--output", str(page)]
    with pytest.raises(SystemExit, match=r"is not what the studies came to: run python studies/report\.py"):
        report.main([*arguments, "--check"])
    report.main(arguments)
    report.main([*arguments, "--check"])
    page.write_text(page.read_text() + "by hand\n")
    with pytest.raises(SystemExit, match="is not what the studies came to"):
        report.main([*arguments, "--check"])
