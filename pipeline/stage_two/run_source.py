"""Where a run's cache and labelled images are, and which scores its sets have: source.json, beside the run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.disk.text_files import read_json
from ...cache.errors import InputError
from ...stages.score.scores import FROM_OUTSIDE, SCORES
from ..config.load import Config, load_config
from ..progress import say

SOURCE = "source.json"
"""In a run's folder: where its cache and the labelled images are, for `evaluate`."""
_SETTINGS = {
    "templates": "templates",
    **{score.recorded_as: score.setting for score in SCORES if score.setting},
    FROM_OUTSIDE: FROM_OUTSIDE,
}
"""Key of `source.json` -> the key of `[evaluate.NAME]` that it has for each set where it is set."""


@dataclass(frozen=True)
class LabelledSource:
    """A labelled set: where its images are, and its settings of `[evaluate.NAME]` by key."""

    images: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class RunSource:
    """What `source.json` says: the folder of the cache, and the sets by name."""

    cache: Path
    sets: dict[str, LabelledSource]


def source_document(config: Config) -> dict[str, Any]:
    """What `source.json` says."""
    sets = {name: settings.model_dump(mode="json") for name, settings in config.evaluate.items()}
    return {
        "cache": str(config.cache.dir),
        "evaluate": {name: settings["images"] for name, settings in sets.items()},
        **{key: {name: one[of] for name, one in sets.items() if one[of]} for key, of in _SETTINGS.items()},
    }


def runs_to_score(runs: list[Path], overrides: Sequence[str] = ()) -> list[tuple[Path, RunSource]]:
    """Each run, and its source: as its config says now, where a config stands for the runs of its students.

    Args:
        overrides: `KEY=VALUE` of every `--set`, for the config files.

    Raises:
        InputError: if a folder is no run, none of a config's students has one, or there are overrides and no config.
    """
    found = []
    if overrides and not any(run.suffix == ".toml" for run in runs):
        raise InputError(f"--set {overrides[0]}: changes a config, and only folders of runs are given; name the config")
    for run in runs:
        if run.suffix != ".toml":
            found.append((run, _read_source(run)))
            continue
        config = load_config(run, overrides)
        source = _parse(source_document(config))
        folders = {name: config.distill.output / name for name in config.student}
        if not any((folder / SOURCE).exists() for folder in folders.values()):
            raise InputError(f"{run}: none of its students ({', '.join(folders)}) has a run; `dimefm distill` first")
        for folder in folders.values():
            if (folder / SOURCE).exists():
                found.append((folder, source))
            else:
                say(f"{folder}: no run yet")
    return found


def _read_source(run: Path) -> RunSource:
    path = run / SOURCE
    if not path.exists():
        raise InputError(f"{run}: not a run of dimefm (no {SOURCE}); wanted a folder that `dimefm distill` made")
    wanted = "where the cache and the labelled images are; run `dimefm distill` again to rewrite it"
    document = read_json(path, wanted)
    try:
        return _parse(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {error!r}; wanted {wanted}") from error


def _parse(document: dict[str, Any]) -> RunSource:
    sets = {
        name: LabelledSource(
            str(images),
            {of: document[key][name] for key, of in _SETTINGS.items() if name in document.get(key, {})},
        )
        for name, images in document["evaluate"].items()
    }
    return RunSource(Path(document["cache"]), sets)
