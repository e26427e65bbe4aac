"""What a measurement is said to come from."""

import subprocess

import pytest

from tokenlearner.inspection.summary import command_line, git_commit


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.com")
    for path in ("src/package/code.py", "studies/one/train.py", "studies/results/one.csv"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1\n")
    for words in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "all")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_a_commit_is_named(repository):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout
    commit = git_commit(repository / "studies")
    assert len(commit) >= 4
    assert head.startswith(commit)


def test_results_that_a_study_writes_do_not_make_its_commit_dirty(repository):
    clean = git_commit(repository)
    (repository / "studies/results/one.csv").write_text("2\n")
    (repository / "studies/results/two.json").write_text("2\n")
    assert git_commit(repository) == clean


@pytest.mark.parametrize("path", ["src/package/code.py", "src/package/new.py", "studies/one/train.py"])
def test_changed_and_new_sources_do(repository, path):
    clean = git_commit(repository)
    (repository / path).write_text("2\n")
    assert git_commit(repository / "src") == f"{clean}-dirty"


def test_outside_of_a_repository_and_without_git_it_is_unknown(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit(repository) == "unknown"
    monkeypatch.undo()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert git_commit(tmp_path) == "unknown"


def test_a_command_line_tells_nothing_of_the_machine(tmp_path):
    arguments = ["run", "--data", str(tmp_path), f"--out={tmp_path}", str(tmp_path / "mine.py"), "--at", "0.5", "a b"]
    assert command_line("tool", arguments) == "tool run --data DIR --out=DIR DIR/mine.py --at 0.5 'a b'"
    assert command_line("tool", []) == "tool"
