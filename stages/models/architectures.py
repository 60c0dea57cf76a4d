"""open_clip's model configs: its own by name, or a file, either bare or as an `open_clip_config.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip

from ...cache.disk.text_files import read_json
from ...cache.errors import InputError, did_you_mean


def model_config(name: str, keys: Sequence[str], shown: str) -> dict[str, Any]:
    """A model config by the name of an open_clip architecture, or by the path of a file (.json).

    Args:
        keys: what has to be in it, such as `vision_cfg` or `text_cfg`.
        shown: what messages call it.

    Raises:
        InputError: if there is no such architecture, or the file is no model config with these keys.
    """
    if name.endswith(".json"):
        return read_model_config(Path(name), keys, shown)[0]
    architecture, known = name.replace("/", "-"), open_clip.list_models()
    if architecture not in known:
        hint = did_you_mean(architecture, known) or "; open_clip.list_models() names them"
        raise InputError(f"{shown}: open_clip has no such architecture{hint}")
    return _require_keys(open_clip.get_model_config(architecture), keys, shown)


def read_model_config(path: Path, keys: Sequence[str], shown: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` of a file; the second is empty where there is none. Arguments as above."""
    document = read_json(path, "an open_clip model config", shown, parse_constant=_refuse_constant)
    document = document if isinstance(document, dict) else {}
    preprocess = document.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise InputError(f"{shown}: preprocess_cfg is no object; wanted open_clip's keys, such as mean and std")
    return _require_keys(document.get("model_cfg", document), keys, shown), preprocess


def _require_keys(config: Any, keys: Sequence[str], shown: str) -> dict[str, Any]:
    found = config if isinstance(config, dict) else {}
    missing = [key for key in keys if key not in found or (key.endswith("_cfg") and not isinstance(found[key], dict))]
    if missing:
        raise InputError(f"{shown}: no {' and no '.join(missing)} in it; wanted an open_clip model config")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
