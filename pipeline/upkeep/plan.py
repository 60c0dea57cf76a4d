"""`dimefm plan`: what is done, what is left and what it will take, without loading a model."""

import shutil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.arrays import ArraySpec
from ...cache.disk.durable import read_lines
from ...cache.disk.layout import IMAGES, SENTENCES, Layout
from ...cache.reader.pixel_packs import kept_setting
from ...cache.version.journal import Journal
from ...cache.version.manifest import read_manifest
from ...cache.version.schema import ImageList, Inputs, LabelledList, SentenceList
from ...stages.inputs.image_source import label_images, list_notes
from ...stages.inputs.prompts import prompt_lines, read_classes
from ...stages.inputs.sentences import read_sentences
from ...stages.models.teacher_identity import configured_embed_dim
from ..config.load import Config
from ..stage_one.free_space import existing_parent
from ..stage_one.guards import check_run, is_finished, require_own_folder
from ..stage_one.kept_packs import image_sizes, pack_bytes
from ..stage_one.planned import array_specs, views_of
from ..stage_one.pseudo_pairs import retrieval_bytes, retrieval_memory
from ..stage_one.sources import Sources


def describe_plan(config: Config) -> dict[str, Any]:
    """What stage one has done and has still to do.

    Returns:
        `cache`, `state` (not started, unfinished, finished), `arrays` (rows, views, shards done and in all, bytes),
        `pixels` (None, or setting, rows, packs done and in all, estimated bytes), `notes`, `disk` of the whole cache,
        `memory_bytes`, the peak of anonymous memory while indexes and pairs are made, `rows_left`, `rows_per_s` and
        `seconds_left` (None until a shard has been measured). Sizes are None where only a hub knows the width.

    Raises:
        CacheError: if the cache belongs to another run.
    """
    layout = Layout(config.cache.dir)
    require_own_folder(layout)
    sources = Sources.of(config)
    checked = check_run(layout, config.teacher, config.cache, sources, report=True)
    plan = checked.plan
    width = plan.teacher.embed_dim if plan else configured_embed_dim(config.teacher)
    notes = list(checked.notes)
    inputs, sizes = (plan.inputs, None) if plan else _count_inputs(sources, notes)
    specs = array_specs(inputs, width or 1, config.cache.shard_rows, config.cache.num_crops)
    journal = Journal(layout)
    arrays = {name: _array_state(name, spec, journal) for name, spec in specs.items()}
    rows_left = sum(item["rows_left"] for item in arrays.values())
    # A row with K crops takes as long as 1 + K rows of other arrays.
    embeddings_left = sum(item["rows_left"] * item["views"] for item in arrays.values())
    rows = {side: specs[side].shape[0] for side in (IMAGES, SENTENCES)}
    sides = [(num_rows, width) for num_rows in rows.values()] if width else []
    retrieval = retrieval_bytes(sides, config.pairs)
    pixels = _pixels_state(config, layout, specs[IMAGES], sizes, journal)
    num_bytes = sum(spec.num_bytes for spec in specs.values()) + (pixels["estimated_bytes"] if pixels else 0)
    rate = _rows_per_s(layout, specs)
    finished = plan is not None and is_finished(layout, config.pairs, config.cache.pixels)
    return {
        "cache": str(layout.root),
        "state": "finished" if finished else "unfinished" if plan else "not started",
        "arrays": {name: {**item, "bytes": item["bytes"] if width else None} for name, item in arrays.items()},
        "pixels": pixels,
        "disk": {
            "cache_bytes": num_bytes + retrieval if width else None,
            "free_bytes": shutil.disk_usage(existing_parent(layout.root)).free,
        },
        "memory_bytes": retrieval_memory(sides, config.pairs) or None,
        "rows_left": rows_left,
        "rows_per_s": rate,
        "seconds_left": embeddings_left / (rate * views_of(specs[IMAGES])) if rate else None,
        "notes": notes,
    }


