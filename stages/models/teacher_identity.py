"""What is known of a teacher before it is loaded. Imports no torch: a finished cache is recognised without it."""

import importlib.util
import json
from pathlib import Path

from ...cache.errors import InputError
from ..settings.models import TeacherSettings
from ..settings.plugins import require_function


def configured_identity(settings: TeacherSettings) -> dict[str, str | int | None]:
    """The part of a teacher's identity that its settings alone decide; of a file, its name, so that it may move.

    >>> configured_identity(TeacherSettings(model="ViT-B-32", pretrained="/data/b32.safetensors"))["pretrained"]
    'b32.safetensors'
    """
    return {
        "model": _name(settings.model),
        "pretrained": _name(settings.pretrained) if settings.pretrained else None,
        "precision": settings.precision,
        "batch_size": settings.batch_size,
    }


def _name(source: str) -> str:
    if source.startswith("local-dir:"):
        return f"local-dir:{Path(source.removeprefix('local-dir:')).name}"
    return Path(source).name if "/" in source and not source.startswith("hf-hub:") else source


def configured_embed_dim(settings: TeacherSettings) -> int | None:
    """Width of a teacher's embeddings by its model config; None where only a hub knows it, or a function.

    Raises:
        InputError: if there is no such model config, or no such function.
    """
    if settings.is_from_outside:
        require_function(settings.model, key="teacher.model")
        return None
    if settings.model.startswith("hf-hub:"):
        return None
    if settings.model.startswith("local-dir:"):
        path = Path(settings.model.removeprefix("local-dir:"), "open_clip_config.json")
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
