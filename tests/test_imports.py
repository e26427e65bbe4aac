"""Who may import whom, read from the sources, and what an import costs and needs, seen in fresh processes."""

import ast
import importlib.machinery
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tokenlearner import _torchvision

SOURCE = Path(__file__).parents[1] / "src" / "tokenlearner"


class Import(NamedTuple):
    file: str
    function: str
    part: str
    target: str


def imports_in(file: Path) -> Iterator[Import]:
    """Every import of a source file, wherever it stands, with the function around it ("" at the top)."""

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((function, alias.name) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0
                own_root = child.module == "tokenlearner"  # from tokenlearner import core: that is tokenlearner.core
                yield from (
                    (function, f"{child.module}.{alias.name}" if own_root else child.module) for alias in child.names
                )
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from visit(child, child.name if inner and not function else function)

    name = file.relative_to(SOURCE).as_posix()
    part = name.split("/")[0].removesuffix(".py")
    for function, target in visit(ast.parse(file.read_text(encoding="utf-8")), ""):
        yield Import(name, function, part, target)


IMPORTS = [found for file in sorted(SOURCE.rglob("*.py")) for found in imports_in(file)]

EVERYTHING = {
    "core",
    "data",
    "errors",
    "evaluation",
    "export",
    "insertion",
    "inspection",
    "models",
    "study",
    "training",
}
MAY_IMPORT = {
    "__init__": {"_torchvision", "core", "errors", "insertion", "inspection", "training"},
    "__main__": {"cli"},
    "_torchvision": set(),
    "cli": EVERYTHING,
    "core": set(),
    "data": {"errors", "insertion"},
    "errors": set(),
    "evaluation": EVERYTHING - {"export", "study"},
    "export": {"data", "errors", "evaluation", "insertion", "inspection"},
    "insertion": {"core", "errors"},
    "kernels": {"core", "errors"},
    "inspection": {"core", "errors", "insertion"},
    "models": {"core", "errors", "insertion", "inspection"},  # whose cost counts the published models
    "study": EVERYTHING - {"export"},
    "training": EVERYTHING - {"export", "study"},
}
NEEDS_ONLY = {
    "__init__": set(),
    "_torchvision": {"torch"},
    "core": {"torch", "einops", "jaxtyping"},
    "errors": set(),
    "insertion": {"torch", "torchvision", "einops", "jaxtyping", "timm", "safetensors"},
    "kernels": {"torch", "jaxtyping", "triton"},
}
ONLY_IN = {
    "av": {"data"},
    "cyclopts": {"cli", "training"},  # and there in recipe_files.py alone, see below
    "lightning": {"training", "evaluation", "study"},
    "matplotlib": {"inspection", "study"},
    "rich": {"cli"},
    "torchmetrics": {"training", "evaluation"},
    "triton": {"kernels"},  # imported when a kernel runs
    "transformers": {"insertion"},  # and there in huggingface*.py alone, imported where transformers already is
}


def test_the_sources_are_read():
    """Guards the tests below, which an empty list would pass."""
    assert {found.part for found in IMPORTS} <= set(MAY_IMPORT)
    assert Import("insertion/saving.py", "", "insertion", "timm") in IMPORTS
    assert Import("insertion/saving.py", "_created", "insertion", "timm.data") in IMPORTS
    assert Import("__main__.py", "", "__main__", "tokenlearner.cli") in IMPORTS


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part):
    allowed = MAY_IMPORT[part] | {part, "__version__"}
    ours = [found for found in IMPORTS if found.part == part and found.target.split(".")[0] == "tokenlearner"]
    wrong = [found for found in ours if f"{found.target}.".split(".")[1] not in allowed]
    # Reading a recipe file takes the command line's parser, so it alone reaches up, when called.
    assert [found for found in wrong if found[:2] != ("training/recipe.py", "load_recipe")] == []


@pytest.mark.parametrize("part", NEEDS_ONLY)
def test_the_inner_parts_need_little(part):
    inner = [found for found in IMPORTS if found.part == part and not found.file.startswith("insertion/huggingface")]
    used = {found.target.split(".")[0] for found in inner}
    assert used - sys.stdlib_module_names - {"tokenlearner"} <= NEEDS_ONLY[part]


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_where_they_are_used(library):
    users = {found.part for found in IMPORTS if found.target.split(".")[0] == library}
    assert users
    assert users <= ONLY_IN[library]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python, without what this one has imported."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=True)


