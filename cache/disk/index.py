"""The one file that knows FAISS: nearest rows by cosine, NumPy in and NumPy out.

An index is exact when it is small and approximate (IVF over float16) when it is large. How good an approximate one is
gets measured, not assumed: the number of probed lists rises until its recall is what was asked for. Where that takes so
many lists that exact search is faster, the index is a plain list of float16 rows, searched by products of blocks.
"""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ..errors import CacheError
from . import cosine
from .cosine import Rows, best_cosines, dots, exact_recall, product_error, recall, unit_blocks, unit_rows
from .durable import replacing
from .freed_memory import return_freed_memory
from .index_size import TRAIN_ROWS_PER_LIST, IndexKind, num_lists, resolve_kind, trainable_lists

FLAT, EXACT = "IDMap2,Flat", "IDMap,SQfp16"
"""Types of exact indexes: a small one, and one of many rows without clusters."""

MOST_PROBED = 4
"""An IVF index probes at most one in so many of its lists. A product of matrices looks at about four times as many rows
in the same time as a search through lists: beyond that, exact search is faster."""

MAX_GPU_NPROBE = 2048
"""FAISS's limit of probed lists on a GPU."""

_log = logging.getLogger(__name__)


def to_gpu_if_any(index: Any) -> Any:
    """The index on the GPUs of this machine, divided among all of them; the index itself where there is none.

    For searching only: the caller keeps the CPU index for saving. When the GPUs cannot hold it, it stays on the CPU and
    a warning says so. Tested with stand-ins only: it has not run on a real GPU.
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
        is_plain: it has no lists and rounded rows: whoever has the rows themselves need not ask it (`nearest_rows`).
    """

    def __init__(self, cpu_index: Any, num_rows: int) -> None:
        self._cpu_index = cpu_index
        self._searcher: Any = None
        self.width = int(cpu_index.d)
        self.num_rows = num_rows
        self.is_plain = _is_plain(cpu_index)

    def __len__(self) -> int:
        return int(self._cpu_index.ntotal)  # rows that are in it

    @property
    def error(self) -> float:
        """How far a score may be off the cosine: rows of all but small indexes are rounded to float16. In lists the
        likely error will do: they are approximate, and equal rows lie in one list and have equal scores."""
        is_lists = not isinstance(self._cpu_index, faiss.IndexIDMap)
        return product_error(self.width) + (2.0**-13 if is_lists else self.is_plain * 2.0**-10)

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
            plain = self.is_plain and self._searcher is self._cpu_index
            search = partial(_search_plain, self._cpu_index) if plain else self._searcher.search
            found_scores, found = search(unit[good], k)
            if found.max() >= self.num_rows:
                raise CacheError(f"the index names row {found.max()} of {self.num_rows}; delete it and build it again")
            ids[good] = found
            scores[good] = np.where(found >= 0, found_scores, np.nan)
        return ids, scores

    def rows(self) -> NDArray[np.int64]:
        """Numbers of the rows that are in the index, ascending."""
        if isinstance(self._cpu_index, faiss.IndexIDMap):
            return np.sort(faiss.vector_to_array(self._cpu_index.id_map).astype(np.int64))
        lists = self._cpu_index.invlists
        filled = filter(lists.list_size, range(self._cpu_index.nlist))
        ids = [faiss.rev_swig_ptr(lists.get_ids(i), lists.list_size(i)).astype(np.int64) for i in filled]
        return np.sort(np.concatenate(ids)) if ids else np.empty(0, dtype=np.int64)

    def add(self, embeddings: Rows, rows: NDArray[np.int64]) -> None:
        """Add rows to an IVF index that was loaded with `mapped = False`; its lists stay those that were trained."""
        _fill_lists(self._cpu_index, embeddings, rows)
        self.num_rows = embeddings.shape[0]

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
    def load(cls, path: Path, width: int, num_rows: int, mapped: bool = True) -> "Index":
        """Read an index; its rows stay on disk, memory-mapped, unless rows are to be added.

        Raises:
            CacheError: if the file is missing, damaged, or was not made by `build_index` for an array of this shape.
        """
        again = "delete it and run `dimefm cache-teacher` again"
        if not path.is_file():
            raise CacheError(f"{path}: missing; run `dimefm cache-teacher` again")
        try:
            with path.open("rb") as file:
                is_flat = file.read(3) == b"IxM"  # an IDMap; FAISS maps the two kinds by different means
            flags = faiss.IO_FLAG_MMAP_IFC if is_flat else faiss.IO_FLAG_MMAP
            index = faiss.read_index(str(path), flags if mapped else 0)
        except (RuntimeError, MemoryError) as error:
            raise CacheError(f"{path}: not a readable FAISS index ({_one_line(error)}); {again}") from error
        rows = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
        ours = isinstance(rows, faiss.IndexFlat | faiss.IndexIVFScalarQuantizer) or _is_plain(index)
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
        queries: (n, D) sample of what will be searched for, to measure recall on: rows of the other side.
        k: neighbours that will be asked for; recall is recall@k.
        kind: `flat` is exact, `ivf` approximate, `auto` flat up to `FLAT_ROWS` rows.
        min_recall: what the number of probed lists of an IVF index is doubled for. Where one in `MOST_PROBED` lists is
            not enough, the index is an exact one over float16 rows (`build_exact`).
        seed: of the training sample and of k-means.

    Returns:
        The index, and what to know about it, as `IndexInfo` has it. Equal inputs and threads give equal bytes.

    Raises:
        ValueError: if shapes do not fit or a usable row does not exist.
    """
    if len(embeddings.shape) != 2:
        raise ValueError(f"embeddings of shape {embeddings.shape}: wanted (rows, width)")
    num_rows, width = embeddings.shape
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries of shape {queries.shape}: wanted (n, {width})")
    if usable.size and not (usable[0] >= 0 and usable[-1] < num_rows and (np.diff(usable) > 0).all()):
        raise ValueError(f"usable rows must ascend within 0 to {num_rows - 1}")
    return_freed_memory()  # that of the other side's index
    info: dict[str, Any] = {"nlist": None, "nprobe": None, "train_rows": None}
    if resolve_kind(len(usable), kind) == "flat":
        flat = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
        _fill(flat, embeddings, usable)
        index = Index(flat, num_rows)
        return index, info | {"type": FLAT, "rows": len(index)} | exact_recall(len(index), queries, k)
    lists, info["train_rows"] = _train(embeddings, usable, num_lists(len(usable)), seed)
    _fill_lists(lists, embeddings, usable)
    index = Index(lists, num_rows)
    info["rows"] = info["trained_on"] = len(index)
    unit, good = unit_rows(queries)
    unit = unit[good]
    exact = best_cosines(unit, embeddings, usable, k)

    def measure() -> float | None:
        return recall(Index(lists, num_rows).search(unit, k)[0], unit, embeddings, exact)

    measured, nlist = measure(), int(lists.nlist)
    most = nlist if measured is None else max(1, nlist // MOST_PROBED)
    while (measured is None or measured < min_recall) and lists.nprobe < most:
        lists.nprobe = min(2 * lists.nprobe, most)
        measured = measure()
    probed = {"nlist": nlist, "nprobe": int(lists.nprobe), "recall": measured}
    if measured is not None and measured < min_recall:
        del lists, index  # the memory of one at a time
        index = build_exact(embeddings, usable)
        return index, info | {"type": EXACT, "train_rows": None, "tried": probed} | exact_recall(len(index), queries, k)
    return index, info | {"type": f"IVF{nlist},SQfp16", **probed, "recall_k": k, "recall_queries": len(unit)}


def build_exact(embeddings: Rows, usable: NDArray[np.int64]) -> Index:
    """An exact index of float16 rows as they come, half as large as a flat one."""
    halves, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIDMap(faiss.IndexScalarQuantizer(embeddings.shape[1], halves, product))
    _fill(index, embeddings, usable)
    return Index(index, embeddings.shape[0])


def _is_plain(index: Any) -> bool:
    """Whether it is a list of float16 rows (`build_exact`)."""
    rows = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else None
    return isinstance(rows, faiss.IndexScalarQuantizer) and rows.sq.qtype == faiss.ScalarQuantizer.QT_fp16


def _search_plain(index: Any, unit: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """As FAISS's search, by products of blocks in float32: that one decodes every row for every query."""
    rows: Any = faiss.downcast_index(index.index)
    halves = faiss.rev_swig_ptr(rows.codes.data(), rows.ntotal * rows.code_size).view(np.float16).reshape(-1, index.d)
    best = faiss.ResultHeap(len(unit), k, keep_max=True)
    step = max(1, cosine.BLOCK_BYTES // (4 * index.d))
    for start in range(0, rows.ntotal, step):
        block = halves[start : start + step].astype(np.float32)
        scores, found = faiss.knn(unit, block, k, metric=faiss.METRIC_INNER_PRODUCT)
        best.add_result(scores, np.where(found < 0, -1, found + start))
    best.finalize()
    numbers = faiss.vector_to_array(index.id_map)
    return best.D, np.where(best.I < 0, -1, numbers[best.I])


def _fill(index: Any, embeddings: Rows, usable: NDArray[np.int64]) -> None:
    """Add rows to an empty IDMap, its memory taken once: a vector that grows is doubled and copied."""
    rows: Any = faiss.downcast_index(index.index)
    for vector, size in ((rows.codes, rows.code_size), (index.id_map, 1)):
        vector.resize(len(usable) * size)
        vector.resize(0)  # keeps what it has taken
    for numbers, unit in unit_blocks(embeddings, usable):
        index.add_with_ids(unit, numbers)


def _fill_lists(index: Any, embeddings: Rows, usable: NDArray[np.int64]) -> None:
    """Add rows to an IVF index; the memory of an empty one's lists is taken once."""
    centres = index.quantizer.reconstruct_n(0, index.nlist)
    chosen = [_nearest_list(index, centres, unit).astype(np.int32) for _, unit in unit_blocks(embeddings, usable)]
    if not index.ntotal:
        sizes = sum((np.bincount(lists, minlength=index.nlist) for lists in chosen), np.zeros(index.nlist, np.int64))
        for which, size in enumerate(sizes.tolist()):
            index.invlists.resize(which, size)
            index.invlists.resize(which, 0)  # keeps what it has taken
    for (numbers, unit), lists in zip(unit_blocks(embeddings, usable), chosen, strict=True):
        arrays = unit, np.ascontiguousarray(numbers), lists.astype(np.int64)
        index.add_core(len(unit), *(faiss.swig_ptr(array) for array in arrays))


def _nearest_list(index: Any, centres: NDArray[np.float32], unit: NDArray[np.float32]) -> NDArray[np.int64]:
    """The list of each row. Equal rows have the same one, wherever in a block they stand."""
    products, lists = index.quantizer.search(unit, min(2, len(centres)))
    nearest = np.ascontiguousarray(lists[:, 0])
    if len(centres) > 1:
        close = np.flatnonzero(products[:, 0] - products[:, 1] <= 2 * product_error(index.d))
        both = np.sort(lists[close], axis=1)
        first, second = (dots(unit[close], centres[both[:, i]]) for i in (0, 1))
        nearest[close] = np.where(first >= second, both[:, 0], both[:, 1])
    return nearest


def _train(embeddings: Rows, usable: NDArray[np.int64], nlist: int, seed: int) -> tuple[Any, int]:
    """An empty IVF index whose lists fit a seeded sample of the rows, and the size of that sample."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(usable, size=min(len(usable), nlist * TRAIN_ROWS_PER_LIST), replace=False))
    sample = np.empty((len(chosen), embeddings.shape[1]), dtype=np.float32)
    filled = 0
    for _, unit in unit_blocks(embeddings, chosen):
        sample[filled : filled + len(unit)] = unit
        filled += len(unit)
    nlist = min(nlist, trainable_lists(filled))  # rows without a direction may have left too few
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
