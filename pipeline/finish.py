"""The end of stage one: row tables with their failures, indexes, pseudo-pairs, and last of all the manifest."""

from collections import Counter
from typing import Any

from ..cache.durable import write_json
from ..cache.journal import Journal
from ..cache.layout import FORMAT, IMAGES, SENTENCES, Layout, evaluate_images
from ..cache.plan import identity
from ..cache.rows import FAILED, RowTable, mark_failures
from ..cache.settings import PairsSettings
from .config import Config
from .pairs import write_pairs


def pairs_document(settings: PairsSettings) -> dict[str, Any] | None:
    """The settings that decide what the pairs are; None when retrieval is off."""
    return settings.model_dump(mode="json") if settings.k else None


def finish_cache(config: Config, layout: Layout, plan: dict[str, Any], transductive: list[str]) -> None:
    """Turn a folder whose shards are all counted into a finished cache."""
    journal = Journal(layout)
    tables = {IMAGES: layout.image_rows, SENTENCES: layout.sentence_rows}
    tables |= {evaluate_images(name): layout.evaluate_rows(name) for name in plan["inputs"]["evaluate"]}
    shard_rows = plan["shard_rows"]
    rows = {}
    for array, table in tables.items():
        failures = {
            record.shard * shard_rows + row: reason for record in journal.of(array) for row, reason in record.failures
        }
        mark_failures(table, failures, shard_rows)
        rows[array] = _count(RowTable(table))
    arrays = {
        record.array: {"chunks": [r.digest for r in journal.of(record.array)], **rows.get(record.array, {})}
        for record in journal
        if not record.array.startswith("pairs")
    }
    written = write_pairs(layout, config.pairs, journal) if config.pairs.k else {"pairs": None, "index": {}}
    document = {
        "format": FORMAT,
        "plan": identity(layout),
        "arrays": arrays,
        "pairs_settings": pairs_document(config.pairs),
        "text_tower": layout.text_tower.name,
        "transductive": transductive,
        **written,
    }
    write_json(layout.manifest, document)


def _count(table: RowTable) -> dict[str, Any]:
    status, reason = (table.column(name).to_pylist() for name in ("status", "reason"))
    reasons = Counter(why for what, why in zip(status, reason, strict=True) if what == FAILED)
    return {"rows": table.num_rows, "failed": sum(reasons.values()), "reasons": dict(sorted(reasons.items()))}
