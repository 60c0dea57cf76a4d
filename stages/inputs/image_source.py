"""What a source of images is: a list of images, each with a name that never changes, and the bytes behind each.

Stage one lists, embeds and keeps pixels through it; stage two, scoring, repair and verification read rows through it.
A kind of source is one file with a class that derives from `ImageSource`, and one line in `open_source.KINDS`.

Worker processes import this file: what they do without (pyarrow, zarr) is imported where it is used.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.cores import map_ahead
from ...cache.disk.durable import digest
from ...cache.errors import InputError
from ..images.decode import ImageError

if TYPE_CHECKING:
    from ...cache.disk.row_tables import RowTable

FILES = "files"
"""How a run's record names the original images; kept pixels are named by their setting, `jpeg-256`."""

HASHED_AHEAD = 256
"""Images that are read to be hashed before their digests are taken."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that a source lists; nothing of it has been read.

    Attributes:
        source: its name, which is the identity of its row: unique, and the same in every listing. For a folder the
            path below it, with `/`; bytes that are not UTF-8 are shown as `\\xff`.
        bytes: size of the encoded image; 0 where it could not be looked at.
        modified_ns: time of its last change, nanoseconds since 1970; 0 where it is not known.
        problem: why it can never be read under this name, or None.
    """

    source: str
    bytes: int
    modified_ns: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LabelledImage(FoundImage):
    """An image of a labelled set; its class is the part of its name before the first `/`."""

    class_id: str = ""


Found = TypeVar("Found", bound=FoundImage)


class ImageList(list[Found]):
    """The images that a source lists, and what there is to say about the listing.

    Attributes:
        notes: lines on what was passed over; a source from outside of the package may have none of them.
    """

    notes: Sequence[str] = ()


def list_notes(images: Sequence[FoundImage], key: str) -> list[str]:
    """What a listing passed over, a line for each kind.

    Args:
        key: the config's name for the source.
    """
    return [f"{key}: {note}" for note in getattr(images, "notes", ())]


@runtime_checkable
class ImageSource(Protocol):
    """Encoded images. Derive from it, and implement `list` and `read`; the rest has defaults.

    A source travels to worker processes: it must pickle, and hold nothing that grows with the number of images. What
    `read` needs to find one image, its key, is made of the image's row in the row table (`columns`).

    Attributes:
        name: how a run's record names it; `files` for every source of original images.
        location: how messages name the source as a whole: a path or a URL. One from
            outside of the package that says none is named as in the config.
        absent: what messages say of a source that is not at hand.
        columns: columns of the row table that a key is made of: the value itself of one column, a tuple of several.
    """

    name: str = FILES
    location: str = ""
    absent: str = "not at hand"
    columns: tuple[str, ...] = ("source",)

    def at_hand(self) -> bool:
        """Whether the source can be read now: a folder is mounted, a server answers."""
        return True

    @abstractmethod
    def list(self) -> Sequence[FoundImage]:
        """Every image, in the order that numbers the rows; the same images always come in the same order.

        Raises:
            InputError: if the source is missing, cannot be listed, or has no image.
        """

    @abstractmethod
    def read(self, key: Any) -> bytes:
        """The encoded image: JPEG, PNG or WebP. Called by several threads and processes at once.

        Raises:
            ImageError: if it cannot be used.
            AbsentError: an ImageError, if it cannot be reached: it may be there again later, and stage one asks again.
            InputError: if that is not the image's fault.
        """

    def stat(self, key: Any) -> tuple[int, int]:
        """Size of the encoded image in bytes, and the time of its last change (0: not known), as `list` gives them.

        Raises:
            ImageError: if it cannot be used; AbsentError if it cannot be reached.
        """
        return len(self.read(key)), 0

    def passes_over(self, name: str) -> bool:
        """Whether `list` leaves an image out for its name; rows of an earlier listing may have such names."""
        return False

    def digest(self, key: Any) -> str | None:
        """XXH3-128 of the encoded image; None if it cannot be read."""
        try:
            return digest(self.read(key))
        except ImageError:
            return None

    def locate(self, key: Any) -> str:
        """Where an image is, for messages: a path, or a row of a file."""
        return f"{self.location}: {key}"


def require_at_hand(source: ImageSource, wanted: str) -> None:
    """Raises InputError if a source cannot be read now; `wanted` says what for."""
    if not source.at_hand():
        raise InputError(f"{source.location}: {source.absent}; {wanted}")


def label_images(source: ImageSource, class_ids: Collection[str]) -> ImageList[LabelledImage]:
    """The images of a labelled set, whose names begin with `<class id>/`; a class without images is allowed.

    Raises:
        InputError: as `ImageSource.list`, and if the name of an image does not begin so.
    """
    known = frozenset(class_ids)
    found = source.list()
    images = ImageList(LabelledImage(**asdict(image), class_id=image.source.partition("/")[0]) for image in found)
    images.notes = getattr(found, "notes", ())
    strangers = sorted({image.class_id for image in images} - known)
    if strangers:
        shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        raise InputError(
            f"{source.location}: {shown}: not a class id; wanted one folder for each class id and nothing else"
        )
    return images


def image_digests(source: ImageSource, keys: Iterable[Any]) -> Iterator[str | None]:
    """The digest of each image, in order, read by several threads; None for one that cannot be read."""
    with ThreadPoolExecutor(thread_name_prefix="hash") as pool:
        yield from map_ahead(pool, source.digest, keys, HASHED_AHEAD)


def keys_of(source: ImageSource, columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    """The key of each row of some columns of a row table."""
    first, *others = (columns[name] for name in source.columns)
    return list(zip(first, *others, strict=True)) if others else list(first)


def row_keys(source: ImageSource, table: RowTable) -> Callable[[NDArray[np.int64]], Sequence[Any]]:
    """A function from row numbers to the keys of these rows.

    It holds each column flat, so that the keys of a batch are gathered without an object for any other row.
    """
    if source.columns == ("row",):
        return lambda rows: np.asarray(rows, dtype=np.int64).tolist()
    import pyarrow as pa

    def flat(name: str) -> pa.Array:
        column = table.column(name)
        return (column.cast(pa.large_string()) if column.type == pa.string() else column).combine_chunks()

    columns = {name: flat(name) for name in source.columns}

    def keys(rows: NDArray[np.int64]) -> Sequence[Any]:
        taken = pa.array(rows)
        return keys_of(source, {name: column.take(taken).to_pylist() for name, column in columns.items()})

    return keys
