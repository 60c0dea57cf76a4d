"""`dimefm demo`: a self-contained example, drawn on the spot, with a teacher that the package ships: no download."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from ..cache.disk.durable import PARTIAL, make_folder, to_json, write_bytes, write_json
from ..cache.errors import InputError
from ..stages.demo.scene_captions import TEMPLATES, caption, class_id, classes
from ..stages.demo.scene_pictures import draw, jpeg_bytes
from ..stages.demo.scenes import HELD_OUT, SEEN, Composition, Scene, Source, make_scene
from ..stages.demo.shipped_teacher import MODEL_CONFIG, SHIPPED, unpack
from .progress import Bar, bar, say

VERSION = 2
"""Raised whenever the same size would give other files."""
RECORD = "demo.json"
CONFIG = "demo.toml"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class DemoSize:
    """How much of everything. The defaults leave `make distill` within three minutes on two cores."""

    num_images: int = 6000
    num_sentences: int = 20000
    num_per_class: int = 20
    """Pictures of each class of `dev/`, `test/` and `heldout/`."""
    seed: int = 0


def run_demo(folder: Path) -> None:
    """Write the demo, or what is missing of it, with progress on standard error."""
    with ExitStack() as stack:
        shown: dict[tuple[str, int], Bar] = {}

        def show(text: str, done: int, total: int) -> None:
            if (text, total) not in shown:
                stack.close()
                shown[text, total] = stack.enter_context(bar(text, total, "steps", done - 1))
            shown[text, total].update(done)

        write_demo(folder, show)
    say(f"{folder}: the demo is there; `dimefm cache-teacher {folder / CONFIG}` comes next")


def write_demo(folder: Path, progress: Progress | None = None, size: DemoSize | None = None) -> None:
    """Write images, sentences, classes, the teacher and, last, `demo.toml`.

    Safe to repeat: existing files are kept and missing ones are made, with the bytes of an uninterrupted run.

    Args:
        folder: made if it does not exist.
        progress: called as the work proceeds.
        size: how much of everything; the default is the demo of the README.

    Raises:
        InputError: if the folder holds something else, or a demo of another size or version.
    """
    size = size or DemoSize()
    tell: Progress = progress or (lambda *_: None)
    _claim(folder, size)
    for partial in folder.glob(f".*{PARTIAL}"):  # not below it: a cache that is being written may be there by now
        partial.unlink(missing_ok=True)
    _write_once(folder / "templates.txt", lambda: _lines(TEMPLATES))
    _write_once(folder / "classes.json", lambda: to_json(classes(held_out=False)))
    _write_once(folder / "classes_heldout.json", lambda: to_json(classes(held_out=True)))
    _write_once(folder / "captions.txt", lambda: _lines(_sentences(size, tell)))
    _write_pictures(folder, size, tell)
    _write_once(folder / "teacher.json", lambda: to_json(MODEL_CONFIG))
    _write_once(folder / "teacher.safetensors", lambda: unpack(SHIPPED.read_bytes()))
    _write_once(folder / CONFIG, CONFIG_TEXT.encode)


def _claim(folder: Path, size: DemoSize) -> None:
    """Record in the folder which demo it holds, or refuse a folder with other contents."""
    record = {"dimefm_demo": VERSION, **asdict(size)}
    path = folder / RECORD
    if path.exists():
        if path.read_bytes() != to_json(record):
            raise InputError(f"{folder}: holds a demo of another size or version; choose another folder or delete it")
        return
    if folder.exists() and (not folder.is_dir() or any(entry.suffix != PARTIAL for entry in folder.iterdir())):
        raise InputError(f"{folder}: is in other use; wanted a folder that is new or empty")
    make_folder(folder)
    write_json(path, record)


def _write_once(path: Path, make: Callable[[], bytes]) -> None:
    if not path.exists():
        write_bytes(path, make())


def _lines(sentences: Sequence[str]) -> bytes:
    return "".join(f"{sentence}\n" for sentence in sentences).encode()


def _sentences(size: DemoSize, tell: Progress) -> list[str]:
    """Different sentences about scenes of which there are no pictures."""
    found: dict[str, None] = {}
    row = 0
    while len(found) < size.num_sentences:
        found[caption(make_scene(size.seed, Source.SENTENCES, row))] = None
        row += 1
        tell("writing sentences", len(found), size.num_sentences)
    return list(found)


def pictures(size: DemoSize) -> Iterator[tuple[str, Scene]]:
    """Every picture of the demo: its path in the folder and its scene."""
    for row in range(size.num_images):
        yield f"images/{row // 1000:02d}/{row:06d}.jpg", make_scene(size.seed, Source.IMAGES, row)
    sets: list[tuple[str, Source, list[Composition]]] = [
        ("dev", Source.DEV, list(SEEN)),
        ("test", Source.TEST, list(SEEN)),
        ("heldout", Source.HELD_OUT, sorted(HELD_OUT)),
    ]
    for name, source, compositions in sets:
        for i, composition in enumerate(compositions):
            for j in range(size.num_per_class):
                scene = make_scene(size.seed, source, i * size.num_per_class + j, composition, num_things=1)
                yield f"{name}/{class_id(composition)}/{j:03d}.jpg", scene


def _write_pictures(folder: Path, size: DemoSize, tell: Progress) -> None:
    total = size.num_images + size.num_per_class * (2 * len(SEEN) + len(HELD_OUT))
    for done, (name, scene) in enumerate(pictures(size), start=1):
        path = folder / name
        # An fsync for each would take longer than drawing: a power cut may leave an empty file, which is drawn again.
        if not (path.exists() and path.stat().st_size):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}{PARTIAL}")
            partial.write_bytes(jpeg_bytes(draw(scene)))
            partial.replace(path)
            tell("drawing pictures", done, total)


CONFIG_TEXT = """\
# A self-contained example that `dimefm demo` wrote. Paths start at this file's folder.
[teacher]
model = "teacher.json"
pretrained = "teacher.safetensors"

[images]
source = "images/"              # drawn scenes, unlabelled

[sentences]
source = ["captions.txt"]       # about other scenes: no sentence belongs to a picture

[cache]
dir = "teacher-cache"
shard_rows = 1024

[student.mobile]
model = "timm:mobilenetv3_small_100"
image_size = 64

[student.levit]
model = "timm:levit_128s"
image_size = 64

[distill]
output = "runs"
epochs = 6
batch_images = 64
batch_sentences = 1024
lr = 4e-3
[distill.augment]
scale = [0.9, 1.0]              # the scenes are small: a tighter crop cuts things off that the teacher saw

[evaluate.dev]                  # one thing to name: 40 compositions of colour and shape
images = "dev/"
classes = "classes.json"
templates = "templates.txt"

[evaluate.test]
images = "test/"
classes = "classes.json"
templates = "templates.txt"

[evaluate.heldout]              # 24 compositions that no image, no sentence and no teacher's caption has
images = "heldout/"
classes = "classes_heldout.json"
templates = "templates.txt"
"""
