"""Rows without an embedding, by name and reason: of a finished cache, and of one that is not finished yet."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..disk.layout import IMAGES, SENTENCES, Layout, evaluate_images, table_of
from ..disk.row_tables import RowTable, good_rows, read_own_failures
from ..errors import CacheError
from ..version.journal import Journal
from ..version.manifest import read_manifest
from ..version.plan_file import read_plan
from ..version.schema import Plan


@dataclass(frozen=True)
class Failure:
    """One row without an embedding.

    Attributes:
        set: `images`, `sentences` or `evaluate.NAME`.
        row: its number there.
        name: path of the image below its source, or the text of the sentence.
        origin: of a sentence the name of its file, else empty.
        reason: why it has no embedding.
    """

    set: str
    row: int
    name: str
    origin: str
    reason: str


def failed_rows(layout: Layout, plan: Plan, array: str) -> Mapping[int, str]:
    """Rows of an array that have no embedding, ascending, and why; of a cache under way those known so far."""
    table = RowTable(table_of(layout, array), arrays_of(plan)[array])
    columns = table.columns("status", "reason")
    bad = np.flatnonzero(~good_rows(columns, layout.shares_rows))
    failed = dict(zip(bad.tolist(), map(str, columns["reason"].take(pa.array(bad)).to_pylist()), strict=True))
    failed |= read_own_failures(layout.find(layout.own_failures)).get(array, {})
    if layout.under or read_manifest(layout) is None:  # finishing it writes these into the tables
        for record in Journal(layout).of(array):
            first = record.shard * plan.shard_rows
            failed |= {first + row: reason for row, reason in record.failures}
    return dict(sorted(failed.items()))


def list_failures(layout: Layout) -> Iterator[Failure]:
    """Every row without an embedding: images, sentences, then the labelled sets by name.

    Raises:
        CacheError: if stage one has not listed its rows yet, or a table is damaged.
    """
    plan = read_plan(layout)
    if plan is None:
        raise CacheError(f"{layout.root}: no teacher cache (no plan.json); `dimefm cache-teacher` makes one")
    for array in arrays_of(plan):
        failed = failed_rows(layout, plan, array)
        table = RowTable(table_of(layout, array))
        column = "text" if array == SENTENCES else "source"
        names = table.take(list(failed), column)
        origins = table.take(list(failed), "origin") if array == SENTENCES else [""] * len(names)
        for (row, reason), name, origin in zip(failed.items(), names, origins, strict=True):
            yield Failure(set_of(array), row, name, origin, reason)


def arrays_of(plan: Plan) -> dict[str, int]:
    """Rows of each array of embeddings that a plan has."""
    inputs = plan.inputs
    sets = {evaluate_images(name): item.rows for name, item in sorted(inputs.evaluate.items())}
    return {IMAGES: inputs.images.rows, SENTENCES: inputs.sentences.rows, **sets}


def set_of(array: str) -> str:
    """What a user calls the rows of an array: `images`, `sentences`, `evaluate.NAME`."""
    parts = array.split("/")
    return f"evaluate.{parts[1]}" if parts[0] == "evaluate" else parts[0]
