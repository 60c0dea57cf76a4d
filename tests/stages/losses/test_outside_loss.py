"""A loss that a user wrote: one file beside the config, one table in it."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from dimefm.cache import InputError
from dimefm.pipeline.config.load import load_config
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.settings.models import StudentSettings

from ...support.small_cache import text_config
from ...support.training import train_one

NAME = "my_losses:huber"
SOURCE = '''
"""What a user writes: it needs nothing of this package."""
import torch.nn.functional as F

def huber(inputs, factor, delta=1.0):
    student = F.normalize(inputs.local_student, dim=1)
    teacher = F.normalize(inputs.local_teacher.float(), dim=1)
    return F.huber_loss(factor * student, factor * teacher, delta=delta, reduction="sum") / len(inputs.global_student)

def to_sentences(inputs, factor):
    similarities = F.normalize(inputs.local_student, dim=1) @ F.normalize(inputs.global_others.float(), dim=1).T
    return -similarities.max(dim=1).values.sum() / len(inputs.global_student)

def a_row_each(inputs, factor):
    return inputs.local_student.sum(dim=1)
'''


CONFIG = """
teacher.model = "ViT-B-32"
images.source = "images"
sentences.source = ["captions.txt"]
cache.dir = "cache"
"""


@pytest.fixture
def mine(world):
    """The small world with losses of the user's in the folder where the command is run."""
    (world[1] / "my_losses.py").write_text(SOURCE)
    yield world
    sys.modules.pop("my_losses", None)


def settings_with(losses, **more):
    keys = {"epochs": 1, "batch_images": 9, "batch_sentences": 7, "batch_texts": 5, "log_every": 1, "device": "cpu"}
    return DistillSettings.model_validate({**keys, "workers": 1, "loss": losses, **more})


def train(world, settings, run="run", text="teacher", **options):
    student = StudentSettings(model="own_students:plain", image_size=8, text=text)
    train_one(world[0], world[1] / "images", student, settings, world[1] / run, **options)
    return [json.loads(line) for line in (world[1] / run / "metrics.jsonl").read_text().splitlines()]


def test_it_is_trained_logged_under_its_name_and_recorded(mine):
    table = {"weight": 0.5, "temperature": 4.0, "options": {"delta": 0.1}}
    lines = train(mine, settings_with({"feature": 1.0, NAME: table}))
    assert all(line["loss"] == pytest.approx(line["feature"] + 0.5 * line[NAME], rel=1e-6) for line in lines)
    assert lines[-1][NAME] < lines[0][NAME]
    record = json.loads((mine[1] / "run/run.json").read_text())
    assert record["distill"]["loss"][NAME] == {**table, "wants": []}
    with pytest.raises(InputError, match=r"my_losses:huber\.options\.delta = 0\.1, but this run asks for 0\.2"):
        train(mine, settings_with({"feature": 1.0, NAME: {**table, "options": {"delta": 0.2}}}))


def test_it_gets_the_factor_of_its_temperature_and_its_options(mine, monkeypatch):
    seen = []
    huber = F.huber_loss
    monkeypatch.setattr(F, "huber_loss", lambda *rows, **keys: seen.append((rows, keys)) or huber(*rows, **keys))
    train(mine, settings_with({NAME: {"weight": 1.0, "temperature": 4.0, "options": {"delta": 0.1}}}), stop_after=1)
    (rows, keys), *_ = seen
    assert keys["delta"] == 0.1
    norms = torch.stack([matrix.detach().norm(dim=1) for matrix in rows])
    torch.testing.assert_close(norms, torch.full_like(norms, 5.0))  # the small cache's logit scale is 20


def test_it_may_be_the_only_loss_and_have_sentences_drawn_for_it(mine):
    wanting = {"my_losses:to_sentences": {"weight": 1.0, "wants": ["others"]}}
    (line,) = train(mine, settings_with(wanting), stop_after=1)
    assert line["loss"] == pytest.approx(line["my_losses:to_sentences"])
    with pytest.raises(InputError, match=r"batch_sentences = 0, but distill\.loss\.my_losses:to_sentences is on"):
        train(mine, settings_with(wanting, batch_sentences=0), "other")


def test_a_text_tower_learns_from_it_too(mine):
    settings = settings_with({NAME: {"weight": 1.0}})
    (line,) = train(mine, settings, text=text_config(mine[1]), stop_after=1)
    assert line["loss"] == pytest.approx(line[NAME] + line[f"text_{NAME}"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "my_losses:huber",
            {"gamma": 1.0},
            r"huber: cannot be called as function\(inputs=…, factor=…, gamma",
        ),
        ("my_losses:a_row_each", {}, r"my_losses:a_row_each: returned a tensor \(9,\); wanted a scalar"),
    ],
)
def test_what_cannot_be_called_or_is_no_scalar_is_refused_in_one_line(mine, name, options, message):
    with pytest.raises(InputError, match=message) as refused:
        train(mine, settings_with({name: {"weight": 1.0, "options": options}}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('"my_losses:huber"]\nweight = 0.5', None),
        ('"my_losses:absent"]\nweight = 0.5', "distill.loss: my_losses:absent: .*my_losses.py defines no 'absent'"),
        ('"absent.module:loss"]\nweight = 0.5', "distill.loss: absent.module:loss: no module 'absent.module'"),
        ('"my_losses:huber"]\nweight = 0.0', r'distill\.loss\."my_losses:huber"\.weight: .* greater than 0'),
        ('"my_losses:huber"]\nweight = 1.0\ndelta = 1.0', r'"my_losses:huber"\.delta: no such key'),
        ("feture]\nweight = 1.0", "distill.loss.feture: no such key; did you mean feature"),
    ],
)
def test_a_config_is_refused_without_importing_anything(mine, table, message):
    path = mine[1] / "config.toml"
    path.write_text(f"{CONFIG}\n[distill.loss.{table}\n")
    if message is None:
        assert load_config(path).distill.losses[0].name == NAME
    else:
        with pytest.raises(InputError, match=message):
            load_config(path)
    assert "my_losses" not in sys.modules
