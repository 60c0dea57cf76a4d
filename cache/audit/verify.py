"""Is a cache sound? Every byte against its checksum, then what the files say about each other. Reads only."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..disk.arrays import read_spec
from ..disk.durable import PARTIAL, digest
from ..disk.layout import IMAGES, SIDES, Layout, table_of
from ..errors import CacheError
from ..version.journal import Journal
from ..version.manifest import read_manifest, trusted_copy, vouched_digests
from ..version.schema import Manifest, Plan, refuse_newer
from ..version.spares import has_spare, spare
from .cross_checks import check_content, read_states
from .findings import MOVE, Finding, Report
from .inventory import Piece, pieces, unlisted_packs
from .scan import Scanned, scan

OUTSIDE = ("log", "next", "mend")
"""Folders that are no part of the cache: what was done, and what is being made."""


@dataclass(frozen=True)
class Trusted:
    """What a cache should be.

    Attributes:
        layout: where its files are; of a change that was decided but not yet finished, both places.
        manifest: the one in force, from its spare copy where the file itself is damaged.
        plan: likewise; None where neither is right.
        shard_rows: rows of a chunk file.
    """

    layout: Layout
    manifest: Manifest
    plan: Plan | None
    shard_rows: int


def verify_cache(folder: Path, started: Callable[[int], Callable[[int], None]] | None = None) -> Report:
    """Read a finished cache whole and say what is wrong with it.

    Args:
        started: called with the bytes there are to read; returns what is called with the bytes read so far.

    Raises:
        CacheError: if there is no finished cache, or its manifest and the spare copy of it are both gone.
    """
    report = Report()
    trusted = read_trusted(Layout(folder), report)
    layout, manifest = trusted.layout, trusted.manifest
    wanted, spares = pieces(manifest, trusted.shard_rows), _spare_copies(trusted, report)
    # Tables come first: once their bytes are known to be right, what they say is read while the other files are.
    in_turn = sorted(wanted, key=lambda piece: not piece.name.startswith("rows/"))
    files = [(piece, layout.find(layout.root / piece.name)) for piece in in_turn]
    files += [(piece, layout.base.root / piece.name) for piece in spares]
    progress = started(sum(piece.num_bytes for piece, _ in files)) if started else None
    arrays = {layout.name_of(table_of(layout, array)): array for array in manifest.arrays}
    scanned, states = {}, {}
    with ThreadPoolExecutor(1, thread_name_prefix="tables") as pool:
        unlisted = pool.submit(_find_unlisted, trusted, {piece.name for piece in wanted})
        for found in scan(files, progress):
            name = found.piece.name
            scanned[name] = found
            if name in arrays and found.sound:
                states[arrays[name]] = pool.submit(read_states, layout, manifest, arrays[name]).result
        findings, notes = unlisted.result()
    copies = [scanned.pop(piece.name) for piece in spares]
    scanned = dict(sorted(scanned.items()))
    report.num_files = sum(found.num_bytes >= 0 for found in scanned.values())
    report.num_bytes = sum(max(0, found.num_bytes) for found in scanned.values())
    report.notes += notes
    report.findings += findings
    report.findings += [_file_finding(found) for found in scanned.values() if not found.sound]
    report.findings += [_file_finding(copy, f"{spares[copy.piece]}: ") for copy in copies if not copy.sound]
    for piece in unlisted_packs(manifest, trusted.shard_rows):
        missing = "not in the manifest, though the cache has pixels"
        report.findings.append(Finding("pixels", piece.name, missing, array=piece.array, rows=piece.runs))
    report.findings += check_content(layout, manifest, scanned, states)
    report.findings += _check_journal(trusted, wanted)
    return report


def read_trusted(layout: Layout, report: Report) -> Trusted:
    """The manifest and the plan that a cache is held against; what is wrong with them goes into the report."""
    if layout.root.is_file() or not layout.root.exists():
        raise CacheError(f"{layout.root}: no such folder; wanted a teacher cache")
    manifest = _trusted_manifest(layout, report)
    if (following := read_manifest(layout.next)) is not None:
        report.notes.append("a change was decided and not finished; the next command that writes finishes it")
        layout, manifest = layout.next, following
    elif layout.next.root.exists():
        report.notes.append("next/: a change is under way, or its command was stopped; run that command again")
    report.version = manifest.version
    plan = _trusted_plan(layout, manifest)
    shard_rows = plan.shard_rows if plan else read_spec(layout.base.teacher_zarr, IMAGES).chunk_rows
    return Trusted(layout, manifest, plan, shard_rows)


def _trusted_manifest(layout: Layout, report: Report) -> Manifest:
    vouched, whole = vouched_digests(layout)
    data = layout.manifest.read_bytes() if layout.manifest.exists() else None
    if data is None and not layout.manifest_digest.exists():
        what = "unfinished (no manifest.json)" if layout.plan.exists() else "no teacher cache (no plan.json)"
        raise CacheError(f"{layout.root}: {what}; run `dimefm cache-teacher` to finish it")
    if data is not None and digest(data) in vouched:
        if not whole:
            report.findings.append(
                Finding("changed", layout.manifest_digest.name, "not what was written; it has checksums of manifests")
            )
        return Manifest.parse(layout.manifest, data)
    if data is not None and not whole:
        refuse_newer(layout.manifest, data)
    if data is not None and spare(layout, digest(data)) is not None:
        kind = "changed" if layout.manifest_digest.exists() else "missing"
        report.findings.append(Finding(kind, layout.manifest_digest.name, "does not vouch for manifest.json any more"))
        return Manifest.parse(layout.manifest, data)
    copy = spare(layout, trusted_copy(layout) or "")
    if copy is None:
        raise CacheError(
            f"{layout.manifest}: damaged, and so is its spare copy; wanted one of them: `dimefm cache repair` makes "
            "the manifest again from what is there"
        )
    kind, what = ("missing", "missing") if data is None else ("changed", "its checksum differs: cut or edited")
    report.findings.append(Finding(kind, layout.manifest.name, f"{what}; judged by its spare copy in log/spare/"))
    if not whole:
        report.findings.append(Finding("changed", layout.manifest_digest.name, "not what was written"))
    return Manifest.read(copy)


def _trusted_plan(layout: Layout, manifest: Manifest) -> Plan | None:
    """The plan that the manifest was written for, or its spare copy; its own damage shows in its checksum."""
    path = layout.find(layout.root / manifest.plan_file)
    if path.is_file() and digest(path.read_bytes()) == manifest.plan:
        return Plan.read(path)
    copy = spare(layout.base, manifest.plan)
    return Plan.read(copy) if copy else None


def _spare_copies(trusted: Trusted, report: Report) -> dict[Piece, str]:
    """Copies that are in `log/spare/` or should be, and what each of them is."""
    layout, files = trusted.layout.base, trusted.manifest.files
    if not layout.spares.exists():  # a cache of before there were any
        return {}
    originals = {entry.digest: (name, entry.bytes) for name, entry in files.items() if has_spare(name)}
    if layout.manifest.name not in report.files:
        data = layout.manifest.read_bytes()
        originals[digest(data)] = layout.manifest.name, len(data)
    names = {path.name for path in layout.spares.iterdir() if not path.name.startswith(".")}
    if not trusted.layout.under:  # of a change that is not finished, copies are made at its end
        names |= originals.keys()
    copies = {}
    for name in sorted(names):
        path = layout.spares / name
        original, num_bytes = originals.get(name) or ("a file of an earlier version", path.stat().st_size)
        copies[Piece(layout.name_of(path), num_bytes, name)] = f"spare copy of {original}"
    return copies


def _find_unlisted(trusted: Trusted, wanted: set[str]) -> tuple[list[Finding], list[str]]:
    """Findings and notes on files that the manifest does not list."""
    root, manifest = trusted.layout.base.root, trusted.manifest
    known = {*wanted, *manifest.superseded, "manifest.json", "manifest.xxh3"}
    coming = _pairs_to_come(manifest.version + 1)
    findings, num_waiting, num_coming = [], 0, 0
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        top = name.split("/", 1)[0]
        if top in OUTSIDE or name in known or (path.is_dir() and not path.is_symlink()):
            continue
        if top == "pixels" and not manifest.pixels and path.suffix == ".pack":
            num_waiting += 1
        elif top.startswith(".") or path.name.endswith(PARTIAL):
            findings.append(Finding("leftover", name, "left by a writer that was stopped", MOVE))
        elif name.startswith(coming):
            num_coming += 1
        elif not (name == "rows" and path.is_symlink()):
            findings.append(Finding("extra", name, "not in the manifest", MOVE))
    notes = []
    if num_waiting:
        notes.append(
            f"pixels/: {num_waiting} packs of a cache that has no pixels yet: `dimefm cache-teacher` was stopped while "
            "it kept them, and goes on with the same cache.pixels"
        )
    if num_coming:
        notes.append(
            f"{coming[0]}, index/: {num_coming} files of pairs that are not in force yet: `dimefm cache-teacher` was "
            "stopped while it made them, and goes on with the same settings of [pairs]"
        )
    return findings, notes


def _pairs_to_come(version: int) -> tuple[str, ...]:
    """How the names begin of the pairs and indexes of a version; pairs of other settings are made beside the old."""
    layout = Layout(Path())
    indexes = (layout.index(side, version).with_suffix("").as_posix() for side in SIDES)
    return f"{layout.pairs_zarr(version)}/", *(f"{index}." for index in indexes)


def _file_finding(found: Scanned, what: str = "") -> Finding:
    piece = found.piece
    if found.num_bytes < 0:
        kind, message = "missing", "missing"
    elif found.problem:
        kind, message = "unreadable", f"cannot be read beyond {found.num_bytes:,} bytes: {found.problem}"
    elif found.num_bytes != piece.num_bytes:
        kind = "short" if found.num_bytes < piece.num_bytes else "long"
        message = f"{found.num_bytes:,} bytes, wanted {piece.num_bytes:,}"
    else:
        kind, message = "changed", "its bytes have changed (the checksum differs)"
    return Finding(kind, piece.name, what + message, array=piece.array or None, rows=piece.runs)


def _check_journal(trusted: Trusted, wanted: list[Piece]) -> list[Finding]:
    """The next version takes checksums from the journal: a wrong one would make sound files look damaged."""
    records = {(record.array, record.shard): record.digest for record in Journal(trusted.layout)}
    keys = {piece: journal_key(piece, trusted.manifest) for piece in wanted if piece.chunk >= 0}
    wrong = [piece for piece, key in keys.items() if records.get(key) != piece.digest]
    if not wrong:
        return []
    message = f"does not have the checksums of {len(wrong)} chunk files as the manifest has them: {wrong[0].name}, ..."
    return [Finding("journal", "log/shards.jsonl", message)]


def journal_key(piece: Piece, manifest: Manifest) -> tuple[str, int]:
    """What the journal calls a chunk file."""
    counted = manifest.pairs.counted if manifest.pairs and piece.content in ("ids", "scores") else ""
    return counted + piece.array, piece.chunk
