"""The config: every shipped one loads, everything wrong is refused in one line with the key's full name."""

import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

import dimefm
from dimefm.cache.errors import InputError
from dimefm.pipeline.config.load import Config, load_config
from dimefm.stages.settings.base import FilePath, PathIn, Settings

ROOT = Path(dimefm.__file__).parent
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))

MINIMAL = """
[teacher]
model = "ViT-B-32"
pretrained = "openai"
[images]
source = "images/"
[sentences]
source = ["captions.txt"]
[cache]
dir = "cache"
"""


EVERY_PATH = """
[teacher]
model = "teacher/vit.json"
pretrained = "teacher/vit.pt"
[images]
source = "photos"
[sentences]
source = ["a.txt", "texts/b.txt"]
[sentences.prompts]
classes = "classes.json"
templates = "templates.txt"
[cache]
dir = "./cache"
rows = "../other/cache"
[student.a]
model = "open_clip:student.json"
text = "text.json"
init = "run:runs/b"
[student."b.c"]
model = "timm:x"
init = "weights/b.bin"
[distill]
output = "runs"
batch_sentences = 300
evaluate_every = 5
[distill.pairs]
per_image = 1
[evaluate.dev]
images = "dev/images"
classes = "dev/classes.json"
templates = "dev/templates.txt"
captions = "dev/captions.json"
"""
"""Each key that may be a path is one. Names are such that a relative path is not part of a value that is none."""


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return path


