"""Text files that a user wrote: UTF-8 with or without a byte order mark, whatever their line ends."""

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError

TO_UTF8 = "wanted UTF-8, for example by iconv -f {} -t UTF-8"
_FOREIGN_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_json(path: Path, wanted: str, shown: str | None = None, **options: Any) -> Any:
    """A JSON document: UTF-8, with or without a byte order mark.

    Args:
        wanted: what the file should hold, for messages.
        shown: how messages call the file; None shows its path.
        options: of `json.loads`.

    Raises:
        InputError: if it cannot be read or is not JSON.
    """
    return parse_file(path, lambda text: json.loads(text, **options), "JSON", wanted, shown)


def parse_file(path: Path, parse: Callable[[str], Any], kind: str, wanted: str, shown: str | None = None) -> Any:
    """Read a text file that a user wrote, UTF-8 with or without a byte order mark, whatever its line ends.

    Args:
        parse: raises ValueError for what is not of its kind.
        kind: what messages call the format: `TOML`.
        wanted: what messages say the file should be.
        shown: how messages call the file; None shows its path.

    Raises:
        InputError: if the file is missing, cannot be read or is not of its kind.
    """
    name = shown or path
    try:
        return parse(decode_text(path.read_bytes()))
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file; wanted {wanted}") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: a folder; wanted {wanted}") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}; wanted {wanted}") from error
    except ValueError as error:
        raise InputError(f"{name}: not {kind}: {error}; wanted {wanted}") from error


def decode_text(data: bytes) -> str:
    """The text of a file that a user wrote: UTF-8 with or without a byte order mark, line ends as `\\n`.

    Raises:
        ValueError: if it is in another encoding.
    """
    if encoding := foreign_encoding(data):
        raise ValueError(f"encoded as {encoding}, {TO_UTF8.format(encoding)}")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def foreign_encoding(data: bytes) -> str | None:
    """The encoding other than UTF-8 that the beginning of a file names by its mark, or shows by zeros in between."""
    for mark, encoding in _FOREIGN_MARKS.items():
        if data.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in data[:4]]
    if zeros in ([False, True, False, True], [True, False, True, False]):
        return "UTF-16LE" if zeros[1] else "UTF-16BE"
    return None
