"""The two sides of a cache, made of any embeddings, and versions of its indexes and pairs. No teacher, no images."""

import numpy as np

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.layout import IMAGES, SENTENCES
from dimefm.cache.disk.row_tables import FAILED, IMAGE_COLUMNS, OK, SENTENCE_COLUMNS, write_rows
from dimefm.cache.version.journal import Journal
from dimefm.cache.version.schema import Manifest
from dimefm.pipeline.stage_one.finish import files_of
from dimefm.pipeline.stage_one.pseudo_pairs import write_pairs
from dimefm.stages.settings.cache import PairsSettings

CHUNK_ROWS = 64


def write_sides(layout, images, sentences):
    """Arrays and row tables; rows of NaN have failed."""
    specs = {
        name: ArraySpec(rows.shape, "float16", CHUNK_ROWS) for name, rows in ((IMAGES, images), (SENTENCES, sentences))
    }
    declare_arrays(layout.teacher_zarr, specs)
    tables = {
        IMAGES: (images, layout.image_rows, IMAGE_COLUMNS, "source"),
        SENTENCES: (sentences, layout.sentence_rows, SENTENCE_COLUMNS, "text"),
    }
    for name, (embeddings, path, columns, key) in tables.items():
        for chunk in range(specs[name].num_chunks):
            block = embeddings[chunk * CHUNK_ROWS :][:CHUNK_ROWS]
            write_chunk(layout.teacher_zarr, name, specs[name], chunk, block)
        rows = ({key: "x", "status": FAILED if np.isnan(row).any() else OK} for row in embeddings)
        write_rows(path, columns, rows, CHUNK_ROWS)


def paired(layout, images, sentences, before=None, **settings):
    """Indexes and pairs over these sides, as a version on its own or after another one; returns its manifest."""
    write_sides(layout, images, sentences)
    asked, version = PairsSettings(**settings), before.version + 1 if before else 1
    journal = Journal(layout)
    found = write_pairs(layout, asked, journal, version, before)
    counts = {IMAGES: {"rows": len(images)}, SENTENCES: {"rows": len(sentences)}}
    return Manifest.model_validate(
        {
            "version": version,
            "arrays": counts,
            "files": dict(files_of(layout, journal, [], [], found)),
            "index": found.index,
            "pairs": found.pairs,
            "pairs_settings": asked.model_dump(mode="json"),
        }
    )


def pairs_files(layout, manifest):
    """The bytes of every file of indexes and pairs, by names without a version."""
    suffix = f"-{manifest.version}" if manifest.version > 1 else ""
    paths = [layout.root / name for name in manifest.files if name.startswith(("pairs", "index/"))]
    return {path.relative_to(layout.root).as_posix().replace(suffix, "") or "": path.read_bytes() for path in paths}
