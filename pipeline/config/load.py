"""The config file: one TOML document, refused whole, with the key's full name, before anything heavy loads."""

import difflib
import importlib.util
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from ...cache.errors import InputError
from ...stages.settings.base import Settings
from ...stages.settings.cache import CacheSettings, PairsSettings
from ...stages.settings.data import EvaluateSettings, ImagesSettings, SentencesSettings
from ...stages.settings.distill import DistillSettings
from ...stages.settings.models import StudentSettings, TeacherSettings

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Config(Settings):
    """Everything a run is made of; paths are absolute."""

    teacher: TeacherSettings
    images: ImagesSettings
    sentences: SentencesSettings
    cache: CacheSettings
    pairs: PairsSettings = PairsSettings()
    student: dict[str, StudentSettings] = Field(default_factory=dict)
    distill: DistillSettings = DistillSettings()
    evaluate: dict[str, EvaluateSettings] = Field(default_factory=dict)
    _path: Path | None = PrivateAttr(default=None)

    @property
    def path(self) -> Path | None:
        """The file that it was read from."""
        return self._path

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


def load_config(path: Path) -> Config:
    """Read and check a config file.

    Raises:
        InputError: one line that names the file and the key: what was found and what was wanted.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such config file; `dimefm demo DIR` writes one to start from") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: a folder; wanted a TOML file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; wanted a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error)}") from error
    config = _with_absolute_paths(config, path.resolve().parent)
    config._path = path.resolve()
    _check_evaluate_on(config, path)
    _check_architectures(config, path)
    return config


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    # A model inside a union adds its type's name to the location; keys are what the user wrote.
    key = ".".join(str(part) for part in first["loc"] if not re.search(r"[\[\(]|^(float|int|literal)$", str(part)))
    if first["type"] == "extra_forbidden":
        text = f"{key}: no such key{_suggestion(first['loc'])}"
    elif first["type"] == "missing":
        text = f"{key}: missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        shown = repr(first["input"])
        text = f"{key}: {message}" + (f" (found {shown})" if len(shown) <= 60 else "")
    more = len({p["loc"] for p in problems}) - 1
    return text + (f"; and {more} more" if more else "")


def _suggestion(location: tuple[int | str, ...]) -> str:
    model: Any = Config
    for part in location[:-1]:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        arguments = getattr(annotation, "__args__", ())
        candidates = [annotation, *arguments]
        model = next((c for c in candidates if hasattr(c, "model_fields")), model)
    close = difflib.get_close_matches(str(location[-1]), getattr(model, "model_fields", {}), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _with_absolute_paths(config: Config, folder: Path) -> Config:
    """Relative paths start at the config's own folder."""

    def under(path: Path) -> Path:
        return Path(os.path.normpath(folder / path.expanduser()))

    def images(location: Path | str) -> Path | str:
        return under(location) if isinstance(location, Path) else location

    def templates(spec: str) -> str:
        return spec if spec == "openai" else str(under(Path(spec)))

    teacher = config.teacher
    model, pretrained = teacher.model, teacher.pretrained
    if model.endswith(".json"):
        model = str(under(Path(model)))
    if model.startswith("local-dir:"):
        model = f"local-dir:{under(Path(model.removeprefix('local-dir:')))}"
    if (
        pretrained
        and not pretrained.startswith("hf-hub:")
        and ("/" in pretrained or pretrained.endswith(WEIGHT_SUFFIXES))
    ):
        pretrained = str(under(Path(pretrained)))
    prompts = config.sentences.prompts
    if prompts:
        prompts = prompts.model_copy(
            update={"classes": under(prompts.classes), "templates": templates(prompts.templates)}
        )
    sources = [under(source) for source in config.sentences.source]
    evaluate = {
        name: item.model_copy(
            update={
                "images": images(item.images),
                "classes": under(item.classes),
                "templates": templates(item.templates),
                "captions": item.captions and under(item.captions),
            }
        )
        for name, item in config.evaluate.items()
    }
    return config.model_copy(
        update={
            "teacher": teacher.model_copy(update={"model": model, "pretrained": pretrained}),
            "images": config.images.model_copy(update={"source": images(config.images.source)}),
            "sentences": config.sentences.model_copy(update={"source": sources, "prompts": prompts}),
            "cache": config.cache.model_copy(
                update={"dir": under(config.cache.dir), "rows": config.cache.rows and under(config.cache.rows)}
            ),
            "distill": config.distill.model_copy(update={"output": under(config.distill.output)}),
            "student": {name: _student(item, under) for name, item in config.student.items()},
            "evaluate": evaluate,
        }
    )


def _student(student: StudentSettings, under: Callable[[Path], Path]) -> StudentSettings:
    model, init = student.model, student.init
    kind, _, rest = model.partition(":")
    if kind == "open_clip" and rest.endswith(".json"):
        model = f"open_clip:{under(Path(rest))}"
    if init is not None and init.startswith("run:"):
        init = f"run:{under(Path(init.removeprefix('run:')))}"
    elif init is not None and init != "pretrained" and not init.startswith("open_clip:"):
        init = str(under(Path(init)))
    text = str(under(Path(student.text))) if student.text.endswith(".json") else student.text
    return student.model_copy(update={"model": model, "init": init, "text": text})


def _check_evaluate_on(config: Config, path: Path) -> None:
    name = config.distill.evaluate_on
    if config.distill.evaluate_every and name not in config.evaluate:
        there = ", ".join(sorted(config.evaluate)) or "none"
        raise InputError(
            f"{path}: distill.evaluate_on = {name!r}: no such set, there is {there}; name one of [evaluate.*] "
            "or leave out distill.evaluate_every"
        )


def _check_architectures(config: Config, path: Path) -> None:
    """Names of open_clip architectures, against the files beside its code: importing it would load torch."""
    wanted = [] if config.teacher.is_from_outside else [("teacher.model", config.teacher.model)]
    wanted += [
        (f"student.{name}.model", student.model.removeprefix("open_clip:"))
        for name, student in config.student.items()
        if student.model.startswith("open_clip:")
    ]
    wanted += [
        (f"student.{name}.text", student.own_text) for name, student in config.student.items() if student.own_text
    ]
    known = _open_clip_architectures()
    for key, name in wanted:
        if name.startswith(("hf-hub:", "local-dir:")) or name.endswith(".json"):
            continue
        if name.replace("/", "-") not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; open_clip.list_models() names them"
            raise InputError(f"{path}: {key}: open_clip has no architecture {name!r}{hint}")


def _open_clip_architectures() -> set[str]:
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec else None
    return {file.stem for folder in folders or [] for file in Path(folder, "model_configs").glob("*.json")}
