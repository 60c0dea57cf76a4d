"""Images that are others than stage one embedded: one loud line and a record, and no word where they are the same."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dimefm.cache import FeatureCache
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_two.changed_sources import watch_source
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.inputs.image_source import row_keys

from ...support.commands import refused, run_dimefm
from ...support.worlds import make_world, picture

SCORED = ["--set", "distill.evaluate_every=1"]


@pytest.fixture(scope="module", params=[False, True], ids=["times", "checksums"])
def cached(request, tmp_path_factory, tiny_teacher):
    """A world of 12 images that is cached, with checksums or without."""
    config = make_world(tmp_path_factory.mktemp("changed"), tiny_teacher, num_images=12, num_sentences=14)
    if request.param:
        config.write_text(config.read_text().replace('source = "images/"', 'source = "images/"\nhash = true'))
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def config(cached, tmp_path):
    shutil.copytree(cached.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


def other_pictures(folder, side):
    for i, path in enumerate(sorted(folder.rglob("*.*"))):
        picture((9 * i, 200, 9), 7000 + i).resize((side, side)).save(path)


def train(capsys, config, *words):
    done = run_dimefm(capsys, "distill", config, "--student", "small", "--steps", "1", *words)
    assert done.code == 0, done.lines
    return [line for line in done.lines if "sampled" in line or "were read" in line]


def record(config):
    return json.loads((config.parent / "runs/small/run.json").read_bytes()).get("changed_sources")


def test_nothing_is_said_of_images_that_are_what_they_were(config, capsys):
    assert train(capsys, config, *SCORED) == [] and record(config) is None
    done = run_dimefm(capsys, "evaluate", config.parent / "runs/small")
    assert done.code == 0 and not any("warning" in line or "read" in line for line in done.lines), done.lines
    assert "changed_sources" not in json.loads((config.parent / "runs/small/evaluation.json").read_bytes())["dev"]


def test_other_images_and_another_dev_set_are_one_line_each_and_stand_in_the_records(config, capsys):
    other_pictures(config.parent / "images", 40)
    other_pictures(config.parent / "dev", 40)
    lines = train(capsys, config, *SCORED)
    assert [line.split(": ")[:2] for line in lines] == [
        ["warning", f"{key}"]
        for key in ("images.source", "evaluate.dev.images", "evaluate.dev.images", "images.source")
    ], lines
    assert "12 of 12 sampled images are not what stage one embedded" in lines[0] and "'0/000.jpg'" in lines[0]
    found = record(config)
    assert found["images.source"] == {"sampled": 12, "changed": 12, "touched": 0, "gone": 0, "read": 8}
    assert found["evaluate.dev.images"] == {"sampled": 12, "changed": 12, "touched": 0, "gone": 0, "read": 12}
    done = run_dimefm(capsys, "evaluate", config.parent / "runs/small")
    assert done.code == 0 and sum("warning: evaluate.dev.images" in line for line in done.lines) == 2, done.lines
    scores = json.loads((config.parent / "runs/small/evaluation.json").read_bytes())["dev"]
    assert scores["changed_sources"] == found["evaluate.dev.images"]


def test_copies_without_their_times_are_one_line_and_no_change_where_a_checksum_can_tell(config, capsys):
    for path in (config.parent / "images").rglob("*.*"):
        os.utime(path, ns=(1, 10**18))
    lines = train(capsys, config)
    if "hash = true" in config.read_text():
        assert lines == [] and record(config) is None
        path = config.parent / "images/0/003.jpg"
        data = bytearray(path.read_bytes())
        data[-10] ^= 1
        path.write_bytes(data)
        (line,) = train(capsys, config)
        assert "1 of 12 sampled images are not what stage one embedded (another size or checksum): '0/003.jpg'" in line
    else:
        (line,) = lines
        assert line.startswith("images.source: ") and "12 of 12 sampled images have another modification time" in line
        assert record(config)["images.source"]["touched"] == 12


def test_times_that_an_archive_rounds_are_the_same(config, capsys):
    for path in (config.parent / "images").rglob("*.*"):
        os.utime(path, ns=(1, path.stat().st_mtime_ns // 10**9 * 10**9))
    assert train(capsys, config) == []


def test_a_run_that_goes_on_over_changed_images_says_so_in_its_record_from_its_start(config, capsys):
    assert train(capsys, config) == []
    other_pictures(config.parent / "images", 40)
    assert len(train(capsys, config)) == 2
    assert record(config)["images.source"]["changed"] == 12


def test_a_labelled_set_of_which_nothing_is_there_is_refused_and_not_scored_as_wrong(config, capsys):
    train(capsys, config)
    for path in (config.parent / "dev").rglob("*.*"):
        path.unlink()
    line = refused(capsys, "evaluate", config.parent / "runs/small")
    assert "evaluate.dev.images" in line and "not one of 12 images" in line and "is the disk mounted?" in line


def test_images_that_cannot_be_read_are_named_when_they_are_scored(config, capsys):
    train(capsys, config)
    (config.parent / "dev/c_red/0.png").write_bytes(b"no image")
    done = run_dimefm(capsys, "evaluate", config.parent / "runs/small")
    assert "evaluate.dev: 1 images cannot be read and count as wrong: 'c_red/0.png'" in done.lines


@pytest.mark.parametrize("workers", [1, 3], ids=["threads", "processes"])
def test_rows_of_another_size_are_noted_whoever_reads_them(cached, tmp_path, workers):
    from dimefm.stages.images.views import ViewMaker
    from dimefm.stages.load.workers import ViewPool
    from dimefm.stages.settings.distill import AugmentSettings

    shutil.copytree(cached.parent / "images", tmp_path / "images", copy_function=shutil.copy2)
    images = FeatureCache.open(cached.parent / "cache").images
    picture((1, 2, 3), 9).resize((50, 50)).save(tmp_path / "images/1/004.jpg")
    watch = watch_source(ImageFolder(tmp_path / "images"), images, "images.source")
    rows = np.arange(12)
    keys = row_keys(watch.source, images.rows)(rows)
    with ViewPool(watch.source, [ViewMaker(AugmentSettings(), 8, Image.Resampling.BICUBIC)], 0, 12, 1, workers) as pool:
        for task in pool.start(0, rows, np.zeros(12, dtype=np.int64), keys):
            task.result()
    assert watch.source.changed.tolist() == [images.rows.column("source").to_pylist().index("1/004.jpg")]
