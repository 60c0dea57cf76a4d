"""`--set KEY=VALUE`: keys of a config file that the command line changes before the file is checked."""

import re
import tomllib
from dataclasses import dataclass
from typing import Any

from ...cache.errors import InputError

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_KEY_AND_VALUE = re.compile(rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One key and the value that it gets.

    Attributes:
        text: as it was given, `KEY=VALUE`.
        key: names of the tables and, last, of the key.
        value: of one of TOML's types.
    """

    text: str
    key: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Read `KEY=VALUE`: a dotted TOML key, and a TOML value or bare text, which is a string.

        >>> Override.parse('evaluate."a.b".images=dev').key
        ('evaluate', 'a.b', 'images')
        >>> Override.parse("distill.augment.scale=[0.5, 1]").value
        [0.5, 1]

        Raises:
            InputError: if there is no key, or no `=` behind it.
        """
        found = _KEY_AND_VALUE.fullmatch(text)
        key = _parsed(f"{found[1]} = 0") if found else None
        if found is None or key is None:
            raise InputError(
                f"--set {text}: wanted KEY=VALUE, such as distill.epochs=3; a name with dots stands in quotes: "
                "'evaluate.\"a.b\".probe=c'"
            )
        names = []
        while isinstance(key, dict):
            ((name, key),) = key.items()
            names.append(name)
        value = found[2].strip()
        document = _parsed(f"value = {value}")
        alone = document is not None and document.keys() == {"value"}  # with line ends in it, there may be more keys
        return cls(text, tuple(names), document["value"] if document and alone else value)

    def apply(self, document: dict[str, Any]) -> None:
        """Change a parsed config file; tables on the way to the key are made where they are missing."""
        *tables, name = self.key
        for table in tables:
            if not isinstance(document.get(table), dict):
                document[table] = {}
            document = document[table]
        document[name] = self.value


def _parsed(text: str) -> Any:
    """A TOML document, or None."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None
