"""Class files, templates and the prompts they make."""

import json
from pathlib import Path

import pytest

from dimefm.cache import InputError
from dimefm.stages.inputs.prompts import (
    class_names,
    class_prompts,
    prompt_lines,
    prompts_for,
    read_classes,
    read_templates,
)
from dimefm.stages.settings.data import PromptSettings


def test_classes_come_sorted_by_id_with_their_names_in_order(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text('{"n2": ["tench", "Tinca tinca"], "n1": ["goldfish"]}')
    classes = read_classes(path)
    assert list(classes.items()) == [("n1", ["goldfish"]), ("n2", ["tench", "Tinca tinca"])]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no classes"),
        ("{}", "no classes"),
        ('{"a": ["x"], "a": ["y"]}', "class id 'a' is there twice"),
        ('{"a": []}', "class 'a': found \\[\\]; wanted a list of names"),
        ('{"a": "x"}', "class 'a': found 'x'; wanted a list of names"),
        ('{"a": ["x", " "]}', "class 'a': the name ' ' is no text"),
        ('{"a": [1]}', "class 'a': the name 1 is no text"),
        ('{"a/b": ["x"]}', "class id 'a/b' cannot be the name of a folder"),
        ('{"..": ["x"]}', "class id '..' cannot be the name of a folder"),
    ],
)
def test_anything_but_ids_with_names_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    with pytest.raises(InputError, match=f"classes.json: {words}"):
        read_classes(path)


def test_a_missing_class_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_classes(tmp_path / "none.json")


def test_openai_stands_for_open_clips_80_templates() -> None:
    templates = read_templates("openai")
    assert (len(templates), templates[0]) == (80, "a bad photo of a {}.")
    assert all(template.count("{}") == 1 for template in templates)


def test_templates_of_a_file_may_have_other_braces_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\ufeffa photo of {}.\r\n\n{} {not a slot}\n", encoding="utf-8", newline="")
    templates = read_templates(str(tmp_path / "t.txt"))
    assert prompts_for(["a {b}"], templates) == ["a photo of a {b}.", "a {b} {not a slot}"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a photo of {}\na photo\n", "line 2 has no {} for the name: 'a photo'"),
        (b"\n", "no templates"),
        (b"caf\xe9 {}\n", "not UTF-8"),
    ],
)
def test_a_template_file_without_slots_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_templates(str(path))


def test_a_missing_template_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wanted 'openai' or a file with one template a line"):
        read_templates(str(tmp_path / "open ai"))


def test_prompts_are_every_name_in_every_template() -> None:
    assert prompts_for(["cat", "dog"], ["a {}", "{}!"]) == ["a cat", "cat!", "a dog", "dog!"]


@pytest.mark.parametrize(("names", "of_bee"), [("first", ["bee"]), ("all", ["bee", "Apis"])])
def test_class_prompts_use_the_first_name_or_all_in_the_order_of_class_ids(tmp_path: Path, names, of_bee) -> None:
    (tmp_path / "classes.json").write_text('{"b": ["bee", "Apis"], "a": ["ant"]}')
    (tmp_path / "t.txt").write_text("a {}\n")
    settings = PromptSettings(classes=tmp_path / "classes.json", templates=str(tmp_path / "t.txt"), names=names)
    assert class_names(settings) == {"a": ["ant"], "b": of_bee}
    assert class_prompts(settings) == [["a ant"], [f"a {name}" for name in of_bee]]
    assert prompt_lines(settings) == ["a ant", *(f"a {name}" for name in of_bee)]


def test_a_class_file_may_start_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({"a": ["ä"]}, ensure_ascii=False), encoding="utf-8-sig")
    assert read_classes(path) == {"a": ["ä"]}
