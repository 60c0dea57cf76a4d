"""`dimefm evaluate`: scores of finished runs on every labelled set, without the teacher."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...cache.disk.durable import write_json
from ...cache.reader.feature_cache import FeatureCache
from ...stages.devices import memory_errors_as
from ...stages.models.text_student import TextStudent
from ...stages.run_folder.load_student import Which, load_student, load_text_student
from ...stages.score.captions import Captions, embed_captions, read_captions
from ...stages.score.embed_set import embed_set
from ...stages.score.embedded_set import EmbeddedSet
from ...stages.score.predictions import versus, write_predictions, zero_shot_predictions
from ...stages.score.probe import FittedProbes, probe_scores, require_same_classes
from ...stages.score.recall import recall_scores
from ...stages.score.zero_shot import zero_shot_scores
from ..progress import say
from .class_prompts import cached_set_prompts
from .run_source import runs_to_score
from .score_table import Scores

Predictions = dict[str, pa.Table]


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
    scores: Scores = {}
    texts, probes = _EmbeddedTexts(), FittedProbes()
    baseline: tuple[Path, Predictions] | None = None
    for run, source in runs_to_score(runs, overrides):
        cache = FeatureCache.open(source["cache"])
        _require_probes(cache, source["probes"])
        read = _captions(cache, source["captions"])
        student, record = load_student(run, which)
        own_text = load_text_student(run, which=which)
        heads = {} if own_text is None else _own_heads(own_text, cache, source)
        _tell_of_weights(run, record)
        embedded: dict[str, EmbeddedSet] = {}
        for name, folder in source["evaluate"].items():
            say(f"embedding {name} with {run}")
            with memory_errors_as(f"{run}: scoring does not fit into memory; end what else uses it and run this again"):
                item = embed_set(student, record, cache, name, Path(folder))
            embedded[name] = dataclasses.replace(item, student_head=heads.get(name))
        said = {key: record[key] for key in ("weights", "step", "checkpoint")}
        of_run = {
            name: {**zero_shot_scores(item), **said, "chosen_on": name == record["chosen_on"]}
            for name, item in embedded.items()
        }
        for name, fit_name in source["probes"].items():
            say(f"fitting probes on {fit_name}, for {name}")
            of_run[name]["probe"] = probe_scores(embedded[name], embedded[fit_name], name, fit_name, probes)
            _tell_of_duplicates(name, of_run[name]["probe"])
        for name, of_set in read.items():
            own = None if own_text is None else own_text.encode_sentences(of_set.texts)
            captions = texts.embed(cache, name, of_set)
            of_run[name]["retrieval"] = recall_scores(embedded[name], captions, of_set.image_of, own)
        predictions = {name: zero_shot_predictions(item) for name, item in embedded.items()}
        for name, table in predictions.items():
            write_predictions(run / "predictions" / f"{name}.parquet", table)
            compared = versus(table, baseline[1][name]) if baseline and name in baseline[1] else None
            if baseline and compared:
                of_run[name]["versus"] = {"run": str(baseline[0]), **compared}
        baseline = baseline or (run, predictions)
        scores[str(run)] = of_run
        write_json(run / "evaluation.json", of_run)
    return scores


def _require_probes(cache: FeatureCache, probes: dict[str, str]) -> None:
    """Refuse probes that cannot be fitted before anything is embedded; a set that is not there has an error later."""
    for name, fit_name in probes.items():
        if name in cache.evaluate and fit_name in cache.evaluate:
            sets = cache.evaluate[name], cache.evaluate[fit_name]
            require_same_classes(sets[0].class_ids, sets[1].class_ids, name, fit_name)


def _own_heads(text: TextStudent, cache: FeatureCache, source: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Class vectors by a student's own text tower; a set that is not there has an error later."""
    prompts = {
        name: cached_set_prompts(cache, name, source["templates"].get(name))
        for name in source["evaluate"]
        if name in cache.evaluate
    }
    return {name: text.class_head(of_set) for name, of_set in prompts.items()}


def _captions(cache: FeatureCache, files: dict[str, str]) -> dict[str, Captions]:
    """Captions of each set that has some, refused before anything is embedded."""
    there = {name: cache.evaluate[name].images for name in files if name in cache.evaluate}
    return {
        name: read_captions(Path(files[name]), images.rows.column("source").slice(0, len(images)).to_pylist(), name)
        for name, images in there.items()
    }


class _EmbeddedTexts:
    """Embeddings of captions, once for all runs of a cache."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, str, tuple[str, ...]], NDArray[np.float32]] = {}

    def embed(self, cache: FeatureCache, name: str, captions: Captions) -> NDArray[np.float32]:
        key = (cache.text_tower.resolve(), name, tuple(captions.texts))
        if key not in self._known:
            say(f"embedding {len(captions.texts):,} captions of {name}")
            self._known[key] = embed_captions(cache.text_tower, captions)
        return self._known[key]


def _tell_of_weights(run: Path, record: dict[str, Any]) -> None:
    step, total = record["step"], record["total_steps"]
    if record["checkpoint"] == "best":
        say(
            f"{run}: its best step on {record['chosen_on']}, {step:,} of {total:,}; --weights last scores the one that "
            "it stands at"
        )
    elif step < total:
        say(f"{run}: not finished, at step {step:,} of {total:,}")


def _tell_of_duplicates(name: str, probe: dict[str, Any]) -> None:
    if probe["near_duplicates"]:
        say(
            f"evaluate.{name}.probe: {probe['near_duplicates']:,} of its images are nearly in {probe['fitted_on']} too "
            "(teacher's cosine of 0.999 or more): neighbours and probe know their answers"
        )
