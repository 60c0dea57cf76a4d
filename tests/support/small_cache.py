"""A finished cache made by hand: random embeddings, real rows, real image files. No teacher and no stage one."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dimefm.cache.disk.arrays import ArraySpec, declare_arrays, write_chunk
from dimefm.cache.disk.layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from dimefm.cache.disk.row_tables import FAILED, IMAGE_COLUMNS, LABELLED_COLUMNS, SENTENCE_COLUMNS, write_rows
from dimefm.cache.reader.feature_cache import FeatureCache
from dimefm.cache.version.manifest import write_manifest
from dimefm.cache.version.plan_file import identity, write_plan
from dimefm.cache.version.schema import Manifest, Plan

EMBED_DIM = 16
CHUNK_ROWS = 16
CLASSES = ["a_red", "b_green", "c_blue"]
TEACHER = {
    "model": "tiny",
    "pretrained": "tiny.safetensors",
    "logit_scale": 20.0,
    "preprocess": {
        "size": 24,
        "mode": "RGB",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.3, 0.3, 0.2],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    },
}

STUDENTS = """
from torch import nn

def with_dropout(embed_dim, image_size):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(8 * (image_size // 2) ** 2, embed_dim))

def plain(embed_dim, image_size):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GELU(), nn.Flatten(),
                         nn.Linear(8 * (image_size // 2) ** 2, embed_dim))

def norms_over_one_pixel(embed_dim, image_size):
    return nn.Sequential(nn.Conv2d(3, 8, image_size), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, embed_dim))

def with_unused(embed_dim, image_size):
    model = plain(embed_dim, image_size)
    model[0].head_of_old = nn.Linear(3, 4)
    return model

def broken(embed_dim, image_size):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = plain(embed_dim, image_size), 0
        def forward(self, images):
            self.calls += self.training
            return self.inner(images) * (float("nan") if self.calls > 2 else 1)
    return Broken()

def too_wide(embed_dim, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, embed_dim + 1))

def no_model(embed_dim, image_size):
    return 3

def other_arguments(width):
    return None
"""


def text_config(folder: Path, **more: object) -> str:
    """Write an open_clip model config with a tiny text tower; returns its path."""
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, **more}
    (folder / "text.json").write_text(json.dumps({"embed_dim": 512, "text_cfg": text}))
    return str(folder / "text.json")


def photo(path: Path, seed: int, size: tuple[int, int] = (28, 24)) -> str:
    """Write a noisy picture; returns its path below the folder of its split."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.name


def make_cache(
    folder: Path,
    num_images: int = 40,
    num_sentences: int = 30,
    embed_dim: int = EMBED_DIM,
    image_size: tuple[int, int] = (28, 24),
) -> FeatureCache:
    """Write `images/`, `dev/`, `cache/` into a folder. Image row 3 failed; the file of dev's row 1 is no image."""
    random = np.random.default_rng(0)
    layout = Layout(folder / "cache")
    dev_rows = []
    for i in range(9):
        name = CLASSES[i // 3]
        dev_rows.append({"source": f"{name}/{photo(folder / 'dev' / name / f'{i}.png', 100 + i)}", "class_id": name})
    (folder / "dev" / dev_rows[1]["source"]).write_bytes(b"no image")
    image_rows = [{"source": photo(folder / "images" / f"{i:03d}.jpg", i, image_size)} for i in range(num_images)]
    image_rows[3] |= {"status": FAILED, "reason": "truncated"}
    arrays = {
        IMAGES: random.normal(size=(num_images, embed_dim)) + 1,
        SENTENCES: random.normal(size=(num_sentences, embed_dim)) + 1,
        evaluate_images("dev"): random.normal(size=(9, embed_dim)),
    }
    arrays[IMAGES][3] = np.nan
    head = random.normal(size=(len(CLASSES), embed_dim))
    specs = {name: ArraySpec(array.shape, "float16", CHUNK_ROWS) for name, array in arrays.items()}
    specs[evaluate_head("dev")] = ArraySpec(head.shape, "float32", len(CLASSES))
    declare_arrays(layout.teacher_zarr, specs)
    for name, array in arrays.items():
        for chunk in range(specs[name].num_chunks):
            block = array[chunk * CHUNK_ROWS : (chunk + 1) * CHUNK_ROWS]
            write_chunk(layout.teacher_zarr, name, specs[name], chunk, block)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    write_chunk(layout.teacher_zarr, evaluate_head("dev"), specs[evaluate_head("dev")], 0, head)
    write_rows(layout.image_rows, IMAGE_COLUMNS, image_rows, CHUNK_ROWS)
    write_rows(layout.evaluate_rows("dev"), LABELLED_COLUMNS, dev_rows, CHUNK_ROWS)
    write_rows(layout.sentence_rows, SENTENCE_COLUMNS, ({"text": f"s{i}"} for i in range(num_sentences)), CHUNK_ROWS)
    dev = {"class_ids": CLASSES, "class_names": [[name] for name in CLASSES]}
    inputs = {"images": {"rows": num_images}, "sentences": {"rows": num_sentences}, "evaluate": {"dev": dev}}
    write_plan(layout, Plan.model_validate({"shard_rows": CHUNK_ROWS, "teacher": TEACHER, "inputs": inputs}))
    counts = {name: {"rows": len(array)} for name, array in arrays.items()}
    manifest = {"version": 1, "plan": identity(layout), "arrays": counts, "files": {}}
    manifest |= {"transductive": [], "pairs": None, "pairs_settings": None}
    write_manifest(layout, Manifest.model_validate(manifest))
    return FeatureCache.open(layout.root)
