"""Where the loader's workers get the bytes of an image from: its file, or wherever its pixels are kept.

Worker processes import this file: what they do without (pyarrow, zarr) is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError
from .image_folder import read_file

if TYPE_CHECKING:
    import pyarrow as pa

    from ...cache.reader.feature_cache import EmbeddingSet


class PixelSource(Protocol):
    """Encoded images by row. A worker process gets a pickled copy: it must hold nothing that grows with the rows.

    What a worker needs of a row travels in its ticket, so a source keeps its row table on the side of `tickets` and
    leaves it out when it is pickled (`__getstate__`).
    """

    @property
    def name(self) -> str:
        """What a run's record calls it: `files`, or what the cache keeps."""

    def require(self) -> None:
        """Raises InputError if there is nothing to read from: before a run, not in the middle of it."""

    def tickets(self, rows: NDArray[np.int64]) -> Sequence[Any]:
        """What `read` needs for each row: small and picklable. Called where the loader is, never in a worker."""

    def read(self, ticket: Any) -> bytes | memoryview:
        """An image file's bytes. Called in workers.

        Raises:
            ImageError: if it cannot be read.
            InputError: if that is not the image's fault.
        """

    def where(self, ticket: Any) -> str:
        """How messages call it: a path, or a row of a file."""


class ImageFiles:
    """The files that stage one embedded. A ticket is a path below their folder."""

    name = "files"

    def __init__(self, root: Path, images: EmbeddingSet) -> None:
        """Files of image rows.

        Args:
            root: folder that the rows are relative to.
            images: the cached images.

        """
        import pyarrow as pa

        self._root = root
        # One flat column: gathering the names of a batch touches no other row and makes no object of one.
        self._sources: pa.Array | None = images.rows.column("source").cast(pa.large_string()).combine_chunks()

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root, "_sources": None}

    def require(self) -> None:
        if not self._root.is_dir():
            raise InputError(f"{self._root}: no such folder; stage two needs the images that stage one embedded")

    def tickets(self, rows: NDArray[np.int64]) -> list[str]:
        import pyarrow as pa

        assert self._sources is not None, "tickets are drawn where the source was made"
        names: list[str] = self._sources.take(pa.array(rows)).to_pylist()
        return names

    def read(self, ticket: str) -> bytes:
        return read_file(self._root / ticket)

    def where(self, ticket: str) -> str:
        return str(self._root / ticket)
