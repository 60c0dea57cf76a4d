"""The one file that knows FAISS: nearest rows by cosine, NumPy in and NumPy out.

An index is exact when it is small and approximate (IVF over float16) when it is large. How good an approximate one is
gets measured, not assumed: the number of probed lists rises until its recall is what was asked for.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError
from .cosine import BLOCK_BYTES, Rows, best_cosines, recall, unit_blocks, unit_rows
from .durable import replacing

IndexKind = Literal["auto", "flat", "ivf"]

FLAT_ROWS = 100_000
"""`auto` is exact up to this many rows. Measured with queries of another modality, which need many lists probed: at
100,000 x 768 an IVF index searches no faster than the exact one, at 200,000 x 256 three times as fast."""

MIN_ROWS_PER_LIST = 39
"""FAISS's own lower bound for k-means; fewer training rows make poor lists."""

TRAIN_ROWS_PER_LIST = 64
MAX_GPU_NPROBE = 2048
"""FAISS's limit of probed lists on a GPU."""

_log = logging.getLogger(__name__)


def resolve_kind(num_rows: int, kind: IndexKind) -> Literal["flat", "ivf"]:
    """What `auto` means for this many rows."""
    if kind == "auto":
        return "flat" if num_rows <= FLAT_ROWS else "ivf"
    return kind


def num_lists(num_rows: int) -> int:
    """Lists of an IVF index: the power of two at or below 4 * sqrt(rows), fewer where too few rows could train them."""
    wanted = min(4 * num_rows**0.5, num_rows / MIN_ROWS_PER_LIST)
    return 1 << max(0, int(np.log2(max(1.0, wanted))))


def index_bytes(num_rows: int, width: int, kind: IndexKind) -> int:
    """About the size of an index's file, which is also what it takes in memory to search it."""
    if resolve_kind(num_rows, kind) == "flat":
        return num_rows * (4 * width + 8)
    return num_rows * (2 * width + 8) + num_lists(num_rows) * 4 * width


def build_bytes(num_rows: int, width: int, kind: IndexKind) -> int:
    """About the most memory that building an index takes: arrays double as they grow, and an IVF index is trained."""
    training = 0 if resolve_kind(num_rows, kind) == "flat" else num_lists(num_rows) * TRAIN_ROWS_PER_LIST * 4 * width
    return max(training, 2 * index_bytes(num_rows, width, kind)) + 8 * min(BLOCK_BYTES, 4 * width * num_rows)


def to_gpu_if_any(index: Any) -> Any:
    """The index on the GPUs of this machine, divided among all of them; the index itself where there is none.

    The one place where FAISS meets a GPU. For searching only: the caller keeps the CPU index for saving. When the GPUs
    cannot hold it, it stays on the CPU and a warning says so. Tested with stand-ins only: it has not run on a real GPU.
    """
    if faiss.get_num_gpus() == 0 or getattr(index, "nprobe", 1) > MAX_GPU_NPROBE:
        return index
    options = faiss.GpuMultipleClonerOptions()
    options.shard = True
    try:
        return faiss.index_cpu_to_all_gpus(index, co=options)
    except RuntimeError as error:
        _log.warning("the index stays on the CPU: %s", _one_line(error))
        return index


class Index:
    """Nearest rows by cosine.

    Attributes:
        width: D of the rows and queries.
        num_rows: rows of the array that it was built over; those without a direction are not in it.
    """

    def __init__(self, cpu_index: Any, num_rows: int) -> None:
        self._cpu_index = cpu_index
        self._searcher: Any = None
        self.width = int(cpu_index.d)
        self.num_rows = num_rows

    def search(self, queries: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k rows nearest to each query, best first.

        Args:
            queries: (n, D), any float dtype, any norm.

        Returns:
            ids (n, k) int64 and scores (n, k) float32, the index's own reading of the cosine. -1 and NaN where there
            is no neighbour: fewer than k rows, or a query that is zero or not finite.

        Raises:
            ValueError: if the queries are not (n, D) floats, or k is below 1.
            CacheError: if the index returns a row that its array does not have.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width or queries.dtype.kind != "f":
            raise ValueError(f"queries {queries.shape} {queries.dtype}: wanted floats of shape (n, {self.width})")
        if k < 1:
            raise ValueError(f"k = {k}: wanted at least 1")
        if self._searcher is None:
            self._searcher = to_gpu_if_any(self._cpu_index)
        unit, good = unit_rows(queries)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), np.nan, dtype=np.float32)
        if good.any() and self._cpu_index.ntotal:
            found_scores, found = self._searcher.search(unit[good], k)
            if found.max() >= self.num_rows:
                raise CacheError(f"the index names row {found.max()} of {self.num_rows}; delete it and build it again")
            ids[good] = found
            scores[good] = np.where(found >= 0, found_scores, np.nan)
        return ids, scores

    def rows(self) -> NDArray[np.int64]:
        """Numbers of the rows that are in the index, ascending."""
        if isinstance(self._cpu_index, faiss.IndexIDMap2):
            return np.sort(faiss.vector_to_array(self._cpu_index.id_map).astype(np.int64))
        lists = self._cpu_index.invlists
        ids = [
            faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).astype(np.int64)
            for i in range(self._cpu_index.nlist)
            if lists.list_size(i)
        ]
        return np.sort(np.concatenate(ids)) if ids else np.empty(0, dtype=np.int64)

    def save(self, path: Path) -> None:
        """Write the index durably, as a plain FAISS file.

        Raises:
            CacheError: if it cannot be written.
        """
        with replacing(path) as partial:
            try:
                faiss.write_index(self._cpu_index, str(partial))
            except RuntimeError as error:
                raise CacheError(f"{path}: cannot be written ({_one_line(error)}); is the disk full?") from error

    @classmethod
    def load(cls, path: Path, width: int, num_rows: int) -> "Index":
        """Read an index; the lists of an IVF index stay on disk, memory-mapped.

        Raises:
            CacheError: if the file is missing, damaged, or was not made by `build_index` for an array of this shape.
        """
        again = "delete it and run `dimefm cache-teacher` again"
        if not path.is_file():
            raise CacheError(f"{path}: missing; run `dimefm cache-teacher` again")
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        except (RuntimeError, MemoryError) as error:
            raise CacheError(f"{path}: not a readable FAISS index ({_one_line(error)}); {again}") from error
        rows = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else index
        ours = isinstance(rows, faiss.IndexFlat | faiss.IndexIVFScalarQuantizer)
        if not ours or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise CacheError(f"{path}: a FAISS index of another kind ({type(index).__name__}); {again}")
        if index.d != width or index.ntotal > num_rows:
            raise CacheError(
                f"{path}: holds {index.ntotal} rows of width {index.d}, wanted at most {num_rows} of {width}; {again}"
            )
        return cls(index, num_rows)


