"""The one file that knows zarr: uncompressed arrays, their chunk files written whole and mapped whole.

An uncompressed Zarr v3 chunk file is the raw little-endian array, the last one padded to the full chunk. So the store
is plain Zarr to everybody and a memory map to training.
"""

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.storage import MemoryStore

from ..errors import CacheError
from .durable import Attempt, attempt_bytes, digest, write_bytes


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
    documents: dict[str, Any] = {}
    root = zarr.create_group(MemoryStore(documents), zarr_format=3)
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
    for key, document in documents.items():
        path, data = store / key, document.to_bytes()
        if not path.exists() or path.read_bytes() != data:
            write_bytes(path, data)


def chunk_path(store: Path, name: str, chunk: int, num_axes: int = 2) -> Path:
    """File of one chunk: `NAME/c/3/0` for the fourth chunk of a two-dimensional array."""
    return store.joinpath(name, "c", str(chunk), *["0"] * (num_axes - 1))


def attempt_chunk(store: Path, name: str, spec: ArraySpec, chunk: int, block: NDArray[Any]) -> Attempt:
    """Write one chunk file beside its place, padded with the fill value to the full chunk.

    Args:
        block: (n, …) rows of this chunk, n at most `spec.chunk_rows`; cast to the array's format.
    """
    return attempt_bytes(chunk_path(store, name, chunk, len(spec.shape)), chunk_data(name, spec, block))


def chunk_data(name: str, spec: ArraySpec, block: NDArray[Any]) -> bytes:
    """The bytes of a chunk file, as `write_chunk` writes them."""
    if block.shape[1:] != spec.shape[1:] or len(block) > spec.chunk_rows:
        raise ValueError(
            f"{name}: a block of shape {block.shape} does not fit chunks of {spec.chunk_rows} x {spec.shape[1:]}"
        )
    padded = np.full((spec.chunk_rows, *spec.shape[1:]), spec.fill, dtype=spec.disk_dtype)
    padded[: len(block)] = block
    return padded.tobytes()


def write_chunk(store: Path, name: str, spec: ArraySpec, chunk: int, block: NDArray[Any]) -> str:
    """Write one chunk file durably, in its place; arguments as in `attempt_chunk`.

    Returns:
        Digest of the file's bytes.
    """
    attempt = attempt_chunk(store, name, spec, chunk, block)
    attempt.commit()
    return attempt.digest


def read_chunk(store: Path, name: str, spec: ArraySpec, chunk: int) -> NDArray[Any]:
    """One chunk file, padding and all, mapped into memory: (chunk_rows, …), read-only.

    Raises:
        CacheError: if it is missing or cut.
    """
    return map_chunk(chunk_path(store, name, chunk, len(spec.shape)), spec)


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


def map_chunk(path: Path, spec: ArraySpec) -> NDArray[Any]:
    """Map a chunk file whole, padding and all.

    Raises:
        CacheError: if it is missing or cut, or the process has too few file handles.
    """
    require_whole(path, spec)
    shape = (spec.chunk_rows, *spec.shape[1:])
    try:
        # A plain ndarray over the map: the memmap subclass makes every small gather several times slower.
        return np.asarray(np.memmap(path, dtype=spec.disk_dtype, mode="r", shape=shape))
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise CacheError(
                f"{path}: too few file handles for {spec.num_chunks} chunk files; raise `ulimit -n`"
            ) from error
        if error.errno == errno.ENOMEM:
            raise CacheError(
                f"{path}: no more memory maps are allowed for {spec.num_chunks} chunk files; raise "
                "vm.max_map_count (sysctl)"
            ) from error
        raise


def require_whole(path: Path, spec: ArraySpec) -> None:
    """Raises CacheError if a chunk file is missing or cut."""
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise CacheError(f"{path}: missing; this chunk is lost") from error
    if found != spec.chunk_bytes:
        raise CacheError(f"{path}: {found} bytes, wanted {spec.chunk_bytes}; this chunk is damaged")
