"""What the formats share that write each tower by itself: how inputs are made, written down beside the files."""

from typing import Any

from ...cache.disk.durable import write_json
from .export_job import ExportJob
from .to_open_clip import write_config

PREPROCESSING = "preprocessing.json"


def write_preprocessing(job: ExportJob) -> None:
    """Write what an input is made from: `preprocessing.json`, and an open_clip config for its tokenizer."""
    document: dict[str, Any] = {
        "images": {"shape": ["batch", 3, job.image_size, job.image_size], "dtype": "float32", **job.preprocess},
        "logit_scale": job.logit_scale,
        "embed_dim": job.embed_dim,
    }
    if job.text is not None:
        document["tokens"] = {"shape": ["batch", job.text.tokenizer["context_length"]], "dtype": "int64"}
        document["tokens"] |= job.text.tokenizer
        document["logit_bias"] = job.text.logit_bias
        if job.text.model_cfg is not None:
            write_config(job, {"embed_dim": job.embed_dim, "text_cfg": job.text.model_cfg["text_cfg"]})
    write_json(job.folder / PREPROCESSING, document)


def input_facts(job: ExportJob) -> list[str]:
    """Sentences for the card on what goes in and comes out."""
    notes = [
        f"Images go in as (batch, 3, {job.image_size}, {job.image_size}) float32, normalised as `{PREPROCESSING}` "
        f"says, and come out as (batch, {job.embed_dim}) embeddings that are not normalised."
    ]
    if job.text is None:
        notes.append("The cache keeps no text tower of this teacher: the image tower stands alone.")
    elif job.text.model_cfg is not None:
        notes.append('`open_clip.get_tokenizer("local-dir:.")` makes the token ids of the text tower.')
    return notes
