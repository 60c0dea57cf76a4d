"""Sentences on disk: text files, one sentence a line, read as a stream."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...cache.disk.text_files import TO_UTF8, foreign_encoding
from ...cache.errors import InputError

MAX_LINE_BYTES = 65_536
"""Longer lines are no sentences, and a file without line ends must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """One line.

    Attributes:
        text: the line as it stands, without its line end; bytes that are not UTF-8 are shown as `\\xff`; of an
            overlong line, its beginning.
        origin: name of its file.
        problem: why it cannot be embedded, or None.
    """

    text: str
    origin: str
    problem: str | None = None


def read_sentences(paths: Sequence[Path]) -> Iterator[Sentence]:
    """Every line of some UTF-8 text files, one file after the other.

    Lines end at a newline and nowhere else; a carriage return before it and a byte order mark at the start of a file
    are no part of them. Blank, undecodable and overlong lines are kept, with their problem, since a line's number is
    its identity.

    Raises:
        InputError: if a file is missing, is no file, cannot be read, or says that it is UTF-16 or UTF-32.
    """
    for path in paths:
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"{path}: not a file; wanted a text file, one sentence a line")
            with path.open("rb") as file:
                yield from _read_file(path, file)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file; wanted a text file, one sentence a line") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _read_file(path: Path, file: BinaryIO) -> Iterator[Sentence]:
    is_first = True
    while line := file.readline(MAX_LINE_BYTES + 1):
        overlong = len(line) > MAX_LINE_BYTES and not line.endswith(b"\n")
        rest = line
        while overlong and rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        if is_first:
            line, is_first = _without_mark(path, line), False
        yield _sentence(line.removesuffix(b"\n").removesuffix(b"\r"), path.name, overlong)


def _without_mark(path: Path, line: bytes) -> bytes:
    if encoding := foreign_encoding(line):
        raise InputError(f"{path}: encoded as {encoding}; {TO_UTF8.format(encoding)}")
    return line.removeprefix(codecs.BOM_UTF8)


def _sentence(line: bytes, origin: str, overlong: bool) -> Sentence:
    if overlong:
        return Sentence(line[:80].decode(errors="backslashreplace"), origin, f"longer than {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Sentence(line.decode(errors="backslashreplace"), origin, "not UTF-8")
    return Sentence(text, origin, None if text.strip() else "blank")
