"""The recipes that come with the project: each can be read and built, and says what it is and whether it was run."""

import re
from pathlib import Path

import pytest

from tokenlearner.insertion.insert import learners
from tokenlearner.training.build import build_model
from tokenlearner.training.recipe import Recipe, check_recipe, load_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_the_readme_lists_them_all():
    assert set(re.findall(r"\]\((\w+\.yaml)\)", (FOLDER / "README.md").read_text())) == {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_says_how_it_is_run_and_what_came_of_it(file):
    comments = "\n".join(line for line in file.read_text().splitlines() if line.startswith("#"))
    said = dict(re.findall(r"^# (Command|Hardware|Time|Score):\s+(\S.*)$", comments, re.MULTILINE))
    assert set(said) == {"Command", "Hardware", "Time", "Score"}
    assert f"--recipe recipes/{file.name}" in comments
    assert ("not run" in said["Time"]) == ("not run" in said["Score"])


@pytest.mark.parametrize("file", [file for file in FILES if "compress" in file.stem], ids=lambda file: file.stem)
def test_a_recipe_of_compress_is_one(file):
    """What compress sets itself is not in it."""
    assert "tokenlearner compress " in file.read_text()
    recipe = load_recipe(file)
    assert (recipe.model, recipe.init, recipe.distill.teacher) == (None, None, None)
    assert recipe.distill.logits + recipe.distill.features > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_builds(file):
    recipe = load_recipe(file)
    check_recipe(recipe)
    assert recipe != Recipe()
    model = build_model(recipe, num_classes=7, on="meta")
    assert model.head.out_features == 7
    assert {learner.num_tokens for learner in learners(model).values()} == {recipe.tokens}
    assert recipe.batch_size % 8 == 0