def plan_lines(found: dict[str, Any]) -> list[str]:
    """The same for a person to read."""
    lines, kept = [f"{found['cache']}: {found['state']}"], found["pixels"]
    for name, item in found["arrays"].items():
        size = f", {_size(item['bytes'])}" if item["bytes"] is not None else ""
        views = f" of {item['views']} views" if item["views"] > 1 else ""
        lines.append(
            f"  {name}: {item['rows']:,} rows{views}, {item['shards_done']} of {item['shards']} shards done{size}"
        )
    if kept:
        packs = f"{kept['rows']:,} rows, {kept['packs_done']} of {kept['packs']} packs done"
        lines.append(f"  pixels ({kept['setting']}): {packs}, about {_size(kept['estimated_bytes'])} (an estimate)")
    disk, free = found["disk"]["cache_bytes"], _size(found["disk"]["free_bytes"])
    wanted = "unknown before the teacher is loaded" if disk is None else _size(disk)
    lines.append(f"disk: {wanted} for embeddings, indexes and pairs, beside the text tower; {free} free")
    if found["memory_bytes"]:
        lines.append(f"memory: {_size(found['memory_bytes'])} at the peak of indexes and pairs, beside the teacher's")
    if not found["rows_left"]:
        pixels_left = kept and kept["packs_done"] < kept["packs"]
        lines.append("left: nothing to embed" + ("; pixels to keep, without the teacher" if pixels_left else ""))
    elif found["seconds_left"] is not None:
        rate = f"at the {found['rows_per_s']:,.0f} rows/s measured so far"
        lines.append(f"left: {found['rows_left']:,} rows, {found['seconds_left']:,.0f} s {rate}")
    else:
        lines.append(f"left: {found['rows_left']:,} rows; the time is known once the first shard is done")
    return lines + found["notes"]


def _count_inputs(sources: Sources, notes: list[str]) -> tuple[Inputs, NDArray[np.int64]]:
    """The inputs as far as rows are concerned, and (N,) bytes of each image, where there is no row table yet.

    `notes` takes lines on what the listing passes over.
    """
    num_sentences = sum(1 for _ in read_sentences(sources.sentences.source))
    if sources.sentences.prompts:
        num_sentences += len(prompt_lines(sources.sentences.prompts))
    evaluate = {}
    for name, labelled in sources.evaluate.items():
        class_ids = list(read_classes(labelled.settings.classes))
        of_set = label_images(labelled.images, class_ids)
        notes += list_notes(of_set, f"evaluate.{name}.images")
        evaluate[name] = LabelledList(class_ids=class_ids, class_names=[], rows=len(of_set))
    found = sources.images.list()
    notes += list_notes(found, "images.source")
    inputs = Inputs(images=ImageList(rows=len(found)), sentences=SentenceList(rows=num_sentences), evaluate=evaluate)
    return inputs, np.fromiter((image.bytes for image in found), np.int64, len(found))


def _array_state(name: str, spec: ArraySpec, journal: Journal) -> dict[str, Any]:
    missing = [shard for shard in range(spec.num_chunks) if not journal.has(name, shard, spec.rows_of(shard))]
    left = sum(spec.rows_of(shard) for shard in missing)
    return {
        "rows": spec.shape[0],
        "rows_left": left,
        "shards": spec.num_chunks,
        "shards_done": spec.num_chunks - len(missing),
        "views": views_of(spec),
        "bytes": spec.num_bytes,
    }


def _pixels_state(
    config: Config, layout: Layout, spec: ArraySpec, sizes: NDArray[np.int64] | None, journal: Journal
) -> dict[str, Any] | None:
    setting = config.cache.pixels or kept_setting(read_manifest(layout))
    if setting is None:
        return None
    shards = range(spec.num_chunks)
    return {
        "setting": setting,
        "rows": spec.shape[0],
        "packs": spec.num_chunks,
        "packs_done": sum(journal.has(layout.packs(setting), shard, spec.rows_of(shard)) for shard in shards),
        "estimated_bytes": pack_bytes(setting, image_sizes(layout, spec.shape[0]) if sizes is None else sizes),
    }


def _rows_per_s(layout: Layout, specs: dict[str, ArraySpec]) -> float | None:
    """Rows for each second of a device, over the image shards done so far; they are what takes long."""
    rows, seconds = 0, 0.0
    for line in read_lines(layout.timings):
        if line["array"] == IMAGES:
            spec = specs[IMAGES]
            rows += spec.rows_of(line["shard"])
            seconds += line["infer"] + line["wait"]
    return rows / seconds if seconds else None


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"
