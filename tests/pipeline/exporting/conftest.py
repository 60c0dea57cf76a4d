"""A world with a cache and a step of each kind of student."""

import json
import shutil
import sys

import pytest

from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.distill import distill
from dimefm.stages.export import latency

from ...support.small_cache import STUDENTS
from ...support.worlds import make_world

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
MORE = """
[student.talks]
model = "timm:resnet10t"
image_size = 32
text = "text.json"
[student.own]
model = "own_students_x:plain"
image_size = 24
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_teacher):
    """The folder of the world: a student of timm's, a transformer, one with a text tower, and one of the user's own."""
    folder = tmp_path_factory.mktemp("exporting")
    config = make_world(folder, tiny_teacher)
    (folder / "text.json").write_text(json.dumps({"embed_dim": 32, "text_cfg": TEXT}))
    (folder / "own_students_x.py").write_text(STUDENTS)
    text = config.read_text().replace("[student.vit]", f"{MORE}\n[student.vit]")
    text = text.replace("batch_sentences = 12", "batch_sentences = 12\nbatch_texts = 8")
    config.write_text(text.replace("[cache]", '[cache]\npixels = "jpeg-64"'))
    sys.path.insert(0, str(folder))
    try:
        loaded = load_config(config)
        cache_teacher(loaded)
        distill(loaded, [], stop_after=2, together=True)
        yield folder
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("own_students_x", None)


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy that a test may change."""
    shutil.copytree(trained, tmp_path / "world")
    for source in (tmp_path / "world" / "runs").glob("*/source.json"):
        source.write_text(source.read_text().replace(str(trained), str(tmp_path / "world")))
    note = tmp_path / "world" / "cache" / "log" / "config.json"
    note.write_text(note.read_text().replace(str(trained), str(tmp_path / "world")))
    return tmp_path / "world"


@pytest.fixture(autouse=True)
def _no_time_is_measured(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    monkeypatch.setattr(latency, "BATCH_SIZES", (1, 2))
