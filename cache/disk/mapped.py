"""Rows of arrays through memory maps of their chunk files: zarr's own `oindex` takes hundreds of times longer."""

import mmap
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError
from .arrays import ArraySpec, chunk_path, map_chunk, read_spec, require_whole
from .gather import LOOKED_AT, Items, gather
from .side_by_side import advise, map_side_by_side

DENSE = 8
"""A gather of at least every eighth row of a stretch reads that stretch as a scan does: ahead, in large pieces."""

Rows = int | np.integer[Any] | slice | Sequence[int] | NDArray[np.integer[Any]]


@dataclass(frozen=True)
class _Map:
    """All chunk files of an array, mapped once: each as (chunk_rows, …), and their bytes in a row where that works."""

    chunks: list[NDArray[Any]]
    joined: NDArray[np.uint8] | None

    @classmethod
    def of(cls, paths: list[Path], spec: ArraySpec, advice: int | None) -> "_Map":
        joined = map_side_by_side(paths, spec.chunk_bytes)
        if joined is not None:
            shape = (spec.chunk_rows, *spec.shape[1:])
            chunks = [part.view(spec.disk_dtype).reshape(shape) for part in np.split(joined, spec.num_chunks)]
        else:
            chunks = [map_chunk(path, spec) for path in paths]
        if advice is not None:
            for mapped in chunks if joined is None else [joined]:
                advise(mapped, advice)
        return cls(chunks, joined)


class MappedArray:
    """Rows of an array, gathered from memory-mapped chunk files. Any number of readers; none of them writes.

    Files are mapped twice: once for rows here and there, of which the system reads the pages alone, and once for
    scans, for which it reads ahead, and for whatever is in memory.
    """

    def __init__(self, sparse: _Map, plain: _Map, spec: ArraySpec, view: int | None = None) -> None:
        """Use `open`."""
        self._whole = sparse, plain, spec
        self._num_views = 1 if view is None else spec.shape[1]
        self._view = view or 0
        self._chunks = plain.chunks if view is None else [chunk[:, view] for chunk in plain.chunks]
        self.spec = spec if view is None else ArraySpec((spec.shape[0], *spec.shape[2:]), spec.dtype, spec.chunk_rows)
        num_bytes = int(np.prod(self.spec.shape[1:])) * spec.disk_dtype.itemsize
        self._sparse, self._plain = (Items(each.chunks, each.joined, num_bytes) for each in (sparse, plain))

    @classmethod
    def open(cls, store: Path, name: str, num_rows: int | None = None, under: Path | None = None) -> "MappedArray":
        """Map an array of a store.

        Args:
            num_rows: rows that exist according to the manifest; None takes the array's own length.
            under: the store that has the files which `store` has not.

        Raises:
            CacheError: if the array or a chunk file of it is missing, cut, or not laid out as this project writes it.
        """
        spec = read_spec(under if under and not (store / name / "zarr.json").exists() else store, name)
        if num_rows is not None:
            if num_rows > spec.shape[0]:
                raise CacheError(f"{store / name}: holds {spec.shape[0]} rows, the manifest counts {num_rows}")
            spec = ArraySpec((num_rows, *spec.shape[1:]), spec.dtype, spec.chunk_rows)
        _allow_open_files(spec.num_chunks)
        paths = [chunk_path(store, name, i, len(spec.shape)) for i in range(spec.num_chunks)]
        if under:
            paths = [path if path.exists() else under / path.relative_to(store) for path in paths]
        for path in paths:
            require_whole(path, spec)
        # No MADV_SEQUENTIAL: without advice the system reads ahead as well, and keeps longer what was read.
        plain = _Map.of(paths, spec, None)
        try:
            sparse = _Map.of(paths, spec, mmap.MADV_RANDOM)
        except (CacheError, OSError):  # the system allows no more maps: what is on disk is read as it reads ahead
            sparse = plain
        return cls(sparse, plain, spec)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spec.dtype)

    def __len__(self) -> int:
        return self.spec.shape[0]

    def __getitem__(self, rows: Rows) -> NDArray[Any]:
        """Gather rows into a new array, in the order asked for.

        Args:
            rows: a slice, or row numbers of any shape, as NumPy takes them, but for negative ones.

        Returns:
            The shape of `rows`, followed by that of a row: (D,) of one number, (B, D) of B.

        Raises:
            IndexError: if a row is negative or beyond the last one.
            TypeError: for anything but integers: a boolean mask would be taken for rows 0 and 1.
        """
        numbers = self._checked(rows)
        return self._gather(numbers if self._num_views == 1 else numbers * self._num_views + self._view)

    @property
    def num_views(self) -> int:
        """Views of each row: of a (rows, views, D) array, how many; of any other 1."""
        _, _, spec = self._whole
        return spec.shape[1] if len(spec.shape) == 3 else 1

    def view(self, number: int) -> "MappedArray":
        """One view of every row of a (rows, views, D) array, as an array (rows, D) over the same files.

        Raises:
            IndexError: if there is no such view.
        """
        sparse, plain, spec = self._whole
        if len(spec.shape) != 3 or not 0 <= number < spec.shape[1]:
            raise IndexError(f"view {number} of an array of shape {spec.shape}")
        return MappedArray(sparse, plain, spec, number)

    def at(self, rows: NDArray[np.integer[Any]], views: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Gather one view of each row, of a (rows, views, D) array.

        Args:
            rows, views: (B,) row numbers, and which view of each.

        Returns:
            (B, D), a new array.

        Raises:
            IndexError: if a row or a view is not there.
        """
        if len(views) and not 0 <= views.min() <= views.max() < self.num_views:
            raise IndexError(f"views {views.min()} to {views.max()} of {self.num_views}")
        return self._centre._gather(self._checked(rows) * self.num_views + views)

    @cached_property
    def _centre(self) -> "MappedArray":
        return self.view(0)

    def _checked(self, rows: Rows) -> NDArray[np.int64]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"rows of {rows.dtype}: wanted row numbers; np.flatnonzero makes them of a mask")
        numbers: NDArray[np.int64] = rows.astype(np.int64, copy=False)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of an array of {len(self)} rows")
        return numbers

    def _gather(self, items: NDArray[np.int64]) -> NDArray[Any]:
        """Copy items, counted through the whole array: rows, or views of rows."""
        wanted = items.reshape(-1)
        found = self._plain.take(wanted) if self._is_dense(wanted) else gather(self._sparse, self._plain, wanted)
        return found.view(self.spec.disk_dtype).reshape(*items.shape, *self.shape[1:])

    def _is_dense(self, items: NDArray[np.int64]) -> bool:
        if items.size < LOOKED_AT:  # too few to read ahead for
            return False
        most = DENSE * items.size * self._num_views
        # The first and the last one mostly tell, and looking at all of them costs some per cent of the copying.
        return abs(items[-1] - items[0]) < most and items.max() - items.min() < most

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, read-only view of the rows) of each chunk, in order, nothing copied."""
        for i, chunk in enumerate(self._chunks):
            start = i * self.spec.chunk_rows
            yield start, chunk[: len(self) - start]


def _allow_open_files(num_more: int) -> None:
    """Every map holds its file open: lift the soft limit towards the hard one when there are many chunks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_more * 4 + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
