"""Class names and the templates that make prompts of them."""

import importlib.util
import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...cache.disk.text_files import parse_file, read_json
from ...cache.errors import InputError
from ..settings.data import EvaluateSettings, PromptSettings

SLOT = "{}"


def read_classes(path: Path) -> dict[str, list[str]]:
    """Read a JSON object, class id -> names, the usual name first.

    Returns:
        The names of each class, sorted by class id.

    Raises:
        InputError: if the file is missing or holds anything else: twice the same id, an id that cannot be a folder's
            name, a class without a name, a name that is blank.
    """
    try:
        document = read_json(path, "JSON, class id -> names", object_pairs_hook=_without_repeats)
    except KeyError as error:
        raise InputError(f"{path}: class id {error.args[0]!r} is there twice; wanted each once") from error
    if not isinstance(document, dict) or not document:
        raise InputError(f'{path}: no classes; wanted a JSON object such as {{"n01443537": ["goldfish"]}}')
    for class_id, names in document.items():
        if not class_id.strip() or "/" in class_id or class_id in (".", ".."):
            raise InputError(f"{path}: class id {class_id!r} cannot be the name of a folder")
        if not isinstance(names, list) or not names:
            raise InputError(f"{path}: class {class_id!r}: found {names!r}; wanted a list of names, at least one")
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"{path}: class {class_id!r}: the name {name!r} is no text")
    return dict(sorted(document.items()))


def read_templates(spec: str) -> list[str]:
    """Templates with `{}` for the name.

    Args:
        spec: `openai`, the 80 templates that open_clip scores ImageNet with, or the path of a text file with one
            template a line; blank lines are passed over.

    Raises:
        InputError: if the file is missing, is not UTF-8, has no template or has one without `{}`.
    """
    if spec == "openai":
        package = importlib.util.find_spec("open_clip")
        assert package and package.submodule_search_locations
        file = Path(package.submodule_search_locations[0], "zero_shot_metadata.py")
        templates = runpy.run_path(str(file))["OPENAI_IMAGENET_TEMPLATES"]  # importing the package would load torch
        return [str(template(SLOT)) for template in templates]
    path = Path(spec)
    lines = parse_file(path, lambda text: text.split("\n"), "UTF-8", "'openai' or a file with one template a line")
    templates = []
    for number, line in enumerate(lines, start=1):
        if SLOT in line:
            templates.append(line.strip())
        elif line.strip():
            raise InputError(f"{path}: line {number} has no {SLOT} for the name: {line.strip()[:60]!r}")
    if not templates:
        raise InputError(f"{path}: no templates; wanted one a line, {SLOT} for the name")
    return templates


def prompts_for(names: Iterable[str], templates: Sequence[str]) -> list[str]:
    """Every name in every template.

    >>> prompts_for(["goldfish"], ["a photo of a {}.", "many {}."])
    ['a photo of a goldfish.', 'many goldfish.']
    """
    return [template.replace(SLOT, name) for name in names for template in templates]


def class_names(settings: PromptSettings | EvaluateSettings) -> dict[str, list[str]]:
    """The names of each class that make its prompts, by sorted class id: the first one or all."""
    used = None if settings.names == "all" else 1
    return {class_id: names[:used] for class_id, names in read_classes(settings.classes).items()}


def class_prompts(settings: PromptSettings | EvaluateSettings) -> list[list[str]]:
    """The prompts of each class, in the order of the sorted class ids."""
    templates = read_templates(settings.templates)
    return [prompts_for(names, templates) for names in class_names(settings).values()]


def prompt_lines(settings: PromptSettings) -> list[str]:
    """The prompts of all classes, as they join the sentences."""
    return [prompt for of_class in class_prompts(settings) for prompt in of_class]


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON allows a key twice and Python keeps the last: half of a class list could vanish so. Raises KeyError."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found
