"""The config file: one TOML document, refused whole, with the key's full name, before anything heavy loads."""

import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from ...cache.disk.text_files import parse_file
from ...cache.errors import InputError, did_you_mean
from ...stages.settings.base import Settings
from ...stages.settings.cache import CacheSettings, PairsSettings
from ...stages.settings.cluster import ClusterSettings
from ...stages.settings.data import EvaluateSettings, ImagesSettings, SentencesSettings
from ...stages.settings.distill import DistillSettings
from ...stages.settings.models import TEACHERS, StudentSettings, TeacherSettings
from .overrides import Override

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")

_MISSING = "missing"

Key = tuple[str, ...]
"""Names of the tables that a key stands in and, last, its own."""


class Config(Settings):
    """Everything a run is made of; the paths of one that was loaded are absolute."""

    teacher: TeacherSettings
    images: ImagesSettings
    sentences: SentencesSettings
    cache: CacheSettings
    cluster: Annotated[ClusterSettings, Field(default_factory=dict)]
    pairs: Annotated[PairsSettings, Field(default_factory=dict)]
    student: dict[str, StudentSettings] = Field(default_factory=dict)
    distill: Annotated[DistillSettings, Field(default_factory=dict)]
    evaluate: dict[str, EvaluateSettings] = Field(default_factory=dict)
    _path: Path | None = PrivateAttr(default=None)
    _overrides: tuple[str, ...] = PrivateAttr(default=())

    @property
    def path(self) -> Path | None:
        """The file that it was read from."""
        return self._path

    @property
    def overrides(self) -> tuple[str, ...]:
        """What `--set` has changed of the file, as `KEY=VALUE`."""
        return self._overrides

    @field_validator("student", "evaluate")
    @classmethod
    def _names_can_be_folders(cls, tables: dict[str, Any]) -> dict[str, Any]:
        for name in tables:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name {name!r} becomes a folder; wanted letters, digits, '_', '.' and '-'")
        return tables

    @field_validator("evaluate")
    @classmethod
    def _probes_name_other_sets(cls, sets: dict[str, EvaluateSettings]) -> dict[str, EvaluateSettings]:
        for name, item in sets.items():
            if item.probe is not None and item.probe not in sets:
                raise ValueError(f"{name}.probe = {item.probe!r}: no such set; there is {', '.join(sorted(sets))}")
            if item.probe == name:
                raise ValueError(f"{name}.probe = {name!r}: wanted another set than the one that is scored")
        return sets


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config file.

    Args:
        overrides: `KEY=VALUE` of every `--set`; the result is that of the file with these keys edited.

    Raises:
        InputError: one line that names the file and the key: what was found and what was wanted.
    """
    document = parse_file(path, tomllib.loads, "TOML", "a config; `dimefm demo DIR` writes one to start from")
    changes = [Override.parse(text) for text in overrides]
    for change in changes:
        change.apply(document)
    problem: tuple[Key, str] | None
    try:
        config = Config.model_validate(document, context={"folder": path.resolve().parent})
        problem = next(_unknown_names(config), None)
    except ValidationError as error:
        problem = _first_problem(error, document)
    if problem:
        key, text = problem
        given = "".join(f" with --set {change.text}" for change in changes if _concerns(change.key, key, text))
        shown = ".".join(name if _BARE_KEY.fullmatch(name) else json.dumps(name) for name in key)
        raise InputError(f"{path}{given}: {shown}: {text}")
    config._path, config._overrides = path.resolve(), tuple(overrides)
    return config


def _concerns(changed: Key, key: Key, text: str) -> bool:
    """Whether an override may be the cause of a problem: it changed the key, a table around it or a key in it."""
    if text == _MISSING:  # the override may have made the table
        key = key[:-1]
    return bool(key) and changed[: len(key)] == key[: len(changed)]


def _first_problem(error: ValidationError, document: dict[str, Any]) -> tuple[Key, str]:
    problems = error.errors(include_url=False)
    first = problems[0]
    key: list[str] = []
    found: Any = document
    for part in first["loc"]:  # a union adds names of its types to the location; keys are what the user wrote
        if part in (found if isinstance(found, dict) else range(len(found) if isinstance(found, list) else 0)):
            found = found[part]
        elif first["type"] != "missing":
            continue
        key.append(str(part))
    if first["type"] == "extra_forbidden":
        text = f"no such key{did_you_mean(key[-1], _keys_beside(first['loc']))}"
    elif first["type"] == "missing":
        text = _MISSING
    else:
        shown = repr(first["input"])
        text = first["msg"].removeprefix("Value error, ") + (f" (found {shown})" if len(shown) <= 60 else "")
    more = len({problem["loc"] for problem in problems}) - 1
    return tuple(key), text + (f"; and {more} more" if more else "")


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys that a table may have, for the location of one that it may not have."""
    model: Any = Config
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((item for item in candidates if hasattr(item, "model_fields")), model)
    return list(model.model_fields)


def _unknown_names(config: Config) -> Iterator[tuple[Key, str]]:
    """Keys that name what there is not: an evaluation set, an open_clip architecture."""
    name = config.distill.evaluate_on
    if config.distill.evaluate_every and name not in config.evaluate:
        there = ", ".join(sorted(config.evaluate)) or "none"
        advice = "name one of [evaluate.*] or leave out distill.evaluate_every"
        yield ("distill", "evaluate_on"), f"{name!r}: no such set, there is {there}; {advice}"
    wanted: dict[Key, str] = {} if config.teacher.is_from_outside else {("teacher", "model"): config.teacher.model}
    for student, settings in config.student.items():
        if settings.model.startswith("open_clip:"):
            wanted["student", student, "model"] = settings.model.removeprefix("open_clip:")
        if settings.own_text:
            wanted["student", student, "text"] = settings.own_text
    known = sorted(_open_clip_architectures())
    for key, name in wanted.items():
        is_elsewhere = name.partition(":")[0] in TEACHERS or name.endswith(".json")
        if not is_elsewhere and name.replace("/", "-") not in known:
            hint = did_you_mean(name, known) or "; open_clip.list_models() names them"
            yield key, f"open_clip has no architecture {name!r}{hint}"


def _open_clip_architectures() -> Iterator[str]:
    """Names of the files beside open_clip's code: importing it would load torch."""
    spec = importlib.util.find_spec("open_clip")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from (file.stem for file in Path(folder, "model_configs").glob("*.json"))
