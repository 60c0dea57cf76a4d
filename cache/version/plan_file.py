"""plan.json: the identity of a cache. Written before the first embedding; a run that does not match it is refused.

A cache that grows gets a plan for each version that has more rows: plan-2.json, ... The manifest names the one in
force; those before it stay, they say how the cache came about.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..disk.durable import digest, write_bytes
from ..disk.layout import Layout
from ..errors import CacheError
from .manifest import read_manifest
from .schema import Plan, Record

MISSING = "nothing"


def plan_in_force(layout: Layout) -> Path:
    """The file that the manifest names; plan.json while there is no manifest."""
    manifest = read_manifest(layout)
    return layout.root / manifest.plan_file if manifest else layout.plan


def read_plan(layout: Layout) -> Plan | None:
    """The plan in force, or None where stage one has not started."""
    path = plan_in_force(layout)
    return Plan.read(path) if path.exists() else None


def write_plan(layout: Layout, plan: Plan) -> None:
    """Freeze the identity of a cache, or of a version in the making."""
    write_bytes(layout.plan, plan.to_bytes())


def identity(layout: Layout) -> str:
    """Digest of the plan in force: two caches with the same one hold the same rows of the same teacher."""
    return digest(plan_in_force(layout).read_bytes())


def first_difference(found: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two nested documents differ, as (dotted key, found, wanted).

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
    ('a.b', 1, 2)
    """
    found, wanted = (value.to_dict() if isinstance(value, Record) else value for value in (found, wanted))
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted(set(found) | set(wanted)):
            inner = first_difference(
                found.get(name, MISSING), wanted.get(name, MISSING), f"{key}.{name}" if key else name
            )
            if inner:
                return inner
        return None
    return None if found == wanted else (key, found, wanted)


def require_same(root: Path, found: Record | Mapping[str, Any], wanted: Record | Mapping[str, Any]) -> None:
    """Refuse to go on with a cache that another run began.

    Args:
        found: of the cache: records, or mappings of plain values and records.
        wanted: of this run, likewise.

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
