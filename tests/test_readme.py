"""The README's numbers are the measured ones, and what it points at is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_measurements():
    command = [sys.executable, ROOT / "benchmarks/readme.py", "write", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_code_comes_before_line_30():
    assert README[: README.index("tokenlearner.insert(model")].count("\n") < 30


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_the_tree_is_the_real_one():
    tree = README.split("```")[-2]
    folders = re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE)
    real = [path.name for path in (ROOT / "src/tokenlearner").iterdir() if (path / "__init__.py").exists()]
    assert sorted(folders) == sorted(real)
    for folder, files in re.findall(r"^  (\w+)/ +(.*)$", tree, flags=re.MULTILINE):
        for file in re.findall(r"\w+\.py", files):
            assert (ROOT / "src/tokenlearner" / folder / file).exists(), f"{folder}/{file}"
