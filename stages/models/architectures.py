"""open_clip's model configs: its own by name, or a file of the user's."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip

from ...cache.errors import InputError


def model_config(name: str, tower: str, shown: str) -> dict[str, Any]:
    """A model config that describes one of the towers.

    Args:
        name: an open_clip architecture, or the path of a model config (.json).
        tower: key of the tower that is wanted: `vision_cfg` or `text_cfg`.
        shown: what messages call it.

    Raises:
        InputError: if there is no such architecture, or the file is none.
    """
    config = _from_file(name, shown) if name.endswith(".json") else _by_name(name, shown)
    if not isinstance(config, dict) or not isinstance(config.get(tower), dict):
        raise InputError(f"{shown}: no {tower} in it; wanted an open_clip model config")
    return config


def close_to(name: str, names: Sequence[str]) -> str:
    """The end of a message about a name that does not exist: those that it may have been meant for."""
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _by_name(name: str, shown: str) -> Any:
    names = open_clip.list_models()
    if name.replace("/", "-") not in names:
        raise InputError(f"{shown}: no such architecture{close_to(name, names)}")
    return open_clip.get_model_config(name.replace("/", "-"))


def _from_file(path: str, shown: str) -> Any:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{shown}: not a readable model config ({error})") from error
    return document.get("model_cfg", document) if isinstance(document, dict) else None
