"""Lines of text files as rows."""

import codecs
from pathlib import Path

import pytest

from dimefm.cache import InputError
from dimefm.stages.inputs.sentences import MAX_LINE_BYTES, read_sentences


def texts(path: Path, data: bytes) -> list[str]:
    path.write_bytes(data)
    return [sentence.text for sentence in read_sentences([path])]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"a\rb\n", ["a\rb"]),
        ("a\u2028b\u0085c\x0bd\x1ce\n".encode(), ["a\u2028b\u0085c\x0bd\x1ce"]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ["one", "\ufefftwo"]),
        (b" two  spaces \n", [" two  spaces "]),
        (b"nul \x00 inside\n", ["nul \x00 inside"]),
    ],
    ids=["empty", "newline", "no newline at the end", "crlf", "cr", "other separators", "bom", "spaces", "nul"],
)
def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path, data: bytes, expected: list[str]) -> None:
    assert texts(tmp_path / "lines.txt", data) == expected


def test_lines_without_a_sentence_stay_and_say_why(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"good\n\n \t\r\ncaf\xe9\nlast\n")
    assert [(sentence.text, sentence.problem) for sentence in read_sentences([path])] == [
        ("good", None),
        ("", "blank"),
        (" \t", "blank"),
        ("caf\\xe9", "not UTF-8"),
        ("last", None),
    ]


def test_an_overlong_line_is_one_row_and_does_not_hide_the_next(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    fits, too_long = b"x" * MAX_LINE_BYTES, b"y" * (3 * MAX_LINE_BYTES)
    path.write_bytes(fits + b"\n" + too_long + b"\nnext\n" + too_long)
    found = list(read_sentences([path]))
    assert [sentence.problem for sentence in found] == [
        None,
        "longer than 65536 bytes",
        None,
        "longer than 65536 bytes",
    ]
    assert (len(found[0].text), found[2].text) == (MAX_LINE_BYTES, "next")
    assert len(found[1].text) < 100


def test_files_follow_each_other_and_name_their_lines(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_bytes(b"a\nb")
    second.write_bytes(b"c\n")
    found = [(sentence.text, sentence.origin) for sentence in read_sentences([first, second])]
    assert found == [("a", "first.txt"), ("b", "first.txt"), ("c", "second.txt")]


def test_a_byte_order_mark_and_an_overlong_line_cost_no_other_line(tmp_path: Path) -> None:
    found = texts(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n" + b"z" * (2 * MAX_LINE_BYTES) + b"\n\nend")
    assert found == ["one", "z" * 80, "", "end"]


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("order", ["LE", "BE"])
def test_utf16_and_utf32_are_refused_with_the_way_to_convert(tmp_path: Path, encoding: str, order: str) -> None:
    mark = getattr(codecs, f"BOM_{encoding.replace('-', '')}_{order}")
    with pytest.raises(InputError, match=f"encoded as {encoding}; wanted UTF-8, for example by iconv -f {encoding}"):
        texts(tmp_path / "lines.txt", mark + "hello\n".encode(f"{encoding}-{order}"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        list(read_sentences([tmp_path / "none.txt"]))
    with pytest.raises(InputError, match="not a file"):
        list(read_sentences([tmp_path]))


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "good.txt"
    path.write_bytes(b"first\nsecond\n")
    assert next(iter(read_sentences([path, tmp_path / "missing.txt"]))).text == "first"
