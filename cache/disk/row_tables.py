"""Row tables: what row i of an array was made from. Parquet, one row group for each shard."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import CacheError
from .durable import replacing

OK = "ok"
FAILED = "failed"

LOST = "lost: "
"""How the reason begins of a row whose embedding was damaged beyond repair."""

_COMMON = [("status", pa.string()), ("reason", pa.string())]
IMAGE_COLUMNS = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("bytes", pa.int64()),
        ("modified_ns", pa.int64()),
        ("digest", pa.string()),  # of the file's bytes; null where `images.hash` was off
        *_COMMON,
    ]
)
LABELLED_COLUMNS = IMAGE_COLUMNS.insert(2, pa.field("class_id", pa.string()))
SENTENCE_COLUMNS = pa.schema([("row", pa.int64()), ("text", pa.string()), ("origin", pa.string()), *_COMMON])
OWN_FAILURE_COLUMNS = pa.schema([("array", pa.string()), ("row", pa.int64()), ("reason", pa.string())])


def write_rows(path: Path, schema: pa.Schema, rows: Iterable[Mapping[str, Any]], shard_rows: int) -> int:
    """Write a row table durably, numbering the rows; memory stays at one shard.

    Args:
        rows: one mapping a row, without `row`; `status` and `reason` may be left out.

    Returns:
        The number of rows.
    """
    num_rows, pending = 0, []
    with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for row in rows:
            pending.append({"row": num_rows, "status": OK, "reason": None, **row})
            num_rows += 1
            if len(pending) == shard_rows:
                writer.write_table(pa.Table.from_pylist(pending, schema=schema))
                pending = []
        if pending or not num_rows:
            writer.write_table(pa.Table.from_pylist(pending, schema=schema))
    return num_rows


class RowTable:
    """A row table on disk, read shard by shard or column by column."""

    def __init__(self, path: Path, num_rows: int | None = None) -> None:
        """Open a table.

        Args:
            num_rows: rows that exist according to the manifest; None takes all. A table may have more, when a later
                version of the cache, or another cache, has added to it.

        Raises:
            CacheError: if it is missing, not Parquet, or has fewer rows than it should.
        """
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except FileNotFoundError as error:
            raise CacheError(f"{path}: missing; a cache without its row table cannot be read") from error
        except pa.ArrowInvalid as error:
            raise CacheError(f"{path}: not a Parquet file ({error}); the row table is damaged") from error
        there = int(self._file.metadata.num_rows)
        self.num_rows = there if num_rows is None else num_rows
        if self.num_rows > there:
            raise CacheError(f"{path}: holds {there} rows, the manifest counts {num_rows}; the row table is damaged")

    @property
    def schema(self) -> pa.Schema:
        """Columns and their types."""
        return self._file.schema_arrow

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, as the table is divided."""
        return max(1, int(self._file.metadata.row_group(0).num_rows))

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_rows) if self.num_rows else 0

    def has(self, column: str) -> bool:
        """Whether the table has this column; older ones lack some."""
        return column in self.schema.names

    def shard(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of one shard's rows as Python lists."""
        rows = self._file.read_row_group(shard, columns=list(columns))
        table: dict[str, list[Any]] = rows.slice(0, self.num_rows - shard * self.shard_rows).to_pydict()
        return table

    def column(self, name: str) -> pa.ChunkedArray:
        """One whole column."""
        return self._file.read(columns=[name]).column(name).slice(0, self.num_rows)

    def batches(self, name: str) -> Iterator[pa.Array]:
        """One column in pieces, in order: what a table of millions of names is read by."""
        left = self.num_rows
        for batch in self._file.iter_batches(columns=[name]):
            if left > 0:
                yield batch.column(0).slice(0, left)
            left -= len(batch)

    def columns(self, *names: str) -> pa.Table:
        """Some whole columns, read in one go."""
        return self._file.read(columns=list(names)).slice(0, self.num_rows)

    def records(self) -> Iterator[dict[str, Any]]:
        """Every row as a mapping, `row` and all, one shard in memory at a time."""
        for shard in range(self.num_shards):
            yield from pa.table(self.shard(shard, self.schema.names), schema=self.schema).to_pylist()

    def take(self, rows: Sequence[int], column: str) -> list[Any]:
        """Values of one column at some rows."""
        values: list[Any] = self.column(column).take(pa.array(rows, pa.int64())).to_pylist()
        return values


def good_rows(table: pa.Table, shared: bool) -> NDArray[np.bool_]:
    """Which rows of a table have an embedding.

    Args:
        table: columns `status` and `reason`.
        shared: the table is another cache's. What that one has lost since is still there for the others.
    """
    good = pc.equal(table["status"], OK)
    if shared:
        good = pc.or_(good, pc.fill_null(pc.starts_with(table["reason"], LOST), False))
    return np.array(good, dtype=np.bool_)


def mark_failures(path: Path, failures: Mapping[int, str], shard_rows: int) -> None:
    """Rewrite a table durably with these rows failed, each with its reason; the others keep what they have."""
    if failures:
        restate_rows(path, path, failures, shard_rows)


def restate_rows(source: Path, target: Path, states: Mapping[int, str | None], shard_rows: int) -> None:
    """Write a table again, durably, with other states for some rows.

    Args:
        states: for each of these rows the reason why it failed, or None where it is good after all.
    """
    changes = {row: {"status": OK if reason is None else FAILED, "reason": reason} for row, reason in states.items()}
    revise_rows(source, target, changes, shard_rows)


def revise_rows(source: Path, target: Path, changes: Mapping[int, Mapping[str, Any]], shard_rows: int) -> None:
    """Write a table again, durably, with other values in some columns of some rows."""
    table = RowTable(source)
    revised = ({**row, **changes.get(row["row"], {})} for row in table.records())
    write_rows(target, table.schema, revised, shard_rows)


def write_own_failures(path: Path, failures: Mapping[str, Mapping[int, str]]) -> None:
    """Write, durably, the rows of shared tables that failed for one teacher alone.

    Args:
        failures: for each array, its rows and their reasons.
    """
    rows = [
        {"array": array, "row": row, "reason": reason}
        for array, of_array in sorted(failures.items())
        for row, reason in sorted(of_array.items())
    ]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows, schema=OWN_FAILURE_COLUMNS), partial)


def read_own_failures(path: Path) -> dict[str, dict[int, str]]:
    """What `write_own_failures` wrote; nothing where there is no such file."""
    failures: dict[str, dict[int, str]] = {}
    if path.exists():
        for row in pq.read_table(path).to_pylist():
            failures.setdefault(row["array"], {})[row["row"]] = row["reason"]
    return failures
