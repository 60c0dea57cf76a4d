"""The plan of a cache: made from what a run asks for, and the arrays that it stands for."""

import os
from collections.abc import Mapping
from typing import Any

from ...cache.disk.arrays import ArraySpec
from ...cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ...cache.version.schema import Inputs, Plan, Views
from ...stages.images.crops import decoder
from ...stages.settings.cache import CacheSettings, CropSettings


def make_plan(layout: Layout, cache: CacheSettings, teacher: Mapping[str, Any], inputs: Inputs) -> Plan:
    """The plan of a new cache; what is not asked for is not in it.

    Args:
        teacher: the identity of the loaded teacher.
    """
    optional = {"rows_of": rows_of(layout, cache), "pixels": cache.pixels, "views": asked_views(cache)}
    given = {key: value for key, value in optional.items() if value}
    return Plan.model_validate({"shard_rows": cache.shard_rows, "teacher": teacher, "inputs": inputs, **given})


def rows_of(layout: Layout, cache: CacheSettings) -> str | None:
    """The cache whose row tables are shared (`cache.rows`), as a path from the cache's folder."""
    return None if cache.rows is None else os.path.relpath(cache.rows, layout.root)


def asked_views(cache: CacheSettings) -> Views | None:
    """The crops that are asked for beside the centre; None where there are none."""
    if not cache.num_crops:
        return None
    crops = (cache.crops or CropSettings()).model_dump(mode="json")
    return Views(count=cache.num_crops, crops=crops, decoder=decoder())


def array_specs(inputs: Inputs, width: int, chunk: int, num_crops: int = 0) -> dict[str, ArraySpec]:
    """The arrays of `teacher.zarr`.

    Args:
        width: of an embedding.
        chunk: rows of a file.
        num_crops: crops of each training image beside its centre.
    """
    views = (1 + num_crops,) if num_crops else ()
    specs = {
        IMAGES: ArraySpec((inputs.images.rows, *views, width), "float16", chunk),
        SENTENCES: ArraySpec((inputs.sentences.rows, width), "float16", chunk),
    }
    for name, item in inputs.evaluate.items():
        num_classes = len(item.class_ids)
        specs[evaluate_images(name)] = ArraySpec((item.rows, width), "float16", chunk)
        specs[evaluate_head(name)] = ArraySpec((num_classes, width), "float32", num_classes)
    return specs


def planned_specs(plan: Plan) -> dict[str, ArraySpec]:
    """The arrays of a plan."""
    num_crops = plan.views.count if plan.views else 0
    return array_specs(plan.inputs, plan.teacher.embed_dim, plan.shard_rows, num_crops)


def views_of(spec: ArraySpec) -> int:
    """Embeddings of each row of an array: what a row costs, in embeddings of one sentence or one view."""
    return spec.shape[1] if len(spec.shape) == 3 else 1
