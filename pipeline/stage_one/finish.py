"""The end of stage one and of growth: row tables with their failures, indexes, pseudo-pairs, last the manifest."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...cache.disk.arrays import chunk_path, read_spec
from ...cache.disk.durable import digest, write_bytes
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ...cache.disk.row_tables import RowTable, good_rows, mark_failures, read_own_failures, write_own_failures
from ...cache.version.journal import Journal
from ...cache.version.manifest import file_entry, read_manifest
from ...cache.version.plan_file import plan_in_force
from ...cache.version.versions import put_in_force
from ..config.load import Config
from ..progress import say
from .embed_shards import counted_reasons, planned_specs
from .kept_packs import pack_files, pixels_document, setting_in_force
from .pseudo_pairs import DIRECTIONS, pairs_document, write_pairs

Manifest = dict[str, Any]


def finish_cache(config: Config, layout: Layout, plan: dict[str, Any], transductive: list[str]) -> None:
    """Turn a folder whose shards are all counted into a finished cache, or a version in the making into the cache's."""
    journal = Journal(layout)
    before = read_manifest(layout.base)
    version = before["version"] + 1 if before else 1
    plan_file = plan_in_force(layout)
    if layout.under:
        plan_file = layout.plan_of(version)
        write_bytes(plan_file, layout.plan.read_bytes())
    tables = {IMAGES: layout.image_rows, SENTENCES: layout.sentence_rows}
    tables |= {evaluate_images(name): layout.evaluate_rows(name) for name in plan["inputs"]["evaluate"]}
    arrays = _settle_failures(layout, plan, journal, tables)
    for array, counted in arrays.items():
        if counted["failed"]:
            say(f"{array}: {counted['failed']:,} rows have no embedding: {counted_reasons(counted['reasons'])}")
    counts = {array: arrays[array]["rows"] for array in (IMAGES, SENTENCES)}
    retrieved: dict[str, Any] = {"pairs": None, "index": {}}
    if before and before["pairs_settings"] == pairs_document(config.pairs) and _counts(before) == counts:
        retrieved = {"pairs": before["pairs"], "index": before["index"]}
    elif config.pairs.k:
        retrieved = write_pairs(layout, config.pairs, journal, version)
    heads = [evaluate_head(name) for name in plan["inputs"]["evaluate"]]
    own_tables = [layout.own_failures] if "rows_of" in plan else list(tables.values())
    pixels = setting_in_force(config, layout, plan, journal)
    num_shards = -(-counts[IMAGES] // plan["shard_rows"])
    packs = dict(pack_files(layout, journal, pixels, num_shards)) if pixels else {}
    put_in_force(
        layout,
        {
            **(before or {}),
            "version": version,
            "plan": digest(plan_file.read_bytes()),
            "plan_file": plan_file.name,
            "arrays": arrays,
            "pairs_settings": pairs_document(config.pairs),
            "text_tower": layout.text_tower.name if layout.find(layout.text_tower).exists() else None,
            "pixels": pixels and pixels_document(layout, pixels, plan["shard_rows"]),
            "transductive": transductive,
            "files": {
                **_inherited(before),
                **packs,
                **dict(files_of(layout, journal, [*tables, *heads], [plan_file, *own_tables], retrieved)),
            },
            **retrieved,
        },
    )


def _settle_failures(
    layout: Layout, plan: dict[str, Any], journal: Journal, tables: dict[str, Path]
) -> dict[str, dict[str, Any]]:
    """Write failed rows where they belong; returns `arrays` of the manifest: rows, failed ones, and why they failed."""
    specs = planned_specs(plan)
    own = read_own_failures(layout.find(layout.own_failures))
    arrays = {}
    for array, path in tables.items():
        failures = {
            record.shard * plan["shard_rows"] + row: reason
            for record in journal.of(array)
            for row, reason in record.failures
        }
        if "rows_of" in plan:  # another cache's table: what failed here may be sound there
            own[array] = own.get(array, {}) | failures
        elif layout.find(path) == path:  # a table that an append has not touched has its failures in it already
            mark_failures(path, failures, plan["shard_rows"])
        table = RowTable(layout.find(path), specs[array].shape[0])
        arrays[array] = count_failures(table, own.get(array, {}), "rows_of" in plan)
    if "rows_of" in plan:
        write_own_failures(layout.own_failures, own)
    return arrays


def _counts(manifest: Manifest) -> dict[str, int]:
    return {array: manifest["arrays"][array]["rows"] for array in (IMAGES, SENTENCES)}


def _inherited(before: Manifest | None) -> dict[str, Any]:
    """Files that go on from version to version, whatever the change: plans and masks."""
    files = before["files"] if before else {}
    return {name: entry for name, entry in files.items() if name.startswith(("plan", "masks/"))}


def files_of(
    layout: Layout, journal: Journal, arrays: list[str], documents: list[Path], retrieved: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, size and checksum) of every file of the cache; chunks as the journal has them, nothing read twice."""
    tower = layout.find(layout.text_tower)
    others = [*documents, *sorted(path for path in tower.rglob("*") if path.is_file())]
    stores = [(layout.teacher_zarr, "", arrays)]
    if retrieved["pairs"]:
        store, counted = layout.root / retrieved["pairs"]["store"], retrieved["pairs"]["counted"]
        names = [f"{direction}/{part}" for direction in DIRECTIONS for part in ("ids", "scores")]
        stores.append((layout.find(store), counted, names))
        for info in retrieved["index"].values():
            others += [layout.root / info["file"], (layout.root / info["file"]).with_suffix(".json")]
    for store, counted, names in stores:
        others += sorted(store.rglob("zarr.json"))
        for name in names:
            spec = read_spec(store, name)
            known = {record.shard: record.digest for record in journal.of(counted + name)}
            for shard in range(spec.num_chunks):
                path = chunk_path(store, name, shard, len(spec.shape))
                if shard in known:
                    yield layout.name_of(path), {"bytes": spec.chunk_bytes, "digest": known[shard]}
                else:
                    yield layout.name_of(path), file_entry(layout.find(path))
    for path in others:
        yield layout.name_of(path), file_entry(layout.find(path))


def count_failures(table: RowTable, own_failures: dict[int, str], shared: bool) -> dict[str, Any]:
    """What `arrays` of the manifest says of one: rows, failed ones, and how many for which reason.

    Args:
        own_failures: rows that failed for this teacher alone, and why.
        shared: the table is another cache's.
    """
    columns = table.columns("status", "reason")
    bad = np.flatnonzero(~good_rows(columns, shared))
    failed = dict(zip(bad.tolist(), columns["reason"].take(pa.array(bad)).to_pylist(), strict=True))
    reasons = Counter((failed | own_failures).values())
    return {"rows": table.num_rows, "failed": reasons.total(), "reasons": dict(sorted(reasons.items()))}
