"""A whole world for tests: images, sentences, classes, a labelled set, a tiny teacher, and a config over them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
COLOURS = {"c_red": (220, 30, 30), "c_green": (30, 200, 40), "c_blue": (30, 60, 220), "c_white": (240, 240, 240)}

CONFIG = """
[teacher]
model = "{model}"
pretrained = "{weights}"
batch_size = 4
workers = 2
device = "cpu"
[images]
source = "images/"
[sentences]
source = ["captions.txt"]
[cache]
dir = "cache"
shard_rows = 4
[pairs]
k = 3
[student.small]
model = "timm:resnet10t"
image_size = 32
[student.vit]
model = "timm:vit_tiny_patch16_224"
image_size = 32
[distill]
output = "runs"
epochs = 2
batch_images = 8
batch_sentences = 12
log_every = 1
device = "cpu"
workers = 2
[distill.loss]
vl = 0.7
pvl = 0.3
feature = 1.0
[evaluate.dev]
images = "dev/"
classes = "classes.json"
templates = "templates.txt"
"""


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    """A noisy picture of one colour."""
    noise = np.random.default_rng(seed).normal(0, 25, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def make_world(folder: Path, teacher: tuple[Path, Path], num_images: int = 30, num_sentences: int = 22) -> Path:
    """Write everything that a run needs into a folder; returns the path of its config."""
    colours = list(COLOURS.values())
    for i in range(num_images):
        path = folder / "images" / f"{i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(colours[i % 4], i).save(path)
    lines = [f"picture number {i} of something {list(COLOURS)[i % 4][2:]}" for i in range(num_sentences)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.json").write_text(json.dumps({name: [name[2:], f"{name[2:]} thing"] for name in COLOURS}))
    (folder / "templates.txt").write_text("a {} picture\nsomething {}\n")
    for name, colour in COLOURS.items():
        for i in range(3):
            path = folder / "dev" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(colour, 1000 + i).save(path)
    config = folder / "run.toml"
    config.write_text(CONFIG.format(model=teacher[0], weights=teacher[1]))
    return config
