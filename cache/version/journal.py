"""The journal of finished shards. A shard counts once its line is here: its file was fsynced and renamed before."""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..disk.durable import append_line, make_folder, read_lines, to_json_line, write_bytes
from ..disk.layout import Layout


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one finished shard.

    Attributes:
        array: name of the array in its store.
        shard: number of the chunk.
        num_rows: rows in the shard; one that has grown since is another one.
        digest: of the chunk file's bytes.
        failures: (row within the shard, reason) of each row that could not be embedded.
    """

    array: str
    shard: int
    num_rows: int
    digest: str
    failures: tuple[tuple[int, str], ...] = ()


class Journal:
    """Finished shards of one cache, in memory and on disk."""

    def __init__(self, layout: Layout) -> None:
        """Read a cache's journal; of a version in the making, the cache's own and then what was added."""
        self._layout = layout
        self._records: dict[tuple[str, int], ShardRecord] = {}
        if layout.under:
            self._records |= Journal(layout.base)._records
        for line in read_lines(layout.journal):
            self._remember(_record(line))

    def add(self, record: ShardRecord, seconds: dict[str, float]) -> None:
        """Count a shard whose file is durable. Times go to a file of their own: they never repeat."""
        make_folder(self._layout.journal.parent)
        append_line(self._layout.journal, asdict(record))
        if seconds:
            timing = {"array": record.array, "shard": record.shard, **seconds}
            append_line(self._layout.timings, timing, durable=False)
        self._remember(record)

    def take_over(self, following: Layout) -> None:
        """Count what a version in the making has added. Doing so twice is doing it once."""
        for line in read_lines(following.journal):
            record = _record(line)
            if self._records.get((record.array, record.shard)) != record:
                self.add(record, {})

    def has(self, array: str, shard: int, num_rows: int) -> bool:
        """Whether the shard is finished with this many rows."""
        record = self._records.get((array, shard))
        return record is not None and record.num_rows == num_rows

    def forget(self, array: str, shard: int) -> None:
        """Let a shard count as missing until it is added again; on disk its line stays."""
        self._records.pop((array, shard), None)

    def drop(self, shards: Collection[tuple[str, int]]) -> None:
        """Let shards, by array and number, count as missing, on disk too: their lines go from this journal's own file.

        The file is replaced in one step. A version in the making keeps what the cache below it says of them.
        """
        if not shards:
            return
        kept = [record for record in read_records(self._layout) if (record.array, record.shard) not in shards]
        write_bytes(self._layout.journal, b"".join(to_json_line(asdict(record)) for record in kept))
        self._records = dict(Journal(self._layout)._records)

    def of(self, array: str) -> list[ShardRecord]:
        """Records of one array, by shard."""
        return sorted((r for r in self._records.values() if r.array == array), key=lambda r: r.shard)

    def __iter__(self) -> Iterator[ShardRecord]:
        return iter(self._records.values())

    def _remember(self, record: ShardRecord) -> None:
        self._records[record.array, record.shard] = record


def read_records(layout: Layout) -> Iterator[ShardRecord]:
    """The lines of one journal alone, repeated ones too."""
    return map(_record, read_lines(layout.journal))


def _record(line: dict[str, Any]) -> ShardRecord:
    failures = tuple((int(row), str(reason)) for row, reason in line["failures"])
    return ShardRecord(line["array"], line["shard"], line["num_rows"], line["digest"], failures)
