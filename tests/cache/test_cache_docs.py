"""docs/cache.md holds: its program runs on a cache that has failed rows and has grown, and what it says is so."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from dimefm.cache import FeatureCache
from dimefm.cache.reader.masks import add_mask
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.upkeep.append import append_to

from ..support.paths import ROOT
from ..support.worlds import make_world, picture

DOCUMENT = (ROOT / "docs/cache.md").read_text()


@pytest.fixture(scope="module")
def grown(tmp_path_factory, tiny_teacher) -> Path:
    """A cache with an unreadable image, a blank sentence and a mask, appended to once."""
    config = make_world(tmp_path_factory.mktemp("docs"), tiny_teacher, num_images=10, num_sentences=7)
    folder = config.parent
    (folder / "images/0/003.jpg").write_bytes(b"")
    with (folder / "captions.txt").open("a") as file:
        file.write("\n")
    text = config.read_text().replace('source = "images/"', 'source = "images/"\nmax_failed = 0.2')
    config.write_text(text.replace("shard_rows = 4", 'shard_rows = 4\npixels = "jpeg-24"'))
    cache_teacher(load_config(config))
    add_mask(FeatureCache.open(folder / "cache").layout, "images", "half", np.arange(10) % 2 == 0)
    picture((200, 200, 10), 4242).save(folder / "images/0/zz.png")
    with (folder / "captions.txt").open("a") as file:
        file.write("one more\n")
    append_to(folder / "cache", config)
    return folder / "cache"


def test_the_documents_program_reads_a_cache_with_zarr_and_pandas_alone(grown, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    (tmp_path / "reader.py").write_text(program)
    assert "dimefm" not in program
    done = subprocess.run([sys.executable, tmp_path / "reader.py", grown], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache = FeatureCache.open(grown)
    pairs = cache.pairs("image_to_sentence")
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 10 and last.startswith("dev: ") and last.endswith(" of 12 images")
    best = cache.sentences.rows.take(pairs.ids[:][cache.images.usable, 0].tolist(), "text")
    sources = cache.images.rows.take(cache.images.usable.tolist(), "source")
    assert [line.split("  ", 1)[1] for line in lines] == [f"{s}  {t}" for s, t in zip(sources, best, strict=True)]
    dev = cache.evaluate["dev"]
    right = np.mean((dev.images.embeddings[:].astype("f4") @ dev.head.T).argmax(axis=1) == dev.labels)
    assert f"{right:.1%}" in last


def test_chunk_files_are_where_and_what_the_document_says(grown):
    cache = FeatureCache.open(grown)
    array = grown / "teacher.zarr/images/embedding"
    metadata = json.loads((array / "zarr.json").read_bytes())
    chunk_rows, width = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    assert (metadata["data_type"], metadata["fill_value"]) == ("float16", "NaN")
    assert metadata["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}]
    for row in range(11):
        data = (array / f"c/{row // chunk_rows}/0").read_bytes()
        assert len(data) == chunk_rows * width * 2
        start = row % chunk_rows * width * 2
        assert data[start : start + width * 2] == cache.images.embeddings[[row]].tobytes()
    padding = np.frombuffer(data, "<f2").reshape(chunk_rows, width)[11 % chunk_rows :]
    assert np.isnan(padding).all() and len(padding) == 1


def test_packs_are_where_and_what_the_document_says(grown):
    manifest = json.loads((grown / "manifest.json").read_bytes())
    assert manifest["pixels"] == {"setting": "jpeg-24", "folder": "pixels/jpeg-24", "shard_rows": 4} | {
        "quality": 90,
        "subsampling": "4:2:0",
    }
    cache = FeatureCache.open(grown)
    good = set(cache.images.usable.tolist())
    for row in range(11):
        pack = (grown / "pixels/jpeg-24" / f"{row // 4:06d}.pack").read_bytes()
        table = struct.unpack("<5Q", pack[-40:])
        assert table[0] == 0 and sorted(table) == list(table) and table[-1] == len(pack) - 40
        jpeg = pack[table[row % 4] : table[row % 4 + 1]]
        assert jpeg == (cache.pixels.read(row) if row in good else b"")
        if jpeg:
            with Image.open(io.BytesIO(jpeg)) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))
    assert len(good) == 10 and table[3:] == (table[3], table[3])


def test_every_file_is_listed_with_the_checksum_that_is_described(grown):
    manifest = json.loads((grown / "manifest.json").read_bytes())
    there = {path.relative_to(grown).as_posix() for path in grown.rglob("*") if path.is_file()}
    there = {name for name in there if not name.startswith("log/")} - {"manifest.json", "manifest.xxh3"}
    assert there == set(manifest["files"]) | set(manifest["superseded"])
    for name, entry in manifest["files"].items():
        data = (grown / name).read_bytes()
        assert entry == {"bytes": len(data), "digest": xxhash.xxh3_128(data).hexdigest()}
    *lines, last = (grown / "manifest.xxh3").read_text().splitlines()
    assert xxhash.xxh3_128((grown / "manifest.json").read_bytes()).hexdigest() == lines[-1]
    assert xxhash.xxh3_128("".join(f"{line}\n" for line in lines).encode()).hexdigest() == last
    assert manifest["plan"] == xxhash.xxh3_128((grown / manifest["plan_file"]).read_bytes()).hexdigest()


@pytest.mark.parametrize("table", ["images", "sentences", "evaluate/dev"])
def test_every_column_of_a_table_is_described_with_its_type(grown, table):
    described = dict(re.findall(r"^\| `(\w+)` \| (\w+)", DOCUMENT, re.MULTILINE))
    for field in pq.read_schema(grown / "rows" / f"{table}.parquet"):
        assert described[field.name] == str(field.type)


def test_every_key_of_the_manifest_is_described(grown):
    manifest = json.loads((grown / "manifest.json").read_bytes())
    keys = re.search(r"## Manifest\n(.*?)\n## ", DOCUMENT, re.DOTALL)
    assert keys and {key for key in manifest if f"`{key}`" not in keys[1]} <= {"format"}


def test_every_file_of_a_cache_has_a_line_in_the_document(grown):
    listed = re.search(r"## Files\n(.*?)\n## ", DOCUMENT, re.DOTALL)
    assert listed
    names = {path.name for path in grown.iterdir()}
    assert {name for name in names if f"`{re.sub(r'-[0-9]+', '-<n>', name)}" not in listed[1]} == set()


def test_rows_that_come_after_a_mask_are_not_kept(grown, tmp_path):
    copy = shutil.copytree(grown, tmp_path / "cache")
    keep = pq.read_table(copy / "masks/images/half.parquet").to_pydict()
    assert keep == {"row": list(range(10)), "keep": [row % 2 == 0 for row in range(10)]}
    chosen = FeatureCache.open(copy).masked(images="half").images.usable.tolist()
    failed = set(range(11)) - set(FeatureCache.open(copy).images.usable.tolist())
    assert chosen == [row for row in range(0, 10, 2) if row not in failed]
