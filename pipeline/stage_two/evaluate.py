"""`dimefm evaluate`: scores of finished runs on every labelled set, without the teacher."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.disk.durable import to_json, write_json
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ...stages.devices import memory_errors_as
from ...stages.inputs.open_source import open_source
from ...stages.run_folder.load_student import Which, load_student, load_text_student
from ...stages.score.embed_set import embed_set, labelled_set
from ...stages.score.embedded_set import EmbeddedSet
from ...stages.score.predictions import write_predictions, zero_shot_predictions
from ...stages.score.score_inputs import Memo, ScoreInputs
from ...stages.score.scores import FROM_OUTSIDE, scores_of
from ...stages.settings.plugins import load_function
from ..progress import say, some_names
from .changed_sources import CHANGED, watch_source
from .class_prompts import cached_set_prompts
from .run_source import RunSource, runs_to_score
from .score_table import Scores


def evaluate(runs: list[Path], which: Which | None = None, overrides: Sequence[str] = ()) -> Scores:
    """Score runs and write `evaluation.json`, and `predictions/` of each image, into each.

    Args:
        runs: folders of runs; a config file (.toml) stands for the runs of all its students, scored on the sets, and
            from the cache, that it names now. All but the first are also held against the first.
        which: weights that are scored, `best` or `last`; None: the best where a run keeps them.
        overrides: `KEY=VALUE` of every `--set`, for the config files among `runs`.

    Returns:
        For each run's folder, for each set: the scores, shares between 0 and 1. docs/scores.md says what each means.

    Raises:
        InputError: if a folder is no run, or its run has no such checkpoint.
        CacheError: if the cache it was trained from is gone or damaged.
    """
    memo = Memo()
    scores = {}
    for run, source in runs_to_score(runs, overrides):
        scores[str(run)] = _evaluate_run(run, source, which, memo)
        write_json(run / "evaluation.json", scores[str(run)])
    return scores


def _evaluate_run(run: Path, source: RunSource, which: Which | None, memo: Memo) -> dict[str, dict[str, Any]]:
    """The scores of a run on each of its sets."""
    cache = FeatureCache.open(source.cache)
    student, record = load_student(run, which)
    text = load_text_student(run, which=which)
    embedded: dict[str, EmbeddedSet] = {}
    sets = {
        name: ScoreInputs(run, name, one.images, one.settings, cache, embedded, text, memo, say)
        for name, one in source.sets.items()
    }
    for name, inputs in sets.items():
        labelled_set(cache, name)
        for score in scores_of(inputs.settings):
            score.load()
            if score.require is not None:
                load_function(score.require, ["inputs"])(inputs=inputs)
    heads = {}
    if text is not None:
        prompts = {name: cached_set_prompts(cache, name, one.settings.get("templates")) for name, one in sets.items()}
        heads = {name: text.class_head(of_set) for name, of_set in prompts.items()}
    _note_weights(run, record)
    changed: dict[str, dict[str, Any]] = {}
    for name, inputs in sets.items():
        say(f"embedding {name} with {run}")
        watch = watch_source(open_source(inputs.images), cache.evaluate[name].images, f"evaluate.{name}.images")
        with memory_errors_as(f"{run}: scoring does not fit into memory; end what else uses it and run this again"):
            item = embed_set(student, record, cache, name, watch.source)
        for line in [*watch.notes, *watch.last_lines(), *_unreadable(run, name, item)]:
            memo.once(("said", line), partial(say, line))  # of several runs on one set, once
        if found := watch.document():
            changed[name] = {CHANGED: found}
        embedded[name] = dataclasses.replace(item, student_head=heads.get(name))
    weights = {key: record[key] for key in ("weights", "step", "checkpoint")}
    scores = {
        name: {
            **_scores(inputs),
            **weights,
            "chosen_on": name == record["chosen_on"],
            **changed.get(name, {}),
        }
        for name, inputs in sets.items()
    }
    for name, item in embedded.items():
        write_predictions(run / "predictions" / f"{name}.parquet", zero_shot_predictions(item))
    return scores


def _scores(inputs: ScoreInputs) -> dict[str, Any]:
    """Every score that the set has, as JSON values."""
    found: dict[str, Any] = {}
    for score in scores_of(inputs.settings):
        result = score.load()(inputs=inputs)
        try:
            to_json(result)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{score.function}: its score of {inputs.name} is no JSON ({error}); wanted a dict of numbers (finite "
                "ones), texts, lists and dicts, or None"
            ) from error
        if result is None:
            continue
        if score.merged:
            found |= result
        elif score.from_outside:
            found.setdefault(FROM_OUTSIDE, {})[score.name] = result
        else:
            found[score.name] = result
    return found


def _unreadable(run: Path, name: str, embedded: EmbeddedSet) -> list[str]:
    """A line on images that count as wrong because nobody could read them."""
    rows = np.flatnonzero(~embedded.readable).tolist()
    if not rows:
        return []
    names = some_names([embedded.sources[row] for row in rows], f"null in {run / 'predictions' / name}.parquet")
    return [f"evaluate.{name}: {len(rows):,} images cannot be read and count as wrong: {names}"]


def _note_weights(run: Path, record: dict[str, Any]) -> None:
    step, total = record["step"], record["total_steps"]
    if record["checkpoint"] == "best":
        say(
            f"{run}: its best step on {record['chosen_on']}, {step:,} of {total:,}; --weights last scores the one that "
            "it stands at"
        )
    elif step < total:
        say(f"{run}: not finished, at step {step:,} of {total:,}")
