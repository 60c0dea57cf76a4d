"""`--set KEY=VALUE` is the config file with that key edited: same result, same refusals, same records."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dimefm.cache.disk.layout import Layout
from dimefm.cache.errors import InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.config.overrides import Override
from dimefm.pipeline.config.remembered import ConfigChoice, config_of, note_config

from .test_load import EVERY_PATH, write

OTHER_VALUES = {str: ["other", "a b", "", "x.json"], bool: [True, False], int: [3, -1], float: [0.5, 2.0]}


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def keys_of(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in table.items():
        yield (*path, name), value
        if isinstance(value, dict):
            yield from keys_of(value, (*path, name))


def outcome(folder: Path, document: dict[str, Any], *overrides: str) -> Any:
    """The config, or the problem that it was refused with."""
    path = folder / "run.toml"
    path.write_text("".join(f"{json.dumps(name)} = {toml(value)}\n" for name, value in document.items()))
    try:
        return load_config(path, overrides).model_dump(mode="json")
    except InputError as error:
        return str(error).removeprefix(str(path)).removeprefix("".join(f" with --set {text}" for text in overrides))


DOCUMENT = tomllib.loads(EVERY_PATH)


@pytest.mark.parametrize("key", [key for key, _ in keys_of(DOCUMENT)], ids=".".join)
def test_an_override_is_the_file_with_that_key_edited(tmp_path, key):
    table = DOCUMENT
    for name in key:
        table = table[name]
    values = [*OTHER_VALUES.get(type(table), []), {"nothing": 1}, [1], table]
    for value in values:
        edited = tomllib.loads(EVERY_PATH)
        inner = edited
        for name in key[:-1]:
            inner = inner[name]
        inner[key[-1]] = value
        change = f"{'.'.join(map(json.dumps, key))}={toml(value)}"
        assert outcome(tmp_path, DOCUMENT, change) == outcome(tmp_path, edited), change


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("distill.epochs=3", ("distill", "epochs"), 3),
        (" distill . lr = 3e-3 ", ("distill", "lr"), 3e-3),
        ("images.hash=true", ("images", "hash"), True),
        ("distill.augment.scale=[0.5, 1]", ("distill", "augment", "scale"), [0.5, 1]),
        ("distill.loss={vl = 1, pvl = 0.5}", ("distill", "loss"), {"vl": 1, "pvl": 0.5}),
        ('images.mask="3"', ("images", "mask"), "3"),
        ("images.mask='a=b'", ("images", "mask"), "a=b"),
        ("teacher.pretrained=laion2b_s34b_b79k", ("teacher", "pretrained"), "laion2b_s34b_b79k"),
        ("images.source=../my photos", ("images", "source"), "../my photos"),
        ("student.a.init=run:runs/b=c", ("student", "a", "init"), "run:runs/b=c"),
        ("teacher.pretrained=", ("teacher", "pretrained"), ""),
        ('evaluate."a.b".images=x', ("evaluate", "a.b", "images"), "x"),
        ("evaluate.'a=b'.images=x", ("evaluate", "a=b", "images"), "x"),
        (r'evaluate."\u00e9\"".images=x', ("evaluate", 'é"', "images"), "x"),
        ('distill.loss."pkg.mod:fn".weight=1', ("distill", "loss", "pkg.mod:fn", "weight"), 1),
        ("images.mask=1\nhash = true", ("images", "mask"), "1\nhash = true"),  # one key, never two
        ("images.mask=[1", ("images", "mask"), "[1"),
    ],
)
def test_a_value_is_toml_or_else_text_and_a_key_is_as_in_toml(text, key, value):
    change = Override.parse(text)
    assert (change.key, change.value) == (key, value) and type(change.value) is type(value)


@pytest.mark.parametrize("text", ["", "epochs", "=3", "a..b=3", "a b=3", 'a."b=3', r'"\q"=3', "a.=3", "é=1"])
def test_what_has_no_key_or_no_value_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"--set .*wanted KEY=VALUE, such as distill\.epochs=3"):
        load_config(write(tmp_path, EVERY_PATH), [text])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("distill.epoch=3", "distill.epoch: no such key; did you mean epochs"),
        ("distill.epochs=many", "distill.epochs: Input should be a valid number"),
        ("distil.epochs=3", "distil: no such key; did you mean distill"),
        ("distill.loss.vl=-1", "distill.loss.vl: Input should be greater"),
        ("distill={epoch = 3}", "distill.epoch: no such key"),
        ("teacher.model=ViT-B-23", "teacher.model: open_clip has no architecture 'ViT-B-23'"),
        ("teacher.model.x=1", "teacher.model: Input should be a valid string"),
        ("distill.evaluate_on=none", "distill.evaluate_on: 'none': no such set"),
        ('evaluate."new.one".images=x', 'evaluate."new.one".classes: missing'),
        ("distill.batch_sentences=1", "distill: pairs.per_image = 1"),
    ],
)
def test_a_wrong_override_is_refused_like_a_wrong_file_and_says_where_it_came_from(tmp_path, change, says):
    path = write(tmp_path, EVERY_PATH)
    with pytest.raises(InputError) as refusal:
        load_config(path, ["cache.shard_rows=1", change])
    message = str(refusal.value)
    assert message.startswith(f"{path} with --set {change}: {says}") and "\n" not in message


def test_an_override_is_not_blamed_for_what_the_file_says(tmp_path):
    path = write(tmp_path, EVERY_PATH.replace("[cache]", "[cache]\nshard_row = 1"))
    with pytest.raises(InputError) as refusal:
        load_config(path, ["distill.seed=1"])
    assert str(refusal.value).startswith(f"{path}: cache.shard_row: no such key")


def test_the_last_override_of_a_key_holds_and_all_of_them_are_known(tmp_path):
    changes = ["distill.seed=1", "distill.seed=2", "cache.dir=elsewhere"]
    config = load_config(write(tmp_path, EVERY_PATH), changes)
    assert config.distill.seed == 2 and config.overrides == tuple(changes)
    assert config.cache.dir == tmp_path / "elsewhere"  # relative to the file, not to the working directory


def test_a_cache_remembers_what_was_set_beside_the_config(tmp_path):
    path, layout = write(tmp_path, EVERY_PATH), Layout(tmp_path / "cache")
    note = layout.root / "log" / "config.json"
    note_config(load_config(path), layout)
    assert json.loads(note.read_bytes()) == {"config": str(path)}
    note_config(load_config(path, ["distill.seed=1", "cache.shard_rows=5"]), layout)
    assert json.loads(note.read_bytes()) == {"config": str(path), "set": ["distill.seed=1", "cache.shard_rows=5"]}
    remembered = config_of(layout, ConfigChoice(None, ("distill.seed=2",)))
    assert (remembered.distill.seed, remembered.cache.shard_rows) == (2, 5)
    assert remembered.overrides == ("distill.seed=1", "cache.shard_rows=5", "distill.seed=2")
    given = config_of(layout, path)  # a config that is given stands for itself
    assert given.overrides == () and given.cache.shard_rows == 8192


def test_a_command_refuses_a_wrong_override_in_one_line_before_torch_loads(tmp_path):
    path = write(tmp_path, EVERY_PATH)
    program = (
        "import sys; from dimefm.cli import main\n"
        f"sys.argv = ['dimefm', 'cache-teacher', {str(path)!r}, '--set', 'distill.epoch=3']\n"
        "try: main()\n"
        "except SystemExit as leave: assert leave.code == 1, leave.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"error: {path} with --set distill.epoch=3: distill.epoch: no such key")
    assert done.stderr.count("\n") == 1
