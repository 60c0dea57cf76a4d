"""The one file that knows zarr: uncompressed arrays, their chunk files written whole and read through memory maps.

An uncompressed Zarr v3 chunk file is the raw little-endian array, the last one padded to the full chunk. So the store
is plain Zarr to everybody and a memory map to training: `oindex` on 1,024 random rows takes hundreds of times longer.
"""

import errno
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from .durable import digest, write_bytes
from .errors import CacheError
from .side_by_side import map_side_by_side


@dataclass(frozen=True)
class ArraySpec:
    """Shape, format and chunking of one array of a store.

    Attributes:
        shape: (rows, …) of the array.
        dtype: NumPy name, `float16`, `float32` or `int64`.
        chunk_rows: rows of one chunk file; the other axes are never divided.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int

    @property
    def fill(self) -> float | int:
        """What an unwritten row reads as: NaN, or -1 where the format has none."""
        return -1 if np.dtype(self.dtype).kind == "i" else float("nan")

    @property
    def disk_dtype(self) -> np.dtype[Any]:
        """The format of the chunk files: little-endian whatever the machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def num_chunks(self) -> int:
        return -(-self.shape[0] // self.chunk_rows)

    def rows_of(self, chunk: int) -> int:
        """Rows of one chunk; the last one may have fewer than the others."""
        return min(self.chunk_rows, self.shape[0] - chunk * self.chunk_rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of all chunk files, padding included."""
        return self.num_chunks * self.chunk_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of each chunk file."""
        return self.chunk_rows * int(np.prod(self.shape[1:])) * np.dtype(self.dtype).itemsize


def declare_arrays(store: Path, specs: Mapping[str, ArraySpec]) -> None:
    """Write the metadata of a Zarr v3 group with these arrays; chunks come later, through `write_chunk`.

    The documents are made by zarr in memory and written durably by us: zarr's own LocalStore never fsyncs and leaves
    `*.partial` files behind when it is killed. Documents that already say the same are not touched.
    """
    memory = MemoryStore()
    root = zarr.create_group(memory, zarr_format=3)
    for name, spec in specs.items():
        group = root
        *parents, leaf = name.split("/")
        for parent in parents:
            group = group.require_group(parent)
        group.create_array(
            leaf,
            shape=spec.shape,
            chunks=(spec.chunk_rows, *spec.shape[1:]),
            dtype=np.dtype(spec.dtype).newbyteorder("<"),
            fill_value=spec.fill,
            compressors=None,
            filters=None,
            config={"write_empty_chunks": True},
        )
    for key in sync(_keys(memory)):
        data = sync(memory.get(key, default_buffer_prototype()))
        assert data is not None
        path, document = store / key, data.to_bytes()
        if not path.exists() or path.read_bytes() != document:
            write_bytes(path, document)


async def _keys(memory: MemoryStore) -> list[str]:
    return [key async for key in memory.list()]


def chunk_path(store: Path, name: str, chunk: int, num_axes: int = 2) -> Path:
    """File of one chunk: `NAME/c/3/0` for the fourth chunk of a two-dimensional array."""
    return store.joinpath(name, "c", str(chunk), *["0"] * (num_axes - 1))


def write_chunk(store: Path, name: str, spec: ArraySpec, chunk: int, block: NDArray[Any]) -> str:
    """Write one chunk file durably, padded with the fill value to the full chunk.

    Args:
        block: (n, …) rows of this chunk, n at most `spec.chunk_rows`; cast to the array's format.

    Returns:
        Digest of the file's bytes.
    """
    if block.shape[1:] != spec.shape[1:] or len(block) > spec.chunk_rows:
        raise ValueError(
            f"{name}: a block of shape {block.shape} does not fit chunks of {spec.chunk_rows} x {spec.shape[1:]}"
        )
    padded = np.full((spec.chunk_rows, *spec.shape[1:]), spec.fill, dtype=spec.disk_dtype)
    padded[: len(block)] = block
    data = padded.tobytes()
    write_bytes(chunk_path(store, name, chunk, len(spec.shape)), data)
    return digest(data)


def read_chunk(store: Path, name: str, spec: ArraySpec, chunk: int) -> NDArray[Any]:
    """One chunk file, padding and all, mapped into memory: (chunk_rows, …), read-only.

    Raises:
        CacheError: if it is missing or cut.
    """
    return _map_chunk(chunk_path(store, name, chunk, len(spec.shape)), spec)


def first_rows(store: Path, name: str, spec: ArraySpec, chunk: int, num_rows: int, wanted: str) -> NDArray[Any]:
    """The first rows of a chunk file whose every byte is as it was written.

    Args:
        wanted: digest of the file.

    Returns:
        (num_rows, …), read-only.

    Raises:
        CacheError: if the file is missing or is another one.
    """
    path = chunk_path(store, name, chunk, len(spec.shape))
    data = path.read_bytes() if path.exists() else b""
    if digest(data) != wanted:
        raise CacheError(f"{path}: missing or damaged (its checksum differs); run `dimefm cache repair` first")
    return np.frombuffer(data, dtype=spec.disk_dtype).reshape(-1, *spec.shape[1:])[:num_rows]


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
        chunks = [_map_chunk(path, spec) for path in paths]
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


def read_spec(store: Path, name: str) -> ArraySpec:
    """Shape, format and chunking of an array on disk.

    Raises:
        CacheError: if it is missing, or compressed, or chunked along another axis than rows.
    """
    try:
        array = zarr.open_array(store / name, mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise CacheError(
            f"{store / name}: not a readable Zarr array ({error}); run `dimefm cache-teacher` again"
        ) from error
    if array.compressors or array.filters or array.chunks[1:] != array.shape[1:] or array.dtype.byteorder == ">":
        raise CacheError(
            f"{store / name}: compressed or divided along another axis than rows; wanted raw chunks of whole rows"
        )
    return ArraySpec(array.shape, array.dtype.name, array.chunks[0])


def _map_chunk(path: Path, spec: ArraySpec) -> NDArray[Any]:
    shape = (spec.chunk_rows, *spec.shape[1:])
    wanted = int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
    try:
        found = path.stat().st_size
        if found != wanted:
            raise CacheError(f"{path}: {found} bytes, wanted {wanted}; this chunk is damaged")
        # A plain ndarray over the map: the memmap subclass makes every small gather several times slower.
        return np.asarray(np.memmap(path, dtype=spec.disk_dtype, mode="r", shape=shape))
    except FileNotFoundError as error:
        raise CacheError(f"{path}: missing; this chunk is lost") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise CacheError(
                f"{path}: too few file handles for {spec.num_chunks} chunk files; raise `ulimit -n`"
            ) from error
        raise


def _allow_open_files(num_more: int) -> None:
    """Every map holds its file open: lift the soft limit towards the hard one when there are many chunks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_more * 4 + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
