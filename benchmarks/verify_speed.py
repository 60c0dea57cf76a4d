"""How fast `verify` reads, against the hash's own tool over the same files.

    python benchmarks/verify_speed.py [CACHE] [--rows 400000] [--width 768] [--repeats 5] [--check]

Without CACHE, one is made of random embeddings (no teacher needed). The tool is `xxhsum -H2` (Debian package xxhash),
or, where that is not installed, the same XXH3-128 of the `xxhash` package over files that are read whole, by one thread
and by several. All read the same files, in turn, from the page cache: a disk would make everything as fast as itself.
`verify` does more meanwhile: it looks into every row, and then holds tables, pairs and indexes against each other; its
rate is given with and without that. With --check, exits with 1 when the whole of it is under half the tool's speed.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dimefm.cache.audit.inventory import pieces
from dimefm.cache.audit.scan import scan
from dimefm.cache.audit.verify import verify_cache
from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.cores import usable_cores
from dimefm.cache.disk.durable import digest, make_folder
from dimefm.cache.disk.layout import IMAGES, SENTENCES, Layout
from dimefm.cache.disk.row_tables import IMAGE_COLUMNS, SENTENCE_COLUMNS, write_rows
from dimefm.cache.version.journal import Journal, ShardRecord
from dimefm.cache.version.manifest import file_entry, read_manifest, write_manifest
from dimefm.cache.version.plan_file import read_plan, write_plan
from dimefm.cache.version.schema import Manifest, Plan

SHARD_ROWS = 8192


def make_cache(layout: Layout, num_rows: int, width: int) -> None:
    """A finished cache of random embeddings, half of them images, without pairs."""
    rng = np.random.default_rng(0)
    sides: dict[str, tuple[Path, Any, Callable[[int], dict[str, Any]]]] = {
        IMAGES: (layout.image_rows, IMAGE_COLUMNS, lambda i: {"source": f"{i:08d}.jpg", "bytes": 1, "modified_ns": 0}),
        SENTENCES: (layout.sentence_rows, SENTENCE_COLUMNS, lambda i: {"text": f"sentence {i}", "origin": "random"}),
    }
    make_folder(layout.root)
    inputs = {"images": {"rows": num_rows // 2}, "sentences": {"rows": num_rows // 2}, "evaluate": {}}
    teacher = {"model": "random", "embed_dim": width}
    write_plan(layout, Plan.model_validate({"shard_rows": SHARD_ROWS, "teacher": teacher, "inputs": inputs}))
    specs = {array: ArraySpec((num_rows // 2, width), "float16", SHARD_ROWS) for array in sides}
    declare_arrays(layout.teacher_zarr, specs)
    journal = Journal(layout)
    for array, (table, columns, row) in sides.items():
        write_rows(table, columns, map(row, range(num_rows // 2)), SHARD_ROWS)
        for chunk in range(specs[array].num_chunks):
            block = rng.standard_normal((specs[array].rows_of(chunk), width), dtype=np.float32)
            written = write_chunk(layout.teacher_zarr, array, specs[array], chunk, block)
            journal.add(ShardRecord(array, chunk, len(block), written), {})
    names = [path.relative_to(layout.root).as_posix() for path in layout.root.rglob("*") if path.is_file()]
    manifest = {
        "version": 1,
        "plan": digest(layout.plan.read_bytes()),
        "arrays": {array: {"rows": num_rows // 2, "failed": 0, "reasons": {}} for array in sides},
        "pairs": None,
        "index": {},
        "files": {name: file_entry(layout.root / name) for name in names if not name.startswith("log/")},
    }
    write_manifest(layout, Manifest.model_validate(manifest))


def hash_file(path: Path) -> int:
    """What the tool does with one file."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(2**20):
            state.update(block)
    return state.intdigest()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = options.cache or Path(folder) / "cache"
        if options.cache is None:
            make_cache(Layout(root), options.rows, options.width)
        ratio = compare(root, options.repeats)
    if options.check and ratio < 0.5:
        sys.exit(1)


def compare(root: Path, repeats: int) -> float:
    """Run them in turn and print their rates; returns verify's rate over the tool's, of the medians."""
    layout = Layout(root)
    manifest, plan = read_manifest(layout), read_plan(layout)
    assert manifest is not None and plan is not None
    files = [(piece, root / piece.name) for piece in pieces(manifest, plan.shard_rows)]
    paths = [path for _, path in files]
    num_bytes = sum(piece.num_bytes for piece, _ in files)
    threads = usable_cores()
    tool = shutil.which("xxhsum")
    name = "xxhsum -H2" if tool else "xxhash package, 1 thread"

    def own_tool() -> None:
        if tool:
            subprocess.run([tool, "-H2", *map(str, paths)], stdout=subprocess.DEVNULL, check=True)
        else:
            for path in paths:
                hash_file(path)

    def threaded() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(hash_file, paths))

    def whole() -> None:
        assert not verify_cache(root).findings

    works = {
        name: own_tool,
        f"xxhash package, {threads} threads": threaded,
        "verify, reading alone": lambda: list(scan(files)),
        "verify": whole,
    }
    for work in works.values():  # page cache, imports
        work()
    taken: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(repeats):
        for key, work in works.items():
            taken[key].append(seconds(work))
    print(f"{len(files)} files, {num_bytes / 1e9:.2f} GB, {threads} cores, {repeats} repeats, median (min-max)")
    for key, values in taken.items():
        rates = sorted(num_bytes / value / 1e9 for value in values)
        print(f"{key:>26}: {statistics.median(rates):6.2f} GB/s ({rates[0]:.2f}-{rates[-1]:.2f})")
    ratio = statistics.median(taken[name]) / statistics.median(taken["verify"])
    print(f"verify / {name}: {ratio:.2f}")
    return ratio


if __name__ == "__main__":
    main()
