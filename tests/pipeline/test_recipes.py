"""The benchmark of recipes: each is a config that the project accepts, and only what it names is changed."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

import dimefm

PROGRAM = Path(dimefm.__file__).parent / "benchmarks" / "recipes.py"


def load() -> Any:
    spec = spec_from_file_location("recipes", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipes = load()


@pytest.mark.parametrize("name", recipes.read_recipes())
def test_every_recipe_is_a_config_with_as_many_steps_as_the_others(tmp_path, name):
    for family in recipes.FAMILIES:
        config = recipes.configure(tmp_path, f"{name}/{family}/3")
        epochs = 40 if name == "long" else recipes.EPOCHS
        assert (config.distill.epochs, config.distill.batch_images, config.distill.seed) == (epochs, 256, 3)
        assert list(config.student) == ["student"] and config.distill.output == tmp_path / name / family / "3"


def test_a_loss_that_a_recipe_does_not_name_is_off(tmp_path):
    loss = recipes.configure(tmp_path, "feature/conv/0").distill.loss
    assert (loss.vl, loss.pvl, loss.feature) == (0.0, 0.0, 10.0)


def test_every_recipe_stands_beside_one_that_there_is():
    known = recipes.read_recipes()
    assert all(recipe.get("against", "paper") in known and recipe["about"] for recipe in known.values())


def test_a_gain_is_that_over_the_same_seeds_of_the_recipe_beside(tmp_path):
    scores = {"paper/conv/0": 0.1, "paper/conv/1": 0.3, "scale/conv/1": 0.35, "scale/conv/2": 0.9}
    for job, top1 in scores.items():
        (tmp_path / job).mkdir(parents=True)
        (tmp_path / job / "dev.json").write_text(f'{{"student_top1": {top1}, "cosine": 0.5}}')
    lines = [line for line in recipes.table(tmp_path, recipes.read_recipes()) if line.startswith("| `scale`")]
    assert "| 62.5 ± 38.9 | 0.50 |" in lines[0] and "+5.0 (paper)" in lines[0]
