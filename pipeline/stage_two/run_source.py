"""Where a run's cache and labelled images are: source.json, beside the run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cache.errors import InputError
from ..config.load import Config, load_config
from ..progress import say

SOURCE = "source.json"
"""In a run's folder: where its cache and the labelled images are, for `evaluate`."""


def source_document(config: Config) -> dict[str, object]:
    """What `source.json` says."""
    return {
        "cache": str(config.cache.dir),
        "evaluate": {name: str(settings.images) for name, settings in config.evaluate.items()},
        "templates": {name: settings.templates for name, settings in config.evaluate.items()},
        "probes": {name: settings.probe for name, settings in config.evaluate.items() if settings.probe},
        "captions": {name: str(settings.captions) for name, settings in config.evaluate.items() if settings.captions},
    }


def runs_to_score(runs: list[Path], overrides: Sequence[str] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Each run, and where its cache and the labelled images are.

    Args:
        runs: folders, or config files for the runs of their students.
        overrides: `KEY=VALUE` of every `--set`, for the config files.
    """
    found = []
    if overrides and not any(run.suffix == ".toml" for run in runs):
        raise InputError(f"--set {overrides[0]}: changes a config, and only folders of runs are given; name the config")
    for run in runs:
        if run.suffix == ".toml":
            config = load_config(run, overrides)
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
        optional = {
            key: dict(source.get(key, {})) for key in ("probes", "captions", "templates")
        }  # older runs do not say
        return {"cache": Path(source["cache"]), "evaluate": dict(source["evaluate"]), **optional}
    except FileNotFoundError as error:
        raise InputError(
            f"{run}: not a run of dimefm (no {SOURCE}); wanted a folder that `dimefm distill` made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{run / SOURCE}: does not say where the cache and the labelled images are ({error!r}); run "
            "`dimefm distill` again to rewrite it"
        ) from error
