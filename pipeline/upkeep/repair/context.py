"""What a repair works with, and what it has done so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....cache.audit.findings import Finding, Runs
from ....cache.audit.inventory import Piece
from ....cache.disk.arrays import ArraySpec
from ....cache.disk.layout import Layout
from ....cache.version.journal import ShardRecord
from ...config.load import Config

if TYPE_CHECKING:
    from ....stages.models.teacher import Teacher


@dataclass
class Shards:
    """What became of bad shards.

    Attributes:
        same: files with the manifest's bytes again.
        changed: files in `mend/` with other bytes: their piece, record, and what the manifest says of their origin.
        states: for each array, rows and why they failed; None for one that is good again.
        left: files that could not be mended, and why.
    """

    same: list[str] = field(default_factory=list)
    changed: list[tuple[Piece, ShardRecord, dict[str, Any]]] = field(default_factory=list)
    states: dict[str, dict[int, str | None]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hands:
    """What a repair has to work with.

    Attributes:
        mend: the version in the making over `layout`.
        specs: the arrays of the plan.
        config: None where it is not at hand.
        teacher: None where it is not at hand.
        without: why something is not at hand.
    """

    layout: Layout
    mend: Layout
    manifest: Mapping[str, Any]
    plan: Mapping[str, Any]
    specs: Mapping[str, ArraySpec]
    config: Config | None
    teacher: "Teacher | None"
    without: str = ""


@dataclass
class Outcome:
    """What a repair did.

    Attributes:
        mended: file -> how.
        lost: array -> rows that are marked as lost, those of earlier repairs among them.
        left: what could not be mended.
    """

    mended: dict[str, str] = field(default_factory=dict)
    lost: dict[str, Runs] = field(default_factory=dict)
    left: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
