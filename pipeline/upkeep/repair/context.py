"""What a repair works with, and what it has done so far."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ....cache.audit.findings import BYTES, Finding, Report, Runs
from ....cache.audit.inventory import Piece
from ....cache.disk.arrays import ArraySpec
from ....cache.disk.layout import Layout
from ....cache.version.journal import ShardRecord
from ....cache.version.schema import Manifest, Origin, Plan
from ...stage_one.sources import Sources
from ..live_teacher import LiveTeacher

SAME_BYTES = "computed again: the same bytes"


@dataclass(frozen=True)
class Damage:
    """The findings of `verify`, sorted for repair.

    Attributes:
        findings: all of them.
        files: damaged files that the manifest lists, and packs that it should list.
        unreliable: those of them of which no byte can be relied on.
        wrong_rows: of files whose bytes are right, the rows that are wrong.
    """

    findings: Sequence[Finding]
    files: frozenset[str]
    unreliable: frozenset[str] = frozenset()
    wrong_rows: Mapping[str, Runs] = field(default_factory=dict)

    @classmethod
    def of(cls, report: Report, manifest: Manifest) -> "Damage":
        """Sort what was found in a cache."""
        listed = {finding.where for finding in report.findings if finding.where in manifest.files}
        packs = {finding.where for finding in report.findings if finding.kind == "pixels"}
        files = frozenset(listed | packs)
        wrong_rows: dict[str, Runs] = {}
        for finding in report.findings:
            if finding.kind == "rows":
                wrong_rows[finding.where] = wrong_rows.get(finding.where, ()) + finding.rows
        unreliable = files & {finding.where for finding in report.findings if finding.kind in BYTES}
        return cls(report.findings, files, unreliable, wrong_rows)

    def but(self, repaired: Collection[str]) -> "Damage":
        """What is left once some files are repaired."""
        return replace(self, files=self.files.difference(repaired), unreliable=self.unreliable.difference(repaired))

    def below(self, *starts: str) -> set[str]:
        """Damaged files whose names begin so."""
        return {name for name in self.files if name.startswith(starts)}


@dataclass
class Outcome:
    """What a repair did.

    Attributes:
        mended: file -> how.
        left: file -> why it could not be repaired.
        lost: array -> rows that are marked as lost, those of earlier repairs among them.
    """

    mended: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    lost: dict[str, Runs] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def leave(self, names: Iterable[str], why: str) -> None:
        """Record files that cannot be repaired; the first reason given for a file stands."""
        self.left = dict.fromkeys(names, why) | self.left


@dataclass
class NewBytes:
    """What has other bytes than before, and waits in `mend/` for a new version.

    Attributes:
        shards: shards and packs: their piece, record, and the manifest's note of their origin.
        states: for each array, rows and why they failed; None for one that is good again.
    """

    shards: list[tuple[Piece, ShardRecord, Origin]] = field(default_factory=list)
    states: dict[str, dict[int, str | None]] = field(default_factory=dict)

    def mark(self, piece: Piece, record: ShardRecord) -> None:
        """Record the rows of a shard that failed."""
        states = self.states.setdefault(piece.array, {})
        states |= {piece.first + row: reason for row, reason in record.failures}


@dataclass(frozen=True)
class RepairContext:
    """What a repair works with.

    Attributes:
        layout: the damaged cache.
        staged: the version in the making over it, in `mend/`.
        specs: the arrays of the plan.
        pieces: every file of the manifest, and packs that it should list.
        sources: of the rows; None where they are not wanted or there is no config.
        workers: threads that read and decode images.
        live: teacher and sources over `staged`; None where they are not wanted or not at hand.
        without: why something is not at hand.
    """

    layout: Layout
    staged: Layout
    manifest: Manifest
    plan: Plan
    specs: Mapping[str, ArraySpec]
    pieces: Sequence[Piece]
    sources: Sources | None = None
    workers: int = 0
    live: LiveTeacher | None = None
    without: str = ""

    @property
    def shares_rows(self) -> bool:
        """Whether the row tables are another cache's, which only that one may write."""
        return self.plan.rows_of is not None
