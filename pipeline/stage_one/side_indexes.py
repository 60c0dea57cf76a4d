"""The FAISS index of each side of a cache: built, or made from the one of the version before.

A version that has grown keeps the index of a side that has not changed, under a name of its own (a link). Rows that
are new in an IVF index are added to its lists. Exact indexes are written anew: it is cheap, and gives the bytes of a
single run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.arrays import chunk_path, map_chunk
from ...cache.disk.cosine import exact_recall, measured_recall, unit_blocks
from ...cache.disk.durable import file_digest, share_file, write_json
from ...cache.disk.index import EXACT, FLAT, Index, build_exact
from ...cache.disk.index_size import resolve_kind
from ...cache.disk.layout import SIDES, Layout
from ...cache.reader.feature_cache import EmbeddingSet
from ...cache.version.schema import Manifest
from ...stages.retrieve.pairs import build_side, sample_queries
from ...stages.settings.cache import PairsSettings
from ..progress import say

MOST_GROWTH = 1.5
"""Lists are trained anew once an index has so many times the rows that they were trained for."""


@dataclass(frozen=True)
class Earlier:
    """The version in force, from whose indexes and pairs a version in the making goes on.

    Attributes:
        layout: of the cache.
        new_rows: for each side, rows that have an embedding and are not in its index, ascending.
    """

    layout: Layout
    manifest: Manifest
    new_rows: Mapping[str, NDArray[np.int64]]

    @classmethod
    def find(cls, layout: Layout, manifest: Manifest, sides: Mapping[str, EmbeddingSet]) -> "Earlier | None":
        """What can be gone on from; None where rows are gone or have other embeddings, or an index is damaged.

        Args:
            layout: of the version in the making.
            sides: of that version.
        """
        new_rows = {}
        for name, side in sides.items():
            info = manifest.index.get(name)
            if info is None or _has_other_rows(layout, manifest, name, side):
                return None
            path = layout.base.root / info.file
            if not path.is_file() or file_digest(path) != manifest.files[info.file].digest:
                return None
            there = Index.load(path, side.embeddings.shape[1], len(side)).rows()
            if np.setdiff1d(there, side.usable, assume_unique=True).size:
                return None
            rows = np.setdiff1d(side.usable, there, assume_unique=True)
            blocks = [numbers for numbers, _ in unit_blocks(side.embeddings, rows)]  # rows of zeros are in no index
            new_rows[name] = np.concatenate(blocks) if blocks else rows[:0]
        return cls(layout.base, manifest, new_rows)

    def index_file(self, name: str) -> Path:
        """The index of a side."""
        return self.layout.root / self.manifest.index[name].file


@dataclass(frozen=True)
class SideIndex:
    """The index of one side.

    Attributes:
        path: its file.
        targets: what it is over.
        info: what the manifest says of it.
        goes_on: pairs of the version before are still those of their rows, but for `new_rows`.
    """

    path: Path
    targets: EmbeddingSet
    info: dict[str, Any]
    goes_on: bool
    new_rows: NDArray[np.int64]

    @cached_property
    def loaded(self) -> Index:
        """The index, memory-mapped."""
        return Index.load(self.path, self.targets.embeddings.shape[1], len(self.targets))


def side_index(
    layout: Layout,
    name: str,
    sides: Mapping[str, EmbeddingSet],
    settings: PairsSettings,
    version: int,
    earlier: Earlier | None = None,
) -> SideIndex:
    """One side's index on disk; what of it is there already is taken.

    The document beside an index is written after it, so an index without one is made again.
    """
    path, targets = layout.index(name, version), sides[name]
    beside, asked = path.with_suffix(".json"), settings.model_dump(mode="json")
    document = json.loads(beside.read_bytes()) if beside.exists() else None
    if document is None or document["settings"] != asked:
        beside.unlink(missing_ok=True)
        found = _go_on(path, name, sides, settings, earlier) if earlier else None
        document = {"settings": asked, **(found or {"info": _build(path, name, sides, settings)})}
        write_json(beside, document)
    info = document["info"]
    goes_on = earlier is not None and (
        _is_exact(info["type"], earlier.manifest.index[name].type)
        or document.get("grown_from") == earlier.manifest.index[name].file
    )
    return SideIndex(path, targets, info, goes_on, earlier.new_rows[name] if earlier else np.empty(0, np.int64))


def _build(path: Path, name: str, sides: Mapping[str, EmbeddingSet], settings: PairsSettings) -> dict[str, Any]:
    targets = sides[name]
    say(f"building the index over {len(targets.usable):,} {name}")
    index, info = build_side(targets, _other(name, sides), settings)
    index.save(path)
    if tried := info.get("tried"):
        found = f"{tried['nprobe']:,} of {tried['nlist']:,} lists find {tried['recall']:.3f} of the nearest rows"
        say(f"{name}: no clusters: {found}, wanted {settings.min_recall:g}; exact search is faster and is taken")
    _say_recall(name, info)
    return info


def _go_on(
    path: Path, name: str, sides: Mapping[str, EmbeddingSet], settings: PairsSettings, earlier: Earlier
) -> dict[str, Any] | None:
    """Make the index from that of the version before; None where it has to be built."""
    targets, queries, new = sides[name], _other(name, sides), earlier.new_rows[name]
    before = earlier.manifest.index[name].to_dict()
    info = {key: value for key, value in before.items() if key != "file"}
    wanted = resolve_kind(len(targets.usable), settings.index)
    if (info["type"] == FLAT) != (wanted == "flat"):
        return None
    if info["type"] == FLAT:
        if new.size:
            return None  # is as fast
        share_file(earlier.index_file(name), path)
        return {"info": info | exact_recall(info["rows"], _sample(queries), settings.k)}
    trained_on = info.get("trained_on") or info["rows"]
    if info["rows"] + len(new) > MOST_GROWTH * trained_on:
        say(f"{name}: {info['rows'] + len(new):,} rows, the index was made for {trained_on:,}: it is built again")
        return None
    file = earlier.index_file(name)
    info |= {"rows": info["rows"] + len(new), "trained_on": trained_on}
    if info["type"] == EXACT:
        if new.size:
            build_exact(targets.embeddings, targets.usable).save(path)
        else:
            share_file(file, path)
        return {"info": info | exact_recall(info["rows"], _sample(queries), settings.k)}
    index = Index.load(file, targets.embeddings.shape[1], len(targets), mapped=not new.size)
    if new.size:
        say(f"adding {len(new):,} rows to the index over {name}")
        index.add(targets.embeddings, new)
    other = "sentences" if name == "images" else "images"
    old = np.setdiff1d(queries.usable, earlier.new_rows[other], assume_unique=True)
    sample = np.concatenate([sample_queries(queries.embeddings, rows) for rows in (old, earlier.new_rows[other])])
    info |= measured_recall(index.search, targets.embeddings, index.rows(), sample, settings.k)
    if info["recall"] is not None and info["recall"] < settings.min_recall:
        say(f"{name}: recall@{settings.k} has fallen to {info['recall']:.3f}: the index is built again")
        return None
    if new.size:
        index.save(path)
    else:
        share_file(file, path)
    _say_recall(name, info)
    return {"info": info, "grown_from": earlier.manifest.index[name].file}


def _has_other_rows(layout: Layout, manifest: Manifest, name: str, side: EmbeddingSet) -> bool:
    """Whether a row that had an embedding in the version in force has another one in the version in the making."""
    array = side.views or side.embeddings
    spec, num_rows = array.spec, manifest.arrays[SIDES[name]].rows
    for chunk in range(-(-num_rows // spec.chunk_rows)):
        now = chunk_path(layout.teacher_zarr, SIDES[name], chunk, len(spec.shape))
        before = chunk_path(layout.base.teacher_zarr, SIDES[name], chunk, len(spec.shape))
        if not now.exists() or now == before:
            continue
        rows = slice(0, num_rows - chunk * spec.chunk_rows)
        theirs, ours = (map_chunk(path, spec)[rows].reshape(-1, spec.shape[-1]) for path in (before, now))
        if ((theirs != ours) & ~np.isnan(theirs)).any():
            return True
    return False


def _other(name: str, sides: Mapping[str, EmbeddingSet]) -> EmbeddingSet:
    return sides["sentences" if name == "images" else "images"]


def _sample(queries: EmbeddingSet) -> NDArray[Any]:
    return sample_queries(queries.embeddings, queries.usable)


def _is_exact(*types: str) -> bool:
    return all(which in (FLAT, EXACT) for which in types)


def _say_recall(name: str, info: Mapping[str, Any]) -> None:
    if info["recall"] is not None:
        measured = f"recall@{info['recall_k']} {info['recall']:.3f} on {info['recall_queries']} queries"
        say(f"{name}: {info['type']}, {measured}")
