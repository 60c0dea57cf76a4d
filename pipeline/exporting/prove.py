"""The proof of an export: every labelled set of the run, unlabelled rows of the cache, sentences."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ...stages.devices import resolve_device
from ...stages.export.export_job import Exported, ExportJob, OneTensor
from ...stages.export.proof import (
    TEXTS,
    embed_rows,
    labelled_proof,
    sample_sentences,
    text_proof,
    unlabelled_proof,
)
from ...stages.export.text_side import CPU, OWN
from ...stages.models.text_encoder import TextEncoder
from ...stages.models.text_student import TextStudent
from ...stages.score.embed_set import embed_pictures, labelled_set, require_images
from ...stages.score.labelled_pictures import LabelledPictures
from ..progress import say
from ..stage_two.class_prompts import cached_set_prompts
from ..stage_two.run_source import LabelledSource, RunSource
from .drawn_rows import DrawnRows

_KEEP_BYTES = 2**30
"""A set whose pictures fit into this is decoded once for both."""


def prove(
    job: ExportJob, exported: Exported, cache: FeatureCache, source: RunSource, rows: DrawnRows, chosen_on: str | None
) -> dict[str, Any]:
    """`sets`, `unlabelled` and `text` of export.json; where pictures are gone, `missing` says which."""
    sets: dict[str, Any] = {}
    for name, of in source.sets.items():
        try:
            require_images(of.images, name)
            labelled_set(cache, name)
        except InputError as error:
            sets[name] = {"missing": str(error)}
            continue
        say(f"proving it on {name}")
        sets[name] = {**_on_set(job, exported, cache, name, of), "chosen_on": name == chosen_on}
    found: dict[str, Any] = {"sets": sets, "unlabelled": _on_rows(job, exported, cache, rows)}
    if job.text is not None:
        found["text"] = {"owner": job.text.owner, "tokenizer": job.text.tokenizer}
        if exported.text is not None:
            found["text"]["proof"] = _on_texts(job, exported, cache)
    return found


def device_of(exported: Exported) -> torch.device:
    """Where what was exported runs."""
    return resolve_device("auto") if exported.movable else CPU


def _on_set(
    job: ExportJob, exported: Exported, cache: FeatureCache, name: str, source: LabelledSource
) -> dict[str, Any]:
    labelled = cache.evaluate[name]
    pictures = LabelledPictures(
        labelled, source.images, job.record["preprocess"], job.image_size, keep_bytes=_KEEP_BYTES
    )
    mine = embed_pictures(exported.image, labelled, pictures, device_of(exported))
    before = embed_pictures(job.student, labelled, pictures, resolve_device("auto"))
    if job.text is not None and job.text.owner == OWN:
        prompts = cached_set_prompts(cache, name, source.settings.get("templates"))
        heads = [_head(job, tower, prompts) for tower in (exported.text, job.text.encoder.tower)]
        mine, before = (dataclasses.replace(item, student_head=head) for item, head in zip((mine, before), heads))
    return labelled_proof(mine, before)


def _head(job: ExportJob, tower: nn.Module | None, prompts: list[list[str]]) -> Any:
    """Class vectors by a text tower; by the teacher's, None, where the export has none of its own."""
    assert job.text is not None
    return None if tower is None else TextStudent(tower, job.text.encoder.tokenizer, CPU).class_head(prompts)


def _on_rows(job: ExportJob, exported: Exported, cache: FeatureCache, rows: DrawnRows) -> dict[str, Any]:
    try:
        numbers, decoded = rows.proof
    except InputError as error:
        return {"missing": str(error)}
    say(f"proving it on {len(numbers):,} unlabelled images")
    mine = embed_rows(exported.image, rows.pictures, decoded, device_of(exported))
    before = embed_rows(job.student, rows.pictures, decoded, resolve_device("auto"))
    return unlabelled_proof(mine, before, cache, numbers)


def _on_texts(job: ExportJob, exported: Exported, cache: FeatureCache) -> dict[str, Any]:
    assert job.text is not None and exported.text is not None
    rows, texts = sample_sentences(cache, TEXTS)
    encoder = TextEncoder(exported.text, job.text.encoder.tokenizer, CPU)
    teacher = cache.sentences.embeddings[rows].astype(np.float32)
    tower = TextEncoder(OneTensor(job.text.encoder.tower), job.text.encoder.tokenizer, CPU)
    return text_proof(encoder.encode_sentences(texts), tower.encode_sentences(texts), teacher)
