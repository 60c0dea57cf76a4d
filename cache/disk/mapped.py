"""Rows of arrays through memory maps of their chunk files: zarr's own `oindex` takes hundreds of times longer."""

import resource
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError
from .arrays import ArraySpec, chunk_path, map_chunk, read_spec
from .side_by_side import map_side_by_side


class MappedArray:
    """Rows of an array, gathered from memory-mapped chunk files. Any number of readers; none of them writes."""

    def __init__(
        self,
        chunks: list[NDArray[Any]],
        spec: ArraySpec,
        joined: NDArray[np.uint8] | None = None,
        view: int | None = None,
    ) -> None:
        """Use `open`. `joined` is the bytes of all chunks in a row, where they could be mapped so."""
        self._whole = chunks, spec, joined
        self._num_views = 1 if view is None else spec.shape[1]
        self._view = view or 0
        self._chunks = chunks if view is None else [chunk[:, view] for chunk in chunks]
        self.spec = spec if view is None else ArraySpec((spec.shape[0], *spec.shape[2:]), spec.dtype, spec.chunk_rows)
        # A row as one opaque item is copied in one go: fancy indexing over numbers takes a third longer.
        self._item = np.dtype((np.void, int(np.prod(self.spec.shape[1:])) * spec.disk_dtype.itemsize))
        self._chunks_of_items = [chunk.reshape(-1).view(self._item) for chunk in chunks]
        self._joined_items = None if joined is None else joined.view(self._item)

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
        chunks = [map_chunk(path, spec) for path in paths]
        joined = map_side_by_side(paths, spec.chunk_bytes)
        if joined is not None:
            shape = (spec.chunk_rows, *spec.shape[1:])
            chunks = [part.view(spec.disk_dtype).reshape(shape) for part in np.split(joined, spec.num_chunks)]
        return cls(chunks, spec, joined)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.spec.dtype)

    def __len__(self) -> int:
        return self.spec.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[Any]:
        """Gather rows into a new array, in the order asked for.

        Raises:
            IndexError: if a row is negative or beyond the last one.
            TypeError: for anything but integers: a boolean mask would be taken for rows 0 and 1.
        """
        return self._gather(self._checked(rows) * self._num_views + self._view)

    @property
    def num_views(self) -> int:
        """Views of each row: of a (rows, views, D) array, how many; of any other 1."""
        _, spec, _ = self._whole
        return spec.shape[1] if len(spec.shape) == 3 else 1

    def view(self, number: int) -> "MappedArray":
        """One view of every row of a (rows, views, D) array, as an array (rows, D) over the same files.

        Raises:
            IndexError: if there is no such view.
        """
        chunks, spec, joined = self._whole
        if len(spec.shape) != 3 or not 0 <= number < spec.shape[1]:
            raise IndexError(f"view {number} of an array of shape {spec.shape}")
        return MappedArray(chunks, spec, joined, number)

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

    def _checked(self, rows: slice | Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise TypeError(f"rows of {rows.dtype}: wanted row numbers; np.flatnonzero makes them of a mask")
        numbers: NDArray[np.int64] = rows.astype(np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of an array of {len(self)} rows")
        return numbers

    def _gather(self, items: NDArray[np.int64]) -> NDArray[Any]:
        """Copy items, counted through the whole array: rows, or views of rows."""
        if self._joined_items is not None:
            return self._joined_items.take(items).view(self.spec.disk_dtype).reshape(len(items), *self.shape[1:])
        order = np.argsort(items)
        items = items[order]
        in_chunk = self.spec.chunk_rows * self._num_views
        chunk_of = items // in_chunk
        offset = items - chunk_of * in_chunk
        out = np.empty(len(items), dtype=self._item)
        edges = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(items)]
        for start, stop in pairwise(edges) if len(items) else []:
            out[order[start:stop]] = self._chunks_of_items[chunk_of[start]].take(offset[start:stop])
        return out.view(self.spec.disk_dtype).reshape(len(items), *self.shape[1:])

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
