"""The end of stage one: row tables with their failures, indexes, pseudo-pairs, and last of all the manifest."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cache.arrays import chunk_path, read_spec
from ..cache.journal import Journal
from ..cache.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ..cache.manifest import file_entry, read_manifest, write_manifest
from ..cache.plan import identity
from ..cache.rows import FAILED, RowTable, mark_failures
from ..cache.settings import PairsSettings
from .config import Config
from .pairs import DIRECTIONS, write_pairs
from .progress import say


def pairs_document(settings: PairsSettings) -> dict[str, Any] | None:
    """The settings that decide what the pairs are; None when retrieval is off."""
    return settings.model_dump(mode="json") if settings.k else None


def finish_cache(config: Config, layout: Layout, plan: dict[str, Any], transductive: list[str]) -> None:
    """Turn a folder whose shards are all counted into a finished cache."""
    journal = Journal(layout)
    before = read_manifest(layout)
    version = before["version"] + 1 if before else 1
    tables = {IMAGES: layout.image_rows, SENTENCES: layout.sentence_rows}
    tables |= {evaluate_images(name): layout.evaluate_rows(name) for name in plan["inputs"]["evaluate"]}
    arrays = {}
    for array, table in tables.items():
        failures = {
            record.shard * plan["shard_rows"] + row: reason
            for record in journal.of(array)
            for row, reason in record.failures
        }
        mark_failures(table, failures, plan["shard_rows"])
        arrays[array] = _count(RowTable(table))
        if arrays[array]["failed"]:
            reasons = counted_reasons(arrays[array]["reasons"])
            say(f"{array}: {arrays[array]['failed']:,} rows have no embedding: {reasons}")
    retrieved: dict[str, Any] = {"pairs": None, "index": {}}
    if config.pairs.k:
        retrieved = write_pairs(layout, config.pairs, journal, version)
    heads = [evaluate_head(name) for name in plan["inputs"]["evaluate"]]
    files = dict(_files(layout, journal, [*tables, *heads], list(tables.values()), retrieved))
    write_manifest(
        layout,
        {
            "version": version,
            "plan": identity(layout),
            "arrays": arrays,
            "pairs_settings": pairs_document(config.pairs),
            "text_tower": layout.text_tower.name,
            "transductive": transductive,
            "files": files,
            **retrieved,
        },
    )


def _files(
    layout: Layout, journal: Journal, arrays: list[str], tables: list[Path], retrieved: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, size and checksum) of every file of the cache; chunks as the journal has them, nothing read twice."""
    stores = [(layout.teacher_zarr, "", arrays)]
    others = [layout.plan, *tables, *sorted(path for path in layout.text_tower.rglob("*") if path.is_file())]
    if retrieved["pairs"]:
        store, counted = layout.root / retrieved["pairs"]["store"], retrieved["pairs"]["counted"]
        names = [f"{direction}/{part}" for direction in DIRECTIONS for part in ("ids", "scores")]
        stores.append((store, counted, names))
        for info in retrieved["index"].values():
            others += [layout.root / info["file"], (layout.root / info["file"]).with_suffix(".json")]
    for store, counted, names in stores:
        others += sorted(store.rglob("zarr.json"))
        for name in names:
            spec = read_spec(store, name)
            known = {record.shard: record.digest for record in journal.of(counted + name)}
            for shard in range(spec.num_chunks):
                path = chunk_path(store, name, shard, len(spec.shape))
                entry = {"bytes": spec.chunk_bytes, "digest": known[shard]} if shard in known else file_entry(path)
                yield _relative(layout, path), entry
    for path in others:
        yield _relative(layout, path), file_entry(path)


def _relative(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()


def counted_reasons(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts in one line, the most frequent first."""
    return ", ".join(f"{count:,} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))


def _count(table: RowTable) -> dict[str, Any]:
    status, reason = (table.column(name).to_pylist() for name in ("status", "reason"))
    reasons = Counter(why for what, why in zip(status, reason, strict=True) if what == FAILED)
    return {"rows": table.num_rows, "failed": sum(reasons.values()), "reasons": dict(sorted(reasons.items()))}
