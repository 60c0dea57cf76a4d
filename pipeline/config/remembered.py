"""Which config made a cache: noted when stage one starts, so that the commands on a cache find teacher and sources."""

import json
from pathlib import Path

from ...cache.disk.durable import make_folder, write_json
from ...cache.disk.layout import Layout
from ...cache.errors import InputError
from .load import Config, load_config


def note_config(config: Config, layout: Layout) -> None:
    """Note where a run's config is. It may move or change later: this is a hint and no part of the cache."""
    if config.path is None:
        return
    path, document = _note(layout), {"config": str(config.path)}
    if _noted(layout) != config.path:
        make_folder(path.parent)
        write_json(path, document)


def config_of(layout: Layout, given: Path | None) -> Config:
    """The config of a cache, for this folder: `given`, or else the one that was noted.

    Raises:
        InputError: if there is none, or it is not a config.
    """
    path = given or _noted(layout)
    if path is None:
        raise InputError(f"{layout.root}: does not say which config made it; give --config CONFIG")
    if given is None and not path.exists():
        raise InputError(f"{layout.root}: was made with {path}, which is gone; give --config CONFIG")
    config = load_config(path)
    # A folder that was moved is still that cache.
    return config.model_copy(update={"cache": config.cache.model_copy(update={"dir": layout.root.resolve()})})


def _note(layout: Layout) -> Path:
    return layout.root / "log" / "config.json"


def _noted(layout: Layout) -> Path | None:
    try:
        return Path(json.loads(_note(layout).read_bytes())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