def build_index(
    embeddings: Rows,
    usable: NDArray[np.int64],
    queries: NDArray[Any],
    k: int,
    *,
    kind: IndexKind = "auto",
    min_recall: float = 0.95,
    seed: int = 0,
) -> tuple[Index, dict[str, Any]]:
    """Build an index over the usable rows of an array, one block of float32 in memory at a time.

    Args:
        embeddings: (N, D), any float dtype, any norm.
        usable: row numbers that may be found, ascending. Of these, rows that are zero or not finite are left out.
        queries: (n, D) sample of what will be searched for: recall is measured on it. Images look for sentences and
            sentences for images, so rows of the index's own side would flatter it.
        k: neighbours that will be asked for; recall is recall@k.
        kind: `flat` is exact, `ivf` approximate, `auto` flat up to `FLAT_ROWS` rows.
        min_recall: what the number of probed lists of an IVF index is doubled for, until all lists are probed.
        seed: of the training sample and of k-means.

    Returns:
        The index, and what to know about it: `type`, `rows`, `nlist`, `nprobe`, `train_rows`, `recall`, `recall_k`,
        `recall_queries` (None where it does not apply). Equal inputs and threads give equal bytes.

    Raises:
        ValueError: if shapes do not fit or a usable row does not exist.
    """
    if len(embeddings.shape) != 2:
        raise ValueError(f"embeddings of shape {embeddings.shape}: wanted (rows, width)")
    num_rows, width = embeddings.shape
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries of shape {queries.shape}: wanted (n, {width})")
    if usable.size and (usable[0] < 0 or usable[-1] >= num_rows or (np.diff(usable) <= 0).any()):
        raise ValueError(f"usable rows must ascend within 0 to {num_rows - 1}")
    index: Any
    info: dict[str, Any] = {"nlist": None, "nprobe": None, "train_rows": None}
    if resolve_kind(len(usable), kind) == "flat":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
        info["type"] = "IDMap2,Flat"
    else:
        index, info["train_rows"] = _train(embeddings, usable, num_lists(len(usable)), seed)
        info["nlist"] = index.nlist
        info["type"] = f"IVF{index.nlist},SQfp16"
    for rows, unit in unit_blocks(embeddings, usable):
        index.add_with_ids(unit, rows)
    sample, good = unit_rows(queries)
    sample = sample[good]
    exact = best_cosines(sample, embeddings, usable, k)

    def measure() -> float | None:
        return recall(Index(index, num_rows).search(sample, k)[0], sample, embeddings, exact)

    measured = measure()
    if info["nlist"]:
        while (measured is None or measured < min_recall) and index.nprobe < index.nlist:
            index.nprobe = min(2 * index.nprobe, index.nlist)
            measured = measure()
        info["nprobe"] = int(index.nprobe)
    info |= {"rows": int(index.ntotal), "recall": measured, "recall_k": k, "recall_queries": len(sample)}
    return Index(index, num_rows), info


def _train(embeddings: Rows, usable: NDArray[np.int64], nlist: int, seed: int) -> tuple[Any, int]:
    """An empty IVF index whose lists fit a seeded sample of the rows, and the size of that sample."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(usable, size=min(len(usable), nlist * TRAIN_ROWS_PER_LIST), replace=False))
    sample = np.empty((len(chosen), embeddings.shape[1]), dtype=np.float32)
    filled = 0
    for _, unit in unit_blocks(embeddings, chosen):
        sample[filled : filled + len(unit)] = unit
        filled += len(unit)
    nlist = min(nlist, num_lists(filled))  # rows without a direction may have left too few
    quantizer = faiss.IndexFlatIP(embeddings.shape[1])
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, embeddings.shape[1], nlist, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed = seed % 2**31
    index.cp.min_points_per_centroid = 1  # `num_lists` has seen to it; FAISS would warn on standard error
    index.train(sample[:filled] if filled else np.eye(1, embeddings.shape[1], dtype=np.float32))
    return index, filled


def _one_line(error: BaseException) -> str:
    """What FAISS says without the source lines around it."""
    return " ".join(str(error).split("Error: ")[-1].split())
