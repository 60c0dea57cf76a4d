"""plan.json: the identity of a cache. Written before the first embedding; a run that does not match it is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .durable import digest, write_json
from .errors import CacheError
from .layout import FORMAT, Layout

MISSING = "nothing"


def parse_document(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON document of a cache, read from `path`.

    Raises:
        CacheError: if it is not JSON, or of a format newer than this code.
    """
    try:
        document = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CacheError(f"{path}: not a JSON document ({error}); it was cut or edited") from error
    found = document.get("format") if isinstance(document, dict) else None
    if not isinstance(found, int):
        raise CacheError(f"{path}: says no format; wanted a document that dimefm wrote")
    if found > FORMAT:
        raise CacheError(f"{path}: format {found}, this dimefm reads up to {FORMAT}; update dimefm")
    return dict(document)


def read_plan(layout: Layout) -> dict[str, Any] | None:
    """The plan of a cache, or None where stage one has not started."""
    return parse_document(layout.plan, layout.plan.read_bytes()) if layout.plan.exists() else None


def write_plan(layout: Layout, plan: Mapping[str, Any]) -> None:
    """Freeze the identity of a cache."""
    write_json(layout.plan, {"format": FORMAT, **plan})


def identity(layout: Layout) -> str:
    """Digest of plan.json: two caches with the same one hold the same rows of the same teacher."""
    return digest(layout.plan.read_bytes())


def first_difference(found: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two nested documents differ, as (dotted key, found, wanted).

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    ('a.b', 1, 2)
    """
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted(set(found) | set(wanted)):
            inner = first_difference(
                found.get(name, MISSING), wanted.get(name, MISSING), f"{key}.{name}" if key else name
            )
            if inner:
                return inner
        return None
    return None if found == wanted else (key, found, wanted)


def require_same(root: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with a cache that another run began.

    Raises:
        CacheError: naming the first key that differs.
    """
    difference = first_difference(found, wanted)
    if difference:
        key, there, here = difference
        raise CacheError(
            f"{root}: made with {key} = {_short(there)}, but this run asks for {_short(here)}; "
            "choose another cache.dir or delete that one"
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
