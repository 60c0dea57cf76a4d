"""Keeping pixels: an image that was decoded anyway, small and as a JPEG, into the pack of its shard.

Lanczos comes nearest to the original in what a student's crop is resized from next. Colour at half resolution (4:2:0)
takes a third less time to decode, in every epoch of every student; at quality 90 it puts a view off by about as much as
the resize itself does, and full colour would bring it a seventh nearer.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from PIL import ExifTags, Image

from ...cache.disk.cores import map_ahead, usable_cores
from ...cache.disk.durable import Attempt, digest
from ...cache.errors import InputError
from ...cache.reader.pixel_packs import PackWriter, attempting_pack
from ...cache.version.journal import ShardRecord
from ..images.decode import ImageError, decode_image
from ..images.jpeg import size_note
from ..inputs.image_source import ImageSource
from ..profiling import phase
from .tasks import QUALITY, SUBSAMPLING, PackedImage, PackTask

FILTER = Image.Resampling.LANCZOS
REDUCING_GAP = 2.0
"""Large photos are averaged down to twice the size first: half the time, the same distance to the original."""

LONGEST = 65500
"""Pixels that a JPEG's side may have; what is longer is made smaller by its longer side."""

IN_FLIGHT = 4
"""Images in preparation for each thread."""


class SourceError(InputError):
    """An image that a row was made from is no longer what it was."""


@dataclass
class ShardPack:
    """The pack of one shard in the making: small images come in any order and are written in the order of rows.

    Attributes:
        skip: rows at the beginning that the pack has already.
    """

    task: PackTask
    writer: PackWriter
    skip: int
    _waiting: dict[int, bytes] = field(default_factory=dict)

    def add(self, row: int, small: bytes) -> None:
        """A small image; it waits until its batch is known to be good."""
        self._waiting[row] = small

    def write(self, rows: Iterable[int], failed: Callable[[int], bool]) -> None:
        """Write the next rows, in order; those that failed without pixels."""
        for row in rows:
            small = self._waiting.pop(row, b"")
            if row >= self.skip:
                self.writer.add(b"" if failed(row) else small)

    @property
    def record(self) -> ShardRecord:
        """What the journal counts, once the pack is finished."""
        return ShardRecord(self.task.array, self.task.shard, self.writer.num_rows, self.writer.digest)

    @property
    def attempt(self) -> Attempt:
        """The file, which waits beside its place once `open_pack` has ended."""
        assert self.writer.attempt
        return self.writer.attempt


@contextmanager
def open_pack(task: PackTask | None, skip: int = 0) -> Iterator[ShardPack | None]:
    """Write a pack, which is durable after this and waits to be committed; None where no pixels are kept."""
    if task is None:
        yield None
        return
    with attempting_pack(task.path, task.shard_rows) as writer:
        if task.existing:
            writer.take_over(task.existing.path, task.existing.num_rows, task.existing.digest)
        yield ShardPack(task, writer, skip)


@phase("keep")
def make_small(data: bytes, image: Image.Image, side: int, *, note_size: bool = False) -> bytes:
    """A JPEG of an image, its shorter side at most `side` pixels. Metadata and colour profile are left behind.

    A file that is already what would come out, an upright RGB JPEG no larger than that and of at most a byte a pixel,
    is kept as it is: coding it again would only lose.

    Args:
        data: the file's bytes.
        image: decoded from it: upright, RGB.
        note_size: say in a comment what size it had, if it is made smaller.
    """
    width, height = image.size
    share = min(1.0, side / min(width, height), LONGEST / max(width, height))
    if share == 1 and len(data) <= width * height and _is_plain_jpeg(data):
        return data
    size = max(1, round(width * share)), max(1, round(height * share))
    small = image.resize(size, FILTER, reducing_gap=REDUCING_GAP) if share < 1 else image.copy()
    small.info = {}  # Pillow would write a comment that is in there
    out = io.BytesIO()
    comment = size_note(image.size) if note_size and share < 1 else b""
    small.save(out, "JPEG", quality=QUALITY, subsampling=SUBSAMPLING, comment=comment)
    return out.getvalue()


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether these bytes are an upright RGB JPEG, by their header: nothing is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # the parsers raise almost anything; then it is coded again from its pixels
        return False


def pack_shard(task: PackTask, source: ImageSource, images: Iterable[PackedImage | None], workers: int) -> ShardRecord:
    """Write a pack from the source alone, where the embeddings are there already.

    Args:
        images: for each row of the shard its image; None for one that failed.
        workers: threads that read and decode; 0 takes one for each core.

    Raises:
        SourceError: if an image that has an embedding is gone, unreadable or has changed.
    """
    num_threads = workers or usable_cores()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="keep") as pool, open_pack(task) as pack:
        assert pack is not None
        for small in map_ahead(pool, partial(_small_of, source, task), images, IN_FLIGHT * num_threads):
            pack.writer.add(small)
    pack.attempt.commit()
    return pack.record


def _small_of(source: ImageSource, task: PackTask, image: PackedImage | None) -> bytes:
    if image is None:
        return b""
    try:
        data = source.read(image.key)
        if len(data) != image.bytes or (image.digest is not None and digest(data) != image.digest):
            raise ImageError("it has changed since")
        return make_small(data, decode_image(data), task.side, note_size=task.note_size)
    except ImageError as error:
        if image.lost:
            return b""
        raise SourceError(
            f"{source.locate(image.key)}: its pixels cannot be kept: {error}; put back what was embedded"
        ) from error
