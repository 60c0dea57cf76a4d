"""Scores that are added: one from outside of the package, and an entry of the table. No other file changes."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dimefm
from dimefm.cache import InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two import score_table
from dimefm.pipeline.stage_two.distill import distill
from dimefm.pipeline.stage_two.evaluate import evaluate
from dimefm.stages.score import scores
from dimefm.stages.score.scores import SCORES, Column, Score

from ...support.commands import run_dimefm
from ...support.worlds import make_world

DOCS = Path(dimefm.__file__).parent / "docs/scores.md"
EXAMPLE = re.search(r'```python\n("""my_scores\.py.*?)```', DOCS.read_text(), re.DOTALL)[1]
MORE = """
def no_json(inputs):
    return {"cosine": np.float32(1)}

def set_names(inputs):
    return {"sets": sorted(inputs.embedded), "by": inputs.memo.once("by", lambda: inputs.run.name)}

def require_labels(inputs):
    assert not inputs.embedded
    raise NotImplementedError(f"asked first, of {inputs.name}")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_teacher):
    """A world whose config names the example of the docs, and one step of each of two students."""
    folder = tmp_path_factory.mktemp("plugins")
    path = make_world(folder, tiny_teacher)
    path.write_text(path.read_text() + 'scores = ["my_scores:spread"]\n')
    (folder / "my_scores.py").write_text(EXAMPLE + MORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        config = load_config(path)
        assert "my_scores" not in sys.modules  # found, not imported
        cache_teacher(config)
        distill(config, [], stop_after=1)
        yield path
    sys.modules.pop("my_scores", None)


@pytest.fixture
def config(trained, tmp_path):
    """A copy of the config, for other scores, over the same runs and cache."""
    text = trained.read_text()
    for key in ("images/", "captions.txt", "cache", "runs", "dev/", "classes.json", "templates.txt"):
        text = text.replace(f'"{key}"', f'"{trained.parent / key}"')
    (tmp_path / "run.toml").write_text(text)
    return tmp_path / "run.toml"


def test_a_score_from_outside_is_computed_recorded_and_printed(trained, capsys):
    runs = [trained.parent / "runs" / name for name in ("small", "vit")]
    for run in runs:
        assert json.loads((run / "source.json").read_bytes())["scores"] == {"dev": ["my_scores:spread"]}
    done = run_dimefm(capsys, "evaluate", *runs)  # by the runs alone: source.json names the score
    assert done.code == 0, done.lines
    mine = importlib.import_module("my_scores")
    assert mine.spread.__doc__ and "\x1b" not in done.out
    for run in runs:
        found = json.loads((run / "evaluation.json").read_bytes())["dev"]["scores"]
        assert set(found) == {"my_scores:spread"} and found["my_scores:spread"]["images"] == 12
        value = found["my_scores:spread"]["student"]
        assert 0 <= value <= 1
        assert any(
            line.split() == [run.name, "dev", "my_scores:spread", "student", f"{value:.4g}"]
            for line in done.out.splitlines()
        )


def test_a_config_brings_a_score_that_its_runs_did_not_have(config):
    config.write_text(config.read_text().replace('["my_scores:spread"]', '["my_scores:set_names"]'))
    for run, found in evaluate([config]).items():
        assert found["dev"]["scores"] == {"my_scores:set_names": {"sets": ["dev"], "by": "small"}}, run  # one memo


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [("my_scores:absent", "defines no 'absent'"), ("nowhere:f", "no module 'nowhere'"), ("spread", "wanted package")],
)
def test_a_score_that_is_not_there_is_refused_with_the_config(config, spec, wanted):
    config.write_text(config.read_text().replace("my_scores:spread", spec))
    with pytest.raises(InputError, match=rf"evaluate\.dev\.scores\.0: .*{wanted}"):
        load_config(config)


def test_a_score_that_is_no_json_is_one_line(config):
    config.write_text(config.read_text().replace("my_scores:spread", "my_scores:no_json"))
    with pytest.raises(InputError, match=r"my_scores:no_json: its score of dev is no JSON .*float32"):
        evaluate([config])


def test_an_entry_of_the_table_is_all_that_a_score_of_the_package_adds(trained, monkeypatch):
    entry = Score("spread", "my_scores:spread", columns=(Column("spread", "spread.student", ".2f"),))
    for module in (scores, score_table):
        monkeypatch.setattr(module, "SCORES", (*SCORES, entry))
    run = trained.parent / "runs/small"
    found = evaluate([run])
    written = json.loads((run / "evaluation.json").read_bytes())
    value = found[str(run)]["dev"]["spread"]["student"]
    assert written["dev"]["spread"]["student"] == value
    lines = [line.split() for line in score_table.score_table(found).splitlines()]
    assert any(line[-1:] == ["spread"] for line in lines) and any(line[-1:] == [f"{value:.2f}"] for line in lines)


def test_a_score_may_refuse_before_anything_is_embedded(trained, monkeypatch):
    entry = Score("spread", "my_scores:spread", require="my_scores:require_labels")
    monkeypatch.setattr(scores, "SCORES", (*SCORES, entry))
    with pytest.raises(NotImplementedError, match="asked first, of dev"):
        evaluate([trained.parent / "runs/small"])


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
def test_every_entry_of_the_table_can_be_loaded(score):
    assert callable(score.load())


def loaded_by(module: str) -> set[str]:
    """Modules that importing one loads, in a process of its own."""
    code = f"import sys, {module}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_scoring_does_not_import_the_training_stack():
    loaded = loaded_by("dimefm.pipeline.stage_two.evaluate")
    assert not [name for name in loaded if name.startswith(("dimefm.stages.train", "dimefm.stages.load"))]


def test_the_table_and_the_source_of_a_run_are_read_without_torch():
    loaded = loaded_by("dimefm.pipeline.stage_two.run_source")
    assert not {"torch", "sklearn"} & loaded
