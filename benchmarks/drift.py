"""How near a replayed view is to the one that was embedded: the live teacher on what stage two shows, and the cache.

    python benchmarks/drift.py CONFIG CACHE [--images 500] [--seed 0]

CONFIG names the teacher and the images; CACHE is a finished cache of theirs with crops (`cache.views = K`). Of a
random sample of images every crop is made as stage two makes it, at the teacher's size, embedded by the live teacher in
the cache's precision, and compared with the stored embedding; and with the stored centre, which is what a student with
crops of its own is told instead.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.pipeline.config.load import load_config
from dimefm.stages.devices import resolve_device
from dimefm.stages.images.crops import Crops, resample_filter
from dimefm.stages.images.views import ViewMaker, make_views
from dimefm.stages.inputs.image_source import row_keys
from dimefm.stages.inputs.open_source import open_source
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.teacher import Teacher

LIMIT = 0.9999


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    config, cache = load_config(asked.config), FeatureCache.open(asked.cache)
    crops, views = Crops.read(cache.crops), cache.images.views
    if crops is None or views is None:
        parser.error(f"{asked.cache} has no crops; wanted one with cache.views = K")
    usable = cache.images.usable
    rows = np.sort(np.random.default_rng(asked.seed).choice(usable, min(asked.images, len(usable)), replace=False))
    teacher = load_teacher(config.teacher, resolve_device(config.teacher.device))
    side = teacher.image_size[0]
    maker = ViewMaker(crops.settings, side, resample_filter(cache.teacher["preprocess"]["interpolation"]), replays=True)
    source = open_source(config.images.source)
    files = [source.read(key) for key in row_keys(source, cache.images.rows)(rows)]
    own, centre = [], []
    for view in range(1, crops.count + 1):
        numbers = crops.numbers(rows, np.full_like(rows, view)).tolist()
        pixels = np.stack([make_views([maker], data, of)[0] for data, of in zip(files, numbers, strict=True)])
        live = embed(teacher, pixels, config.teacher.batch_size)
        own.append(cosines(live, views.at(rows, np.full_like(rows, view))))
        centre.append(cosines(live, views.view(0)[rows]))
    print(f"{len(rows):,} images, {crops.count} crops each, teacher at {side} px, {cache.teacher['precision']}")
    for name, values in (("its own embedding", np.stack(own)), ("the centre's embedding", np.stack(centre))):
        low, one_percent, median = values.min(), np.quantile(values, 0.01), np.median(values)
        print(f"cosine to {name}: least {low:.6f}, 1 % {one_percent:.6f}, median {median:.6f}")
    print(f"{'at least' if np.stack(own).min() >= LIMIT else 'BELOW'} {LIMIT}")


def embed(teacher: Teacher, pixels: np.ndarray, batch: int) -> np.ndarray:
    """(n, D) float32, in batches padded to one shape, as stage one does it."""
    blocks = []
    for first in range(0, len(pixels), batch):
        part = torch.from_numpy(pixels[first : first + batch])
        padded = torch.zeros(batch, *part.shape[1:], dtype=torch.uint8)
        padded[: len(part)] = part
        blocks.append(teacher.encode_images(teacher.normalise(padded)).numpy()[: len(part)])
    return np.concatenate(blocks).astype(np.float32)


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) row by row, in float64."""
    wide, far = rows.astype(np.float64), others.astype(np.float64)
    return (wide * far).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(far, axis=1)


if __name__ == "__main__":
    main()
