"""What is known of a teacher before it is loaded. Imports no torch: a finished cache is recognised without it."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...cache.errors import InputError
from ..settings.models import TEACHERS, TeacherSettings
from ..settings.plugins import require_function


def configured_identity(settings: TeacherSettings) -> dict[str, Any]:
    """The part of a teacher's identity that its settings alone decide; of a file, its name, so that it may move.

    Preprocessing and logit scale are in it only where they are set: else the weights decide.

    >>> configured_identity(TeacherSettings(model="ViT-B-32", pretrained="/data/b32.safetensors"))["pretrained"]
    'b32.safetensors'
    """
    identity: dict[str, Any] = {
        "model": _name(settings.model),
        "pretrained": _name(settings.pretrained) if settings.pretrained else None,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
    }
    if settings.preprocess is not None:
        identity["preprocess"] = settings.preprocess.given
    if settings.logit_scale is not None:
        identity["logit_scale"] = settings.logit_scale
    return identity


def recorded_identity(identity: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache's identity of its teacher says of the keys of a `configured_identity`."""
    found = {key: identity.get(key) for key in wanted}
    if "preprocess" in wanted:
        found["preprocess"] = {key: (found["preprocess"] or {}).get(key) for key in wanted["preprocess"]}
    return found


def _name(source: str) -> str:
    if source.startswith("local-dir:"):
        return f"local-dir:{Path(source.removeprefix('local-dir:')).name}"
    return Path(source).name if "/" in source and not source.startswith("hf-hub:") else source


def configured_embed_dim(settings: TeacherSettings) -> int | None:
    """Width of a teacher's embeddings by its model config; None where only the loaded model knows it.

    Raises:
        InputError: if there is no such model config, or no such function.
    """
    if settings.is_from_outside:
        require_function(settings.model, key="teacher.model")
        return None
    if settings.model.startswith("local-dir:"):
        path = Path(settings.model.removeprefix("local-dir:"), "open_clip_config.json")
    elif settings.model.partition(":")[0] in TEACHERS:
        return None
    elif settings.model.endswith(".json"):
        path = Path(settings.model)
    else:
        spec = importlib.util.find_spec("open_clip")
        assert spec and spec.submodule_search_locations
        name = settings.model.replace("/", "-")
        path = Path(spec.submodule_search_locations[0], "model_configs", f"{name}.json")
    try:
        document = json.loads(path.read_bytes())
        return int(document.get("model_cfg", document)["embed_dim"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"teacher.model: {path}: not an open_clip model config ({error})") from error
