"""The certificate of an export: its queries over the cache's own index of teacher vectors, and the other way."""

from typing import Any

import numpy as np

from ...cache.disk.index import Index, build_index
from ...cache.reader.feature_cache import EmbeddingSet, FeatureCache
from ...stages.export.certificate import Queries, Search, against_student_vectors, against_teacher_vectors, certificate
from ...stages.export.export_job import Exported, ExportJob
from ...stages.export.proof import embed_rows, sample_sentences
from ...stages.export.text_side import CPU, OWN
from ...stages.models.text_encoder import TextEncoder
from ..progress import say
from .drawn_rows import DrawnRows
from .prove import device_of

TEXTS = 1000
"""Sentences, at most, that ask, and that are searched where a student has a text tower of its own."""


def certify_run(job: ExportJob, exported: Exported, cache: FeatureCache, rows: DrawnRows) -> dict[str, Any]:
    """The document of certificate.json.

    Raises:
        InputError: if no training picture is at hand: there is nothing to ask with.
        CacheError: if an index is damaged.
    """
    numbers, decoded = rows.proof
    say(f"certifying it with {len(numbers):,} images as queries")
    student = embed_rows(exported.image, rows.pictures, decoded, device_of(exported))
    teacher = cache.images.embeddings[numbers].astype(np.float32)
    images = Queries(student, teacher)
    sides = {"images": cache.images, "sentences": cache.sentences}
    searches = {side: _search(cache, side, of) for side, of in sides.items()}
    known = {side: len(of.usable) for side, of in sides.items()}
    text_rows, texts = sample_sentences(cache, TEXTS)
    sentences = cache.sentences.embeddings[text_rows].astype(np.float32)
    own_images = Queries(student, teacher, numbers)
    found = {
        "student images -> teacher sentences": against_teacher_vectors(
            images, searches["sentences"], known["sentences"]
        ),
        "student images -> teacher images": against_teacher_vectors(own_images, searches["images"], known["images"]),
        "teacher sentences -> student images": against_student_vectors(Queries(sentences, sentences), images),
        "teacher images -> student images": against_student_vectors(own_images, own_images),
    }
    counts = {"images": len(numbers)}
    if job.text is not None and job.text.owner == OWN and exported.text is not None:
        encoder = TextEncoder(exported.text, job.text.encoder.tokenizer, CPU)
        own = Queries(encoder.encode_sentences(texts), sentences)
        own_texts = Queries(own.student, own.teacher, text_rows)
        found |= {
            "student sentences -> teacher images": against_teacher_vectors(own, searches["images"], known["images"]),
            "student sentences -> teacher sentences": against_teacher_vectors(
                own_texts, searches["sentences"], known["sentences"]
            ),
            "teacher images -> student sentences": against_student_vectors(Queries(teacher, teacher), own),
        }
        counts["sentences"] = len(text_rows)
    return certificate(found, counts)


def _search(cache: FeatureCache, side: str, rows: EmbeddingSet) -> Search:
    """Search over the cache's index of a side; over one in memory where it has none."""
    num_rows, width = rows.embeddings.shape
    info = cache.manifest.index.get(side)
    if info is not None:
        index = Index.load(cache.layout.root / info.file, width, num_rows)
    else:
        index, _ = build_index(rows.embeddings, rows.usable, np.zeros((0, width), np.float32), 1, kind="flat")
    return lambda queries, k: index.search(queries.astype(np.float32), k)[0]
