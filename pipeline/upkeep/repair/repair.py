"""`dimefm cache repair`: repairs what `verify` finds. Safe to kill and to repeat.

Most damage is repaired in place: the bytes have the manifest's checksums again, and the manifest stays as it is. Where
bytes come out otherwise (on another machine, or because rows are lost), a new version of the cache is made in `mend/`
and takes the place of the damaged one in one step: `mend/` becomes `next/` (cache/version/versions.py). An append that
was under way is dropped and begins anew, since it was based on the damaged version.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ....cache.audit.findings import Report, show_runs
from ....cache.audit.verify import read_trusted
from ....cache.disk.durable import append_line
from ....cache.disk.layout import Layout
from ....cache.errors import CacheError
from ....cache.version.lock import writer_lock
from ....cache.version.manifest import read_manifest
from ....cache.version.spares import renew_spares
from ...config.remembered import ConfigChoice
from ...progress import say
from ..verify import read_all
from .context import Outcome
from .files import restore_manifest
from .steps import repair_cache


def repair(folder: Path, config: ConfigChoice | Path | None = None) -> dict[str, Any]:
    """Repair a cache.

    Args:
        config: the config that made it; None takes the one that the cache remembers.

    Returns:
        A document: `found` problems, `mended` files and how, `lost` rows, problems that are `left`.

    Raises:
        CacheError: if there is no finished cache, another process writes it, or its manifest cannot be had back.
    """
    layout = Layout(folder)
    if not (layout.manifest.exists() or layout.manifest_digest.exists()):
        read_trusted(layout, Report())  # says what this folder is
    outcome = Outcome()
    with writer_lock(layout):
        outcome.mended |= restore_manifest(layout, config)
        report = read_all(folder)
        found = len(report.findings) + len(outcome.mended)
        repair_cache(layout, report, outcome, config)
        _repair_spares(layout, report, outcome)
        findings = [finding for finding in report.findings if finding.where in outcome.left]
        if outcome.mended:
            say("looking whether the cache is sound now")
            findings = read_all(folder).findings
        manifest = read_manifest(layout)
        assert manifest is not None
        for name, how in outcome.mended.items():
            append_line(layout.root / "log" / "repairs.jsonl", {"file": name, "how": how, "version": manifest.version})
    left = [replace(finding, repair=outcome.left.get(finding.where, finding.repair)) for finding in findings]
    return {
        "cache": str(folder),
        "version": manifest.version,
        "found": found,
        "mended": outcome.mended,
        "lost": {array: [list(run) for run in runs] for array, runs in outcome.lost.items()},
        "left": [finding.document() for finding in left],
        "lines": [finding.line() for finding in left],
        "notes": outcome.notes,
    }


def _repair_spares(layout: Layout, report: Report, outcome: Outcome) -> None:
    """Make damaged spare copies again, now that their originals are in order."""
    manifest, prefix = read_manifest(layout), f"{layout.name_of(layout.spares)}/"
    assert manifest is not None
    damaged = {finding.where: finding.repair for finding in report.findings if finding.where.startswith(prefix)}
    if damaged:
        outcome.mended |= renew_spares(layout, manifest.files, list(damaged))
    outcome.left |= {name: why for name, why in damaged.items() if name not in outcome.mended}


def outcome_lines(found: dict[str, Any]) -> list[str]:
    """The document for a person to read."""
    lines = [f"{name}: {how}" for name, how in sorted(found["mended"].items())]
    for array, runs in found["lost"].items():
        shown = show_runs(tuple((first, last) for first, last in runs))
        lines.append(f"{array}: lost: {shown}; repair again once their sources and the teacher are at hand")
    if found["lost"]:
        lines.append(f"`dimefm cache inspect {found['cache']} --failed` names them")
    lines += [f"left: {line}" for line in found["lines"]] + found["notes"]
    state = f"{found['found']} problems, {len(found['mended'])} files mended, {len(found['left'])} left"
    return [*lines, f"{found['cache']}: version {found['version']}: {state if found['found'] else 'sound'}"]


def require_mended(found: dict[str, Any]) -> None:
    """End a command that left damage as an error.

    Raises:
        CacheError: if anything is left.
    """
    if found["left"]:
        raise CacheError(f"{found['cache']}: {len(found['left'])} problems are left; first: {found['lines'][0]}")
