"""Row tables: what row i of an array was made from. Parquet, one row group for each shard."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .durable import replacing
from .errors import CacheError

OK = "ok"
FAILED = "failed"

_COMMON = [("status", pa.string()), ("reason", pa.string())]
IMAGE_COLUMNS = pa.schema(
    [("row", pa.int64()), ("source", pa.string()), ("bytes", pa.int64()), ("modified_ns", pa.int64()), *_COMMON]
)
LABELLED_COLUMNS = IMAGE_COLUMNS.insert(2, pa.field("class_id", pa.string()))
SENTENCE_COLUMNS = pa.schema([("row", pa.int64()), ("text", pa.string()), ("origin", pa.string()), *_COMMON])


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

    def __init__(self, path: Path) -> None:
        """Open a table.

        Raises:
            CacheError: if it is missing or not Parquet.
        """
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except FileNotFoundError as error:
            raise CacheError(f"{path}: missing; a cache without its row table cannot be read") from error
        except pa.ArrowInvalid as error:
            raise CacheError(f"{path}: not a Parquet file ({error}); the row table is damaged") from error

    @property
    def num_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def num_shards(self) -> int:
        return int(self._file.num_row_groups) if self.num_rows else 0

    def shard(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of one shard's rows as Python lists."""
        table: dict[str, list[Any]] = self._file.read_row_group(shard, columns=list(columns)).to_pydict()
        return table

    def column(self, name: str) -> pa.ChunkedArray:
        """One whole column."""
        return self._file.read(columns=[name]).column(name)

    def take(self, rows: Sequence[int], column: str) -> list[Any]:
        """Values of one column at some rows."""
        values: list[Any] = self.column(column).take(pa.array(rows, pa.int64())).to_pylist()
        return values


def mark_failures(path: Path, failures: Mapping[int, str], shard_rows: int) -> None:
    """Rewrite a table durably with these rows failed, each with its reason; the others keep what they have."""
    table = RowTable(path)
    schema = table._file.schema_arrow

    def marked() -> Iterable[Mapping[str, Any]]:
        for shard in range(table.num_shards):
            for row in pa.table(table.shard(shard, schema.names), schema=schema).to_pylist():
                yield {**row, "status": FAILED, "reason": failures[row["row"]]} if row["row"] in failures else row

    if failures:
        write_rows(path, schema, marked(), shard_rows)