def test_training_needs_no_command_line_parser():
    parsers = {found.file for found in IMPORTS if found.target.split(".")[0] == "cyclopts"}
    assert {file.split("/")[0] for file in parsers - {"training/recipe_files.py"}} == {"cli"}
    assert "training/recipe_files.py" in parsers
    users = {(found.part, found.function) for found in IMPORTS if found.target == "tokenlearner.training.recipe_files"}
    assert users == {("cli", ""), ("training", "load_recipe")}  # the latter inside the function


HEAVY = ["av", "torch", "timm", "torchvision", "numpy", "lightning", "torchmetrics", "cyclopts", "matplotlib", "einops"]


def test_importing_the_package_imports_nothing_heavy():
    script = f"import sys, tokenlearner; dir(tokenlearner); print([n for n in {HEAVY} if n in sys.modules])"
    assert run("-c", script).stdout == "[]\n"


def test_the_library_runs_without_what_only_training_and_the_command_line_need():
    script = """
import sys
for name in ("lightning", "torchmetrics", "cyclopts", "matplotlib", "sklearn", "rich", "av"):
    sys.modules[name] = None  # importing it now raises ImportError
from tokenlearner import TokenLearner, attention_maps, cost, insert, load, remove, save
import tempfile, timm
with tempfile.TemporaryDirectory() as folder:
    model = insert(timm.create_model("vit_tiny_patch16_224", depth=2), 8)
    print(cost(load(save(model, folder))).tokens)
"""
    assert run("-c", script).stdout == "(197, 9)\n"


@pytest.mark.parametrize("loads", [True, False], ids=["as installed", "library does not load"])
def test_timm_can_be_imported_after_the_package(loads):
    broken = """
import torch
def load_library(path): raise OSError("undefined symbol")
torch.ops.load_library = load_library
"""
    script = f"""
{"" if loads else broken}
import tokenlearner
import timm, torch, torchvision
print(torch.ops.torchvision.nms.default._schema)
"""
    assert run("-c", script).stdout == "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor\n"


def test_help_is_quick():
    """Seconds of processor time, which other programs on the machine don't stretch as they do the clock's."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "Example: tokenlearner demo" in " ".join(run("-m", "tokenlearner", "--help").stdout.split())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) <= 0.5


@pytest.mark.parametrize("command", [[], ["train"], ["cost"]])
def test_help_imports_nothing_heavy(command):
    modules = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in run("-X", "importtime", "-m", "tokenlearner", *command, "--help").stderr.splitlines()
    }
    assert "cyclopts" in modules
    assert modules & set(HEAVY) == {"cyclopts"}


@pytest.fixture
def declared(monkeypatch):
    """What declare_missing_operators declares, without declaring it: this process may have done so already."""
    schemas = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            schemas.append(schema.partition("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(_torchvision, "_libraries", [])
    return schemas


def test_nothing_is_declared_where_torchvisions_library_loads(monkeypatch, declared):
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    _torchvision.declare_missing_operators()
    assert declared == _torchvision._libraries == []
    assert [Path(path).parent.name for path in loaded] == ["torchvision"]


def test_nothing_is_declared_where_torchvision_is_missing(monkeypatch, declared):
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda *_: None)
    _torchvision.declare_missing_operators()
    assert declared == []


def test_the_operators_are_declared_where_the_library_does_not_load(monkeypatch, declared):
    def load_library(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    _torchvision.declare_missing_operators()
    assert declared == ["nms", "qnms"]
    assert len(_torchvision._libraries) == 1  # kept, or the operators would go with it


def test_the_cure_waits_for_torchvisions_first_import(monkeypatch):
    calls = []
    monkeypatch.setattr(_torchvision, "declare_missing_operators", lambda: calls.append("declared"))
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if type(f).__name__ != "_BeforeTorchvision"])
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    others = list(sys.meta_path)
    _torchvision.install()
    _torchvision.install()
    assert sys.meta_path[1:] == others
    finder = sys.meta_path[0]
    assert finder.find_spec("json", None) is None
    assert calls == []
    assert finder.find_spec("torchvision", None) is None  # the real finders find it
    assert calls == ["declared"]
    assert sys.meta_path == others


def test_the_cure_comes_too_late_for_an_imported_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    before = list(sys.meta_path)
    _torchvision.install()
    assert sys.meta_path == before
