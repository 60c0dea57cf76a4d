"""`dimefm evaluate`: scores of finished runs on every labelled set, without the teacher."""

import json
from pathlib import Path
from typing import Any

from ..cache.durable import write_json
from ..cache.errors import InputError
from ..cache.feature_cache import FeatureCache
from ..stages.devices import memory_errors_as
from ..stages.zero_shot import evaluate_student, load_student
from .config import load_config
from .distill import SOURCE, source_document
from .progress import say

COLUMNS = (
    ("student top-1", "student_top1"),
    ("top-5", "student_top5"),
    ("teacher top-1", "teacher_top1"),
    ("top-5", "teacher_top5"),
    ("agreement", "agreement"),
    ("cosine", "cosine"),
)


def evaluate(runs: list[Path]) -> dict[str, dict[str, Any]]:
    """Score runs and write `evaluation.json` into each.

    Args:
        runs: folders of runs; a config file (.toml) stands for the runs of all its students, scored on the sets, and
            from the cache, that it names now.

    Returns:
        For each run's folder, for each set: the scores, shares between 0 and 1.

    Raises:
        InputError: if a folder is no run, or its run has no checkpoint.
        CacheError: if the cache it was trained from is gone or damaged.
    """
    scores: dict[str, dict[str, Any]] = {}
    for run, source in _runs(runs):
        cache = FeatureCache.open(source["cache"])
        student, record = load_student(run)
        if record["step"] < record["total_steps"]:
            say(f"{run}: not finished, at step {record['step']:,} of {record['total_steps']:,}")
        scores[str(run)] = {}
        for name, folder in source["evaluate"].items():
            say(f"scoring {run} on {name}")
            with memory_errors_as(f"{run}: scoring does not fit into memory; end what else uses it and run this again"):
                scores[str(run)][name] = evaluate_student(student, record, cache, name, Path(folder))
        write_json(run / "evaluation.json", scores[str(run)])
    return scores


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """The scores as a plain table, one line for each run and set; shares in per cent."""
    header = ["run", "set", "images", "unreadable", *(title for title, _ in COLUMNS)]
    rows = [
        [
            Path(run).name,
            name,
            f"{item['n']:,}",
            f"{item['unreadable']:,}",
            *(_shown(key, item[key]) for _, key in COLUMNS),
        ]
        for run, sets in scores.items()
        for name, item in sets.items()
    ]
    if not rows:
        return "no [evaluate.*] set in the config of these runs: nothing to score"
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows])


def _shown(key: str, value: float | None) -> str:
    if value is None:  # no image could be read
        return "-"
    return f"{value:.3f}" if key == "cosine" else f"{100 * value:.1f}"


def _runs(runs: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Each run, and where its cache and the labelled images are."""
    found = []
    for run in runs:
        if run.suffix == ".toml":
            config = load_config(run)
            runs_of = {name: config.distill.output / name for name in config.student}
            there = [folder for folder in runs_of.values() if (folder / SOURCE).exists()]
            if not there:
                raise InputError(
                    f"{run}: none of its students ({', '.join(runs_of)}) has a run; `dimefm distill` first"
                )
            for folder in runs_of.values():
                if folder not in there:
                    say(f"{folder}: no run yet")
            found += [(folder, {**_source(folder), **source_document(config)}) for folder in there]
        else:
            found.append((run, _source(run)))
    return found


def _source(run: Path) -> dict[str, Any]:
    try:
        source = dict(json.loads((run / SOURCE).read_bytes()))
        return {"cache": Path(source["cache"]), "evaluate": dict(source["evaluate"])}
    except FileNotFoundError as error:
        raise InputError(
            f"{run}: not a run of dimefm (no {SOURCE}); wanted a folder that `dimefm distill` made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{run / SOURCE}: does not say where the cache and the labelled images are ({error!r}); run "
            "`dimefm distill` again to rewrite it"
        ) from error
