"""Damage to a cache: bytes that change on the disk, and what a wrong program would have written."""

import numpy as np

from dimefm.cache.disk.arrays import ArraySpec, chunk_path, read_spec, write_chunk
from dimefm.cache.disk.index import build_index
from dimefm.cache.disk.layout import IMAGES, Layout
from dimefm.cache.version.manifest import file_entry, read_manifest, write_manifest


def change_byte(path, at=0):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def rewrite(root, *names):
    """Put files as they are now into the manifest: what a wrong program would have left, checksums and all."""
    layout = Layout(root)
    manifest = read_manifest(layout)
    files = manifest.files | {name: file_entry(root / name) for name in names}
    journal = (root / "log/shards.jsonl").read_text()
    for name in names:
        journal = journal.replace(manifest.files[name].digest, files[name].digest)
    (root / "log/shards.jsonl").write_text(journal)
    write_manifest(layout, manifest.replace(files=files))


def rewrite_rows(root, shard, change, array=IMAGES):
    """Change the rows of a chunk file and its checksum in the manifest."""
    store = root / "teacher.zarr"
    spec = read_spec(store, array)
    block = np.fromfile(chunk_path(store, array, shard), dtype=spec.disk_dtype).reshape(-1, *spec.shape[1:]).copy()
    change(block)
    write_chunk(store, array, spec, shard, block)
    rewrite(root, f"teacher.zarr/{array}/c/{shard}/0")


def rewrite_pairs(root, part, change):
    """The same of rows 4 to 7 of the pairs, `ids` or `scores`."""
    store, name = root / "pairs.zarr", f"image_to_sentence/{part}"
    spec: ArraySpec = read_spec(store, name)
    block = np.fromfile(chunk_path(store, name, 1), dtype=spec.disk_dtype).reshape(4, 3).copy()
    change(block)
    write_chunk(store, name, spec, 1, block)
    rewrite(root, f"pairs.zarr/{name}/c/1/0")


def replace_index(root, embeddings, usable):
    """Put an index over other embeddings in the place of the images'."""
    index, _ = build_index(embeddings, usable, embeddings[:4].astype(np.float32), 3)
    index.save(root / "index/images.faiss")
    rewrite(root, "index/images.faiss")
