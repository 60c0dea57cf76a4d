"""One shard to embed, described, and what is known once it is done. Nothing here loads torch."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ...cache.disk.arrays import ArraySpec
from ...cache.disk.durable import Attempt
from ...cache.version.journal import ShardRecord
from ..images.crops import Crops
from ..inputs.image_source import ImageSource

QUALITY = 90
SUBSAMPLING = "4:2:0"
"""Of kept JPEGs."""


@dataclass(frozen=True)
class ExistingRows:
    """Rows that a growing shard begins with: copied from the file that it replaces, never made again.

    Attributes:
        path: the pack, or the Zarr group of the chunk file.
        digest: of the file, which must be sound: copying damage would seal it.
    """

    path: Path
    num_rows: int
    digest: str


@dataclass(frozen=True)
class PackTask:
    """One pack of kept pixels to write; small and picklable.

    Attributes:
        path: where it goes.
        array: what the journal calls the packs of this setting.
        side: shorter side of what is kept, pixels.
        shard_rows: rows of a full shard.
        existing: rows of a growing pack that were kept before.
        note_size: of images that are made smaller, note the size that they had: crops are drawn from it.
    """

    path: Path
    array: str
    shard: int
    side: int
    shard_rows: int
    existing: ExistingRows | None = None
    note_size: bool = False


@dataclass(frozen=True)
class PackedImage:
    """An image whose pixels are to be kept, though it was embedded before.

    Attributes:
        key: of the image in its source.
        bytes: size of the file that the row was made from.
        digest: checksum of that file, where it is known.
        lost: the row has no embedding any more, so it may do without pixels.
    """

    key: Any
    bytes: int
    digest: str | None
    lost: bool


@dataclass(frozen=True)
class ShardTask:
    """One shard to embed; small and picklable, so that it can travel to another machine.

    Attributes:
        store: the Zarr group that the array is in.
        table: row table of the array; None for a head.
        source: of images, where they are read from.
        prompts: prompts of each class, for a head.
        existing: rows of a growing shard that were embedded before.
        pack: of images, where their pixels are kept meanwhile; None keeps none.
        crops: of images, what is embedded beside the centre; None embeds that alone.
        is_shared: the table is another cache's, which may mend its failed rows at any time.
    """

    kind: Literal["images", "sentences", "head"]
    store: Path
    array: str
    spec: ArraySpec
    shard: int
    table: Path | None = None
    source: ImageSource | None = None
    prompts: tuple[tuple[str, ...], ...] = ()
    existing: ExistingRows | None = None
    pack: PackTask | None = None
    crops: Crops | None = None
    is_shared: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return self.spec.rows_of(self.shard)


@dataclass(frozen=True)
class ShardDone:
    """A shard whose files are durable, beside their places: it counts once they are committed and then journaled.

    Attributes:
        pack: of the pack that was written with it.
        seconds: of `read`, `decode`, `keep` (summed over threads), `infer`, `wait` and `write`.
        attempts: its files, the pack's before the chunk's.
        absent: rows within the shard whose image could not be reached when it was read. They have no embedding and are
            not among the failures of the record: such a shard does not count as it is.
        absent_reasons: of each of these rows, what reading it said.
    """

    record: ShardRecord
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    pack: ShardRecord | None = None
    absent: tuple[int, ...] = ()
    absent_reasons: tuple[str, ...] = ()

    def require_sound(self) -> None:
        """Raises CacheError unless its files are on disk as they were written."""
        for attempt in self.attempts:
            attempt.require_sound()

    def commit(self) -> None:
        """Move its files to their places. Done once, by whoever keeps the journal."""
        for attempt in self.attempts:
            attempt.commit()

    def discard(self) -> None:
        """Remove its files: another attempt counts."""
        for attempt in self.attempts:
            attempt.discard()

    def settled(self) -> ShardRecord:
        """The record with absent images as failures: nobody asks for them again."""
        failures = {**dict(zip(self.absent, self.absent_reasons, strict=True)), **dict(self.record.failures)}
        return replace(self.record, failures=tuple(sorted(failures.items())))
