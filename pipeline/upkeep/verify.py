"""`dimefm cache verify`: whether a cache is sound; on request also against the live teacher and the sources."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache.audit.findings import Finding, Report, Runs, runs_of, show_runs
from ...cache.audit.verify import read_trusted, verify_cache
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_images, table_of
from ...cache.disk.row_tables import RowTable
from ...cache.errors import CacheError, InputError
from ...stages.inputs.open_source import open_source
from ..config.load import Config
from ..config.remembered import ConfigChoice, config_of
from ..progress import bar

if TYPE_CHECKING:
    from ..stage_one.source_changes import LineChanges, SourceChanges


def verify(
    folder: Path, config: ConfigChoice | Path | None = None, *, teacher: bool = False, sources: bool = False
) -> dict[str, Any]:
    """Check a cache.

    Args:
        config: the config that made it; None takes the one that the cache remembers. Only `teacher` and `sources`
            need it.
        teacher: also embed a sample of rows again and compare.
        sources: also say what has become of the files that the rows were made from.

    Returns:
        A document: `sound`, `findings`, `notes`, what was read and how fast; `teacher` and `sources`, None where they
        were not asked for.

    Raises:
        CacheError: if there is no finished cache.
        InputError: if the config, the teacher or the sources are asked for and not at hand.
    """
    layout = Layout(folder)
    wanted = config_of(layout, config) if teacher or sources else None
    start = time.perf_counter()
    report = read_all(folder)
    seconds = time.perf_counter() - start
    compared = _against_teacher(wanted, layout, report) if wanted and teacher else None  # may add findings
    return {
        "cache": str(folder),
        "version": report.version,
        "files": report.num_files,
        "bytes": report.num_bytes,
        "seconds": seconds,
        "teacher": compared,
        "sources": _against_sources(wanted, layout) if wanted and sources else None,
        "sound": not report.findings,
        "findings": [finding.document() for finding in report.findings],
        "lines": [finding.line() for finding in report.findings],
        "notes": report.notes,
    }


def read_all(folder: Path) -> Report:
    """Verify a cache behind a progress bar."""
    with ExitStack() as stack:

        def started(num_bytes: int) -> Callable[[int], None]:
            shown = stack.enter_context(bar("verify", num_bytes // 2**20, "MiB"))
            return lambda done: shown.update(done // 2**20)

        return verify_cache(folder, started)


def report_lines(found: dict[str, Any]) -> list[str]:
    """The document for a person to read."""
    rate = found["bytes"] / max(found["seconds"], 1e-9) / 1e9
    lines = list(found["lines"])
    for array, item in (found["teacher"] or {}).items():
        cosine = item["cosine"]
        shown = f"cosine at least {cosine['least']:.6f}, mean {cosine['mean']:.6f}" if cosine else "nothing to compare"
        lines.append(f"teacher: {array}: {item['rows']} rows embedded again: {shown}")
    for name, item in (found["sources"] or {}).items():
        lines.append(f"sources: {name}: " + ", ".join(f"{count:,} {kind}" for kind, count in item["counts"].items()))
        lines += [f"sources: {note}" for note in item["notes"]]
    state = "sound" if found["sound"] else f"{len(found['findings'])} problems"
    summary = f"version {found['version']}: {state}; {found['files']:,} files, {found['bytes'] / 1e9:,.3f} GB read"
    return [*lines, *found["notes"], f"{found['cache']}: {summary} in {found['seconds']:,.1f} s, {rate:,.2f} GB/s"]


def require_sound(found: dict[str, Any]) -> None:
    """End a command on a damaged cache as an error.

    Raises:
        CacheError: if there are findings.
    """
    if found["findings"]:
        files = sorted({finding["where"] for finding in found["findings"]})
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        raise CacheError(
            f"{found['cache']}: {len(found['findings'])} problems, in {files[0]}{more}; wanted none: "
            "`dimefm cache repair` mends what can be mended"
        )


def _against_teacher(config: Config, layout: Layout, report: Report) -> dict[str, Any]:
    """Embed a sample of each array's sound rows again; rows that differ become findings."""
    from ..stage_one.embed_shards import teacher_at_hand
    from ..stage_one.sources import Sources
    from .live_teacher import SAME_ROW, LiveTeacher, require_loaded_teacher

    trusted = read_trusted(layout, Report())
    if trusted.plan is None:
        raise CacheError(f"{layout.root}: its plan is lost; there is no telling what teacher made it")
    damaged, compared = report.files, {}
    with teacher_at_hand(config.teacher) as teacher:
        require_loaded_teacher(layout.root, trusted.plan, teacher)
        live = LiveTeacher(Sources.of(config), config.teacher, trusted.layout, trusted.plan, teacher)
        for array, entry in trusted.manifest.arrays.items():
            if layout.name_of(table_of(layout, array)) in damaged or "teacher.zarr/zarr.json" in damaged:
                continue
            where = f"teacher.zarr/{array}"
            prefix = f"{where}/c/"
            chunks = [int(name.removeprefix(prefix).split("/")[0]) for name in damaged if name.startswith(prefix)]
            item = live.compare(array, entry.rows, chunks, seed=time.time_ns())
            compared[array] = item
            if item["differ"]:
                message = (
                    f"{len(item['differ'])} of {item['rows']} sampled rows are not what the teacher makes of them now: "
                    f"cosine down to {item['cosine']['least']:.4f}, wanted {SAME_ROW}"
                )
                what = "see `--sources`: changed sources look so; else the row was written wrong"
                report.findings.append(Finding("teacher", where, message, what, array, runs_of(item["differ"])))
    return compared


def _against_sources(config: Config, layout: Layout) -> dict[str, Any]:
    """What has become of the images and lines that the rows were made from."""
    from ..stage_one.source_changes import compare_images, compare_sentences

    trusted = read_trusted(layout, Report())

    def table(array: str) -> RowTable:
        return RowTable(table_of(trusted.layout, array), trusted.manifest.arrays[array].rows)

    wanted = [("images", "images.source", IMAGES, config.images.source)]
    for name, settings in sorted(config.evaluate.items()):
        wanted.append((f"evaluate.{name}", f"evaluate.{name}.images", evaluate_images(name), settings.images))
    found = {}
    for name, key, array, spec in wanted:
        if array not in trusted.manifest.arrays:
            continue
        source = open_source(spec)
        if not source.at_hand():
            raise InputError(f"{key}: {source.location} is not at hand; mount it, or give --config CONFIG")
        images = compare_images(source, table(array))
        runs = _runs(images)
        notes = [f"{key}: {kind}: {show_runs(of_kind)}" for kind, of_kind in runs.items() if of_kind]
        counts, names = images.counts(), images.names()
        found[name] = {"counts": counts, "rows": _lists(runs), "names": names, "notes": images.notes(key) + notes}
    lines = compare_sentences(config.sentences.source, trusted.plan, table(SENTENCES))
    found["sentences"] = {"counts": lines.counts(), "rows": _lists(_runs(lines)), "notes": lines.notes}
    return found


def _runs(changes: "SourceChanges | LineChanges") -> dict[str, Runs]:
    return {"changed": runs_of(sorted(changes.changed)), "gone": runs_of(sorted(changes.gone))}


def _lists(runs: dict[str, Runs]) -> dict[str, list[list[int]]]:
    return {kind: [list(run) for run in of_kind] for kind, of_kind in runs.items()}
