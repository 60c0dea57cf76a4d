"""Teachers are loaded in one place; one from outside of the package goes through both stages by its name alone."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.disk.layout import Layout
from dimefm.cache.version.manifest import read_manifest
from dimefm.pipeline.config.load import load_config
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.models.teacher import ImageTeacher, SavesTextTower, Teacher
from dimefm.stages.models.teacher_identity import configured_embed_dim, configured_identity
from dimefm.stages.settings.models import TEACHERS, TeacherSettings

from ...support import formula_teacher
from ...support.commands import refused, run_dimefm
from ...support.worlds import make_world

CPU = torch.device("cpu")
SPEC = "formula_teacher:load"
WRONG = """
from formula_teacher import FormulaTeacher

class NoTokens:
    settings = device = embed_dim = image_size = preprocess_cfg = None
    crop = view = normalise = encode_images = encode_tokens = identity = None

class NoWeights(FormulaTeacher):
    def identity(self):
        return {name: value for name, value in super().identity().items() if name not in ("weights", "libraries")}

class NoJson(FormulaTeacher):
    def identity(self):
        return {**super().identity(), "since": object()}

class NoHalves(FormulaTeacher):
    def encode_images(self, images):
        raise RuntimeError("not implemented for 'Half'")

no_tokens, no_weights, no_json, no_halves = (
    lambda settings, device, kind=kind: kind(settings, device) if issubclass(kind, FormulaTeacher) else kind()
    for kind in (NoTokens, NoWeights, NoJson, NoHalves)
)

def other_arguments(width):
    return None
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The folder where a user has a module with a teacher, and runs commands."""
    shutil.copy(formula_teacher.__file__, tmp_path)
    (tmp_path / "wrong_teachers.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("formula_teacher", "wrong_teachers"):
        monkeypatch.setitem(sys.modules, name, None)  # whatever the test imports is gone after it
        del sys.modules[name]
    return tmp_path


@pytest.fixture
def config(outside):
    """A whole world whose config names that teacher."""
    path = make_world(outside, (SPEC, "none"))
    path.write_text(path.read_text().replace('pretrained = "none"\n', ""))
    return path


def test_a_teacher_from_outside_goes_through_both_stages(config, capfd):
    root = config.parent / "cache"
    assert run_dimefm(capfd, "cache-teacher", config).code == 0
    cache = FeatureCache.open(root)
    teacher = formula_teacher.FormulaTeacher(load_config(config).teacher, CPU)
    sources = cache.images.rows.column("source").to_pylist()
    pixels = [teacher.crop(Image.open(config.parent / "images" / source)).reshape(3) for source in sources]
    np.testing.assert_array_equal(cache.images.embeddings[:], np.array([[*pixel, 1] for pixel in pixels], np.float16))
    texts = cache.sentences.rows.column("text").to_pylist()
    by_hand = [formula_teacher.sentence_embedding(text) for text in texts]
    np.testing.assert_array_equal(cache.sentences.embeddings[:], np.array(by_hand, np.float16))
    assert cache.teacher == teacher.identity()
    assert (cache.teacher["model"], cache.teacher["weights"]) == (SPEC, "a formula has none")
    done = run_dimefm(capfd, "cache", "verify", root, "--teacher", "--json")
    assert done.code == 0 and json.loads(done.out)["sound"]
    assert run_dimefm(capfd, "distill", config, "--student", "small").code == 0
    assert run_dimefm(capfd, "evaluate", config.parent / "runs/small").code == 0
    scores = json.loads((config.parent / "runs/small/evaluation.json").read_text())["dev"]
    assert scores["n"] == 12 and {"student_top1", "teacher_top1", "agreement"} <= scores.keys()


def test_without_a_text_tower_what_needs_one_says_so(config, capfd):
    assert run_dimefm(capfd, "cache-teacher", config).code == 0
    assert not (config.parent / "cache/text_tower").exists()
    assert read_manifest(Layout(config.parent / "cache")).text_tower is None
    (config.parent / "captions.json").write_text('{"c_red/0.png": ["something red"]}')
    config.write_text(config.read_text() + 'captions = "captions.json"\n')
    assert run_dimefm(capfd, "distill", config, "--student", "small", "--steps", "1").code == 0
    assert "text_tower: no text tower in this cache" in refused(capfd, "evaluate", config)


def test_plan_finds_it_without_importing_it(config, capfd):
    done = run_dimefm(capfd, "plan", config)
    assert done.code == 0 and "unknown before the teacher is loaded" in done.out
    assert "formula_teacher" not in sys.modules
    (config.parent / "formula_teacher.py").unlink()
    assert "teacher.model: formula_teacher:load: no module 'formula_teacher'" in refused(capfd, "plan", config)


def test_a_cache_of_a_teacher_from_outside_is_not_another_ones(config, capfd):
    assert run_dimefm(capfd, "cache-teacher", config).code == 0
    config.write_text(config.read_text().replace(SPEC, "wrong_teachers:no_json"))
    line = refused(capfd, "cache-teacher", config)
    assert "teacher.model" in line and SPEC in line and "wrong_teachers:no_json" in line


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            "no_tokens",
            "returned a NoTokens without logit_scale, tokenize; wanted all of dimefm.stages.models.teacher",
        ),
        ("no_weights", "its identity() lacks libraries, weights; wanted `weights` and all of basic_identity"),
        ("no_json", "its identity() is not JSON (Object of type object is not JSON serializable)"),
        ("no_halves", "does not run in fp16 on cpu (RuntimeError: not implemented for 'Half'); try teacher.precision"),
        ("other_arguments", "cannot be called as function(settings=…, device=…)"),
        ("absent", "cannot be imported"),
    ],
)
@pytest.mark.usefixtures("outside")
def test_what_is_no_teacher_is_refused_in_one_line(function, words):
    with pytest.raises(InputError) as refusal:
        load_teacher(TeacherSettings(model=f"wrong_teachers:{function}", precision="fp16"), CPU)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_kind_of_a_teacher_is_told_by_its_name():
    open_clip = set(TEACHERS.values())
    for model in ("ViT-B-32", "ViT/B-32", "hf-hub:org/name", "local-dir:some/folder", "model.json", "/a:b/model.json"):
        settings = TeacherSettings(model=model)
        assert not settings.is_from_outside and {settings.loader} == open_clip
    outside = TeacherSettings(model="a.b:c")
    assert outside.is_from_outside and outside.loader == "a.b:c"
    assert configured_identity(outside)["model"] == "a.b:c"


def test_every_loader_of_the_table_gives_what_the_protocol_asks_for(tiny_teacher):
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]))
    teacher = load_teacher(settings, CPU)
    names = [*ImageTeacher.__annotations__, *(name for name in dir(Teacher) if not name.startswith("_"))]
    assert {"embed_dim", "crop", "encode_tokens", "identity"} <= set(names)
    assert all(hasattr(teacher, name) for name in names) and isinstance(teacher, SavesTextTower)
    assert configured_embed_dim(settings) == teacher.embed_dim
