"""Whether images are still those that stage one embedded: a sample at the start, and every one that is read.

A student that reads other images than its targets were made from learns less, and nothing else would say so. Sizes and
times are in the row tables. A time alone refuses nothing and counts as no change: files are copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError
from ...cache.reader.feature_cache import EmbeddingSet
from ...stages.images.decode import AbsentError, ImageError
from ...stages.inputs.image_source import ImageSource, row_keys
from ...stages.inputs.watched_source import WatchedSource
from ...stages.run_folder.run_record import RECORD, read_run_record, write_run_record
from ..progress import some_names

SAMPLE_IMAGES = 256
COARSEST_NS = 2_000_000_000
"""What archives and some disks round times to."""
CHANGED = "changed_sources"
"""Key of `run.json`, and of a set in `evaluation.json`."""


@dataclass(frozen=True)
class SourceWatch:
    """A source of images, held against the rows that were made from it.

    Attributes:
        key: the config's name for it.
        source: what to read through; it notes rows whose image has another size.
        sampled: of the sample at the start: `sampled`, `changed`, `touched` (another time alone), `gone`.
        notes: lines on the sample.
    """

    key: str
    source: ImageSource
    rows: EmbeddingSet
    sampled: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> NDArray[np.int64]:
        """Rows that were read and had another size, ascending."""
        return self.source.changed if isinstance(self.source, WatchedSource) else np.empty(0, dtype=np.int64)

    def document(self) -> dict[str, int] | None:
        """What a record says: the counts of the sample and `read`, images that were read and had another size.

        None if there is nothing to say.
        """
        found = {**self.sampled, "read": len(self.changed)}
        return found if any(count for kind, count in found.items() if kind != "sampled") else None

    def last_lines(self) -> list[str]:
        """What to say once images were read through it: which of them had another size."""
        changed = self.changed
        if not len(changed):
            return []
        names = some_names(self.rows.rows.take(changed.tolist(), "source"))
        return [
            f"warning: {self.key}: {len(changed):,} images that were read are not what stage one embedded (another "
            f"size): {names}"
        ]


def watch_source(source: ImageSource, rows: EmbeddingSet, key: str) -> SourceWatch:
    """Look at a seeded sample of the images of some rows, and watch those that are read through it from now on.

    Args:
        key: the config's name for the source.

    Raises:
        InputError: if the source is at hand and not one image of the sample is there.
    """
    table = rows.rows
    if not source.at_hand() or not table.has("bytes") or not len(rows.usable):
        return SourceWatch(key, source, rows)
    watched = WatchedSource(source, table.num_rows)
    chosen = np.random.default_rng(0).choice(rows.usable, min(SAMPLE_IMAGES, len(rows.usable)), replace=False)
    chosen = np.sort(chosen)
    wanted = [name for name in ("bytes", "modified_ns", "digest") if table.has(name)]
    there = {name: table.take(chosen.tolist(), name) for name in wanted}
    found: dict[str, list[int]] = {"changed": [], "touched": [], "gone": []}
    for i, (row, row_key) in enumerate(zip(chosen.tolist(), row_keys(source, table)(chosen), strict=True)):
        recorded = {name: values[i] for name, values in there.items()}
        if (kind := _state(source, row_key, recorded)) is not None:
            found[kind].append(row)
    if len(found["gone"]) == len(chosen):
        raise InputError(
            f"{key}: {source.location}: not one of {len(chosen):,} images that were looked for is there; is the disk "
            "mounted? wanted the images that stage one embedded"
        )
    sampled = {"sampled": len(chosen), **{kind: len(of_kind) for kind, of_kind in found.items()}}
    notes = [
        f"{start}{key}: {source.location}: {len(found[kind]):,} of {len(chosen):,} sampled images {what}: "
        f"{some_names(table.take(found[kind], 'source'))}"
        for kind, start, what in _NOTES
        if found[kind]
    ]
    return SourceWatch(key, watched, rows, sampled, notes)


_NOTES = (
    ("changed", "warning: ", "are not what stage one embedded (another size or checksum)"),
    ("touched", "", "have another modification time and the size they had (copied, or edited: images.hash would tell)"),
    ("gone", "warning: ", "cannot be reached"),
)


def _state(source: ImageSource, key: object, recorded: dict[str, Any]) -> str | None:
    """What has become of an image: `changed`, `touched`, `gone`, or None."""
    try:
        num_bytes, modified_ns = source.stat(key)
        size, time, digest = (recorded.get(name) for name in ("bytes", "modified_ns", "digest"))
        if size is None:
            return None
        if num_bytes != size:
            return "changed"
        if not (modified_ns and time) or abs(modified_ns - time) <= COARSEST_NS:
            return None
        if digest is None:
            return "touched"
        return None if source.digest(key) == digest else "changed"
    except AbsentError:
        return "gone"
    except ImageError:
        return "changed"


def note_in_record(folder: Path, watch: SourceWatch) -> None:
    """Note in a run's `run.json` what was found, the most of all calls; nothing where there is nothing to say."""
    found = watch.document()
    if found is None or not (folder / RECORD).exists():
        return
    record = read_run_record(folder)
    noted = dict(record.get(CHANGED, {}))
    before = noted.get(watch.key, {})
    noted[watch.key] = {kind: max(count, before.get(kind, 0)) for kind, count in found.items()}
    if noted != record.get(CHANGED):
        write_run_record(folder, {**record, CHANGED: noted})


def report(watch: SourceWatch, folders: Sequence[Path], tell: Callable[[str], None]) -> None:
    """Say and record, at the end of a call, which images were read and are others by now."""
    for line in watch.last_lines():
        tell(line)
    for folder in folders:
        note_in_record(folder, watch)
