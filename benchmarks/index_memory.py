"""Peak anonymous memory of the indexes-and-pairs step, and how fast it searches, against what `plan` says.

    python benchmarks/index_memory.py --rows 1000000 --width 128 [--no-clusters] [--shards 2]

Makes a finished cache's arrays and row tables, as many images as sentences, in clusters or without any. Then a process
of its own runs `write_pairs` over them, for the first shards of each direction, while a thread reads `RssAnon` of
/proc/self/status every few milliseconds. Prints a JSON line: the peak, what `plan` foretells, and for each side its
index, recall and rows/s of the search.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.layout import DIRECTIONS, IMAGES, SENTENCES, Layout
from dimefm.cache.disk.row_tables import IMAGE_COLUMNS, SENTENCE_COLUMNS, write_rows

SHARD_ROWS = 8192


def make_sides(layout: Layout, num_rows: int, width: int, clusters: bool) -> None:
    """Unit rows around a centre for every 500; the two sides lie apart, as those of CLIP do."""
    spec = ArraySpec((num_rows, width), "float16", SHARD_ROWS)
    declare_arrays(layout.teacher_zarr, {IMAGES: spec, SENTENCES: spec})
    centres = np.random.default_rng(0).standard_normal((max(1, num_rows // 500), width), dtype=np.float32)
    for side, array in enumerate((IMAGES, SENTENCES)):
        rng = np.random.default_rng(1 + side)
        apart = np.random.default_rng(9).standard_normal((2, width), dtype=np.float32)[side]
        for shard in range(spec.num_chunks):
            rows = rng.standard_normal((spec.rows_of(shard), width), dtype=np.float32)
            if clusters:
                rows = centres[rng.integers(len(centres), size=len(rows))] + 0.4 * rows + apart
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            write_chunk(layout.teacher_zarr, array, spec, shard, rows.astype(np.float16))
    write_rows(layout.image_rows, IMAGE_COLUMNS, ({"source": f"{i}.jpg"} for i in range(num_rows)), SHARD_ROWS)
    write_rows(layout.sentence_rows, SENTENCE_COLUMNS, ({"text": f"s {i}"} for i in range(num_rows)), SHARD_ROWS)


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Peak(threading.Thread):
    """The most anonymous memory of this process since it was started."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_bytes = 0

    def run(self) -> None:
        while True:
            self.num_bytes = max(self.num_bytes, anonymous_bytes())
            time.sleep(0.003)


def train_briefly() -> None:
    """One round of k-means instead of ten: the same memory, poorer lists."""
    import faiss

    train = faiss.IndexIVFScalarQuantizer.train

    def brief(index: Any, rows: Any) -> None:
        index.cp.niter = 1
        train(index, rows)

    setattr(faiss.IndexIVFScalarQuantizer, "train", brief)  # noqa: B010 - its type is an overload


def measure(root: Path, num_shards: int, k: int, brief: bool, results: Any) -> None:
    """Run the step in this process."""
    from dimefm.cache.disk.arrays import read_spec
    from dimefm.cache.version.journal import Journal, ShardRecord
    from dimefm.pipeline.stage_one import pseudo_pairs
    from dimefm.stages.settings.cache import PairsSettings

    if brief:
        train_briefly()
    layout, settings = Layout(root), PairsSettings(k=k)
    peak = Peak()
    peak.start()
    journal = Journal(layout)
    seconds: dict[str, float] = {}
    write_missing = pseudo_pairs._PairsWriter.write_missing

    def some(writer: Any, *others: Any) -> None:
        spec = writer.specs[f"{writer.direction}/ids"]
        for shard in range(num_shards, spec.num_chunks):  # as if they were there already
            record = ShardRecord(f"{writer.counted}{writer.direction}/scores", shard, spec.rows_of(shard), "")
            journal._remember(record)
        start = time.perf_counter()
        write_missing(writer, *others)
        seconds[writer.direction] = time.perf_counter() - start

    setattr(pseudo_pairs._PairsWriter, "write_missing", some)  # noqa: B010
    before, start = anonymous_bytes(), time.perf_counter()
    found = pseudo_pairs.write_pairs(layout, settings, journal, 1)
    whole = time.perf_counter() - start
    rows = {name: info.rows for name, info in found.index.items()}
    width = read_spec(layout.teacher_zarr, IMAGES).shape[1]
    planned = pseudo_pairs.retrieval_memory([(n, width) for n in rows.values()], settings)
    searched = num_shards * SHARD_ROWS
    results.put(
        {
            "rows": rows["images"],
            "width": width,
            "before_bytes": before,
            "peak_bytes": peak.num_bytes,
            "planned_bytes": planned,
            "planned / peak": round(planned / peak.num_bytes, 3),
            "build_s": round(whole - sum(seconds.values()), 1),
            **{
                direction: {
                    "index": found.index[DIRECTIONS[direction][1]].to_dict(),
                    "rows_per_s": round(searched / taken, 1),
                }
                for direction, taken in seconds.items()
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="of each side")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--shards", type=int, default=1, help="shards of each direction that are searched for")
    parser.add_argument("--no-clusters", action="store_true")
    parser.add_argument("--brief", action="store_true", help="one round of k-means: for memory alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        makes = (Layout(Path(folder)), arguments.rows, arguments.width, not arguments.no_clusters)
        maker = context.Process(target=make_sides, args=makes)
        maker.start()
        maker.join()
        results = context.Queue()
        process = context.Process(
            target=measure, args=(Path(folder), arguments.shards, arguments.k, arguments.brief, results)
        )
        process.start()
        report = results.get()
        process.join()
    print(json.dumps(report))
    sys.exit(0 if abs(report["planned / peak"] - 1) <= 0.15 else 1)


if __name__ == "__main__":
    main()
