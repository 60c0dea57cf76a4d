"""Which config made a cache: noted when stage one starts, so that the commands on a cache find teacher and sources."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...cache.disk.durable import make_folder, write_json
from ...cache.disk.layout import Layout
from ...cache.errors import InputError
from .load import Config, load_config


@dataclass(frozen=True)
class ConfigChoice:
    """The config that a command on a cache was given.

    Attributes:
        path: `--config`; None: the one that the cache remembers, with what `--set` changed of it then.
        overrides: `KEY=VALUE` of every `--set`.
    """

    path: Path | None = None
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, cache: Path, path: Path | None, overrides: Sequence[str] | None) -> "ConfigChoice":
        """The options of a command on a cache.

        Raises:
            InputError: if there are overrides that do not fit the config. A command that can do without a config would
                take them for one that is not at hand.
        """
        choice = cls(path, tuple(overrides or ()))
        if overrides:
            config_of(Layout(cache), choice)
        return choice


def note_config(config: Config, layout: Layout) -> None:
    """Note where a run's config is, and what `--set` changed. A hint and no part of the cache: both may change."""
    if config.path is not None and _noted(layout) != ConfigChoice(config.path, config.overrides):
        path, overrides = _note(layout), list(config.overrides)
        make_folder(path.parent)
        write_json(path, {"config": str(config.path), **({"set": overrides} if overrides else {})})


def config_of(layout: Layout, given: ConfigChoice | Path | None = None) -> Config:
    """The config of a cache, for this folder: the one that is given, or else the one that was noted.

    Raises:
        InputError: if there is none, or it is not a config.
    """
    choice = given if isinstance(given, ConfigChoice) else ConfigChoice(given)
    path, overrides = choice.path, choice.overrides
    if path is None:
        noted = _noted(layout)
        if noted.path is None:
            raise InputError(f"{layout.root}: does not say which config made it; give --config CONFIG")
        if not noted.path.exists():
            raise InputError(f"{layout.root}: was made with {noted.path}, which is gone; give --config CONFIG")
        path, overrides = noted.path, (*noted.overrides, *overrides)
    config = load_config(path, overrides)
    # A folder that was moved is still that cache.
    return config.model_copy(update={"cache": config.cache.model_copy(update={"dir": layout.root.resolve()})})


def _note(layout: Layout) -> Path:
    return layout.root / "log" / "config.json"


def _noted(layout: Layout) -> ConfigChoice:
    try:
        note = json.loads(_note(layout).read_bytes())
        return ConfigChoice(Path(note["config"]), tuple(map(str, note.get("set", ()))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ConfigChoice()