def refused(folder, text):
    with pytest.raises(InputError) as caught:
        load_config(write(folder, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert load_config(path).student


def test_some_configs_are_shipped():
    assert SHIPPED


def test_relative_paths_start_at_the_configs_own_folder(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    config = load_config(write(folder, EVERY_PATH))
    assert (config.teacher.model, config.teacher.pretrained) == (
        f"{folder}/teacher/vit.json",
        f"{folder}/teacher/vit.pt",
    )
    assert (config.cache.dir, config.cache.rows) == (folder / "cache", tmp_path / "other/cache")
    assert config.sentences.source == [folder / "a.txt", folder / "texts/b.txt"]
    student = config.student["a"]
    assert (student.model, student.text, student.init) == (
        f"open_clip:{folder}/student.json",
        f"{folder}/text.json",
        f"run:{folder}/runs/b",
    )
    assert config.student["b.c"].init == f"{folder}/weights/b.bin"
    assert (config.distill.output, config.images.source) == (folder / "runs", folder / "photos")


def test_a_default_that_is_a_path_starts_there_too(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert load_config(write(tmp_path, MINIMAL)).distill.output == tmp_path / "runs"


def test_no_path_depends_on_the_working_directory(tmp_path, monkeypatch):
    path = write(tmp_path, EVERY_PATH)
    monkeypatch.chdir(tmp_path)
    there = load_config(Path("run.toml")).model_dump(mode="json")
    monkeypatch.chdir("/")
    assert load_config(path).model_dump(mode="json") == there


def test_home_and_absolute_paths_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = EVERY_PATH.replace('"photos"', '"~/photos"').replace('"./cache"', '"/data/cache"')
    config = load_config(write(tmp_path, text.replace("teacher/vit.json", "local-dir:~/vit")))
    assert (config.images.source, config.cache.dir) == (Path("/home/someone/photos"), Path("/data/cache"))
    assert config.teacher.model == "local-dir:/home/someone/vit"
    assert "images.source: begins with" in refused(tmp_path, EVERY_PATH.replace('"photos"', '"~no-such-user/photos"'))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher.model", "hf-hub:org/name"),
        ("teacher.pretrained", "openai"),
        ("teacher.pretrained", "hf-hub:org/name"),
        ("sentences.prompts.templates", "openai"),
        ("student.a.model", "open_clip:ViT-B-32"),
        ("student.a.model", "package.module:function"),
        ("student.a.text", "ViT-B-32"),
        ("student.a.init", None),
        ("evaluate.dev.templates", "openai"),
    ],
)
def test_what_is_no_path_is_left_alone(tmp_path, key, value):
    text = EVERY_PATH.replace('init = "run:runs/b"\n', "")
    found = load_config(write(tmp_path, text), [f"{key}={value}"] if value else [])
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value


def fields_of(model: type[Settings], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field of a settings model and of the models inside it."""
    for name, field in model.model_fields.items():
        yield f"{path}{name}", field
        for inner in parts_of(field.annotation):
            if isinstance(inner, type) and issubclass(inner, Settings):
                yield from fields_of(inner, f"{path}{name}.")


def parts_of(annotation: object, metadata: tuple[object, ...] = ()) -> Iterator[object]:
    """The types that an annotation is made of; a `FilePath` as the name of that type."""
    if annotation is Path and metadata[: len(FilePath.__metadata__)] == FilePath.__metadata__:
        yield "FilePath"
    elif typing.get_origin(annotation) is typing.Annotated:
        inner, *more = typing.get_args(annotation)
        yield from parts_of(inner, (*more, *metadata))
    elif typing.get_args(annotation):
        for part in typing.get_args(annotation):
            yield from parts_of(part)
    else:
        yield annotation


FIELDS = dict(fields_of(Config))


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_is_a_path_that_is_not_resolved(name):
    field = FIELDS[name]
    full = typing.Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    # pydantic takes the first metadata of a field apart: `strict=False` becomes an object of its own
    resolves = any(isinstance(item, AfterValidator) and item in FilePath.__metadata__ for item in field.metadata)
    assert Path not in set(parts_of(full)) or (field.annotation is Path and resolves)


@pytest.mark.parametrize("name", FIELDS)
def test_a_default_table_with_paths_is_made_when_the_config_is_loaded(name):
    def has_paths(model: type[Settings]) -> bool:
        fields = dict(fields_of(model)).values()
        kinds = {part for field in fields for part in (*parts_of(field.annotation), *field.metadata)}
        return bool(kinds & {Path, "FilePath"}) or any(
            isinstance(item, AfterValidator) and isinstance(item.func, PathIn) for item in kinds
        )

    default = FIELDS[name].default
    assert not isinstance(default, Settings) or not has_paths(type(default))


def test_every_path_of_a_full_config_is_absolute_and_below_its_folder(tmp_path):
    folder = tmp_path / "deep" / "here"
    folder.mkdir(parents=True)
    named = {text for text in EVERY_PATH.split('"')[1::2] if "/" in text or "." in text or text in ("photos", "runs")}
    named -= {"b.c"}

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from strings(item)
        elif isinstance(value, str):
            yield value

    found = set(strings(load_config(write(folder, EVERY_PATH)).model_dump(mode="json")))
    for text in named:
        prefix, _, path = text.rpartition(":")
        assert f"{prefix}{':' if prefix else ''}{os.path.normpath(folder / path)}" in found, text
    assert not named & found


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    plain = load_config(write(tmp_path, EVERY_PATH))
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + EVERY_PATH.replace("\n", "\r\n").encode())
    assert load_config(path) == plain
    path.write_bytes(EVERY_PATH.encode("utf-16"))
    with pytest.raises(InputError, match="not TOML"):
        load_config(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"cache"', '"cache"\nshard_row = 5'), "cache.shard_row: no such key; did you mean shard_rows?"),
        (('"cache"', '"cache"\nshard_rows = 0'), "cache.shard_rows: Input should be greater than or equal to 1"),
        (('"cache"', '"cache"\nshard_rows = "many"'), "cache.shard_rows: Input should be a valid integer"),
        (("[cache]", '[teachers]\nmodel = "x"\n[cache]'), "teachers: no such key; did you mean teacher or"),
        (('dir = "cache"', ""), "cache.dir: missing"),
        (('pretrained = "openai"', 'precision = "fp8"'), "teacher.precision: Input should be 'fp32', 'fp16' or 'bf16'"),
        (
            ('"ViT-B-32"', '"ViT-B-23"'),
            "teacher.model: open_clip has no architecture 'ViT-B-23'; did you mean ViT-B-32",
        ),
        (
            ("[cache]", "[distill.loss]\nvl = -1.0\n[cache]"),
            "distill.loss.vl: Input should be greater than or equal to 0",
        ),
        (("[cache]", "[distill]\nclip_grad_norm = inf\n[cache]"), "distill.clip_grad_norm: Input should be a finite"),
        (("[cache]", "[distill.loss]\nvl = nan\n[cache]"), "distill.loss.vl: Input should be "),
        (("[cache]", "[distill.augment]\nratio = [1.0, inf]\n[cache]"), "distill.augment.ratio.1: Input should be "),
        (("[cache]", "[distill.loss]\nlogit_scale = 0.0\n[cache]"), "distill.loss.logit_scale: "),
        (("[cache]", "[distill.loss]\nfeature = 0.0\n[cache]"), "distill.loss: every loss is off"),
        (("[cache]", "[distill.augment]\nscale = [0.9, 0.1]\n[cache]"), "distill.augment: scale = [0.9, 0.1]"),
        (('pretrained = "openai"', 'device = "gpu"'), "teacher.device: "),
        (("[cache]", '[distill]\ndevice = "cuda:"\n[cache]'), "distill.device: "),
        (("[cache]", '[student.a]\nmodel = "resnet"\n[cache]'), "student.a.model: "),
        (("[cache]", '[student.a]\nmodel = "open_clip:ViT-B-33"\n[cache]'), "student.a.model: open_clip has no"),
        (("[cache]", '[student."../up"]\nmodel = "timm:x"\n[cache]'), "student: the name '../up' becomes a folder"),
        (("[cache]", "[cache"), "not TOML"),
    ],
)
def test_what_is_wrong_is_refused_with_the_keys_full_name(tmp_path, change, says):
    assert says in refused(tmp_path, MINIMAL.replace(*change))


def test_the_papers_augmentation_is_a_preset(tmp_path):
    config = load_config(write(tmp_path, MINIMAL + '[distill.augment]\npreset = "paper"\nflip = false\n'))
    assert config.distill.augment.scale == (0.08, 1.0)
    assert config.distill.augment.flip is False


def test_losses_that_are_not_named_are_on_by_default_and_off_beside_one_that_is(tmp_path):
    def loss(text: str) -> dict[str, float]:
        weights = load_config(write(tmp_path, MINIMAL + text)).distill.loss.model_dump()
        return {name: weight for name, weight in weights.items() if isinstance(weight, float) and weight}

    assert loss("") == loss("[distill]\nepochs = 1\n") == {"vl": 0.7, "pvl": 0.3, "icl": 1.0}
    assert loss("[distill.loss]\nvl = 1.0\n") == {"vl": 1.0}


def test_a_missing_file_and_a_folder_are_one_line_each(tmp_path):
    for path, says in ((tmp_path / "none.toml", "no such file; wanted a config"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=says):
            load_config(path)


def test_a_bad_config_is_refused_before_torch_loads(tmp_path):
    path = write(tmp_path, MINIMAL.replace('"ViT-B-32"', '"ViT-B-23"'))
    program = (
        "import sys; from dimefm.cli import main\n"
        f"sys.argv = ['dimefm', 'cache-teacher', {str(path)!r}]\n"
        "try: main()\n"
        "except SystemExit as leave: assert leave.code == 1, leave.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
