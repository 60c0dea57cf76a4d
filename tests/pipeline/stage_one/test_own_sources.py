"""A source of images from outside of the package: it is named in the config, and every command reads through it."""

import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dimefm.cache import FeatureCache, InputError
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.inputs.image_source import FoundImage, ImageSource
from dimefm.stages.inputs.open_source import KINDS, open_source

from ...support import zip_images
from ...support.commands import refused, run_dimefm, tree
from ...support.worlds import make_world, picture

NAMED = {'"images/"': '"my_images:photos"', '"dev/"': '"my_images:dev_photos"'}


@pytest.fixture
def world(tmp_path, tiny_teacher, monkeypatch):
    """(a config over folders, a config over zip files of the same images); the working directory is the second's."""
    folders, zips = (make_world(tmp_path / name, tiny_teacher) for name in ("folders", "zips"))
    text = zips.read_text() + "[distill.augment]\nscale = [0.9, 1.0]\n"
    for folder, function in NAMED.items():
        text = text.replace(folder, function)
    zips.write_text(text)
    shutil.copy(zip_images.__file__, zips.parent / "my_images.py")
    for folder, name in (("images", "photos.zip"), ("dev", "dev.zip")):
        pack(zips.parent / folder, zips.parent / name)
    monkeypatch.chdir(zips.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield folders, zips
    sys.modules.pop("my_images", None)


def pack(folder: Path, target: Path) -> None:
    """Move the files of a folder into a zip file."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, path.relative_to(folder))
    shutil.rmtree(folder)


def test_a_source_from_outside_embeds_to_the_same_bytes_as_the_folder(world):
    folders, zips = world
    for config in world:
        config.write_text(config.read_text().replace('dir = "cache"', 'dir = "cache"\npixels = "jpeg-24"'))
        cache_teacher(load_config(config))
    there, here = (tree(config.parent / "cache") for config in (folders, zips))
    same = {name for name in there if name.startswith(("teacher.zarr", "pairs.zarr", "index", "pixels", "plan"))}
    assert len(same) > 20 and {name: here[name] for name in same} == {name: there[name] for name in same}


def test_every_command_reads_through_a_source_from_outside(world, capsys):
    _, config = world
    root = config.parent / "cache"
    for words in (("cache-teacher", config), ("distill", config, "--student", "small", "--steps", "2")):
        assert run_dimefm(capsys, *words).code == 0
    assert run_dimefm(capsys, "evaluate", config.parent / "runs/small").code == 0
    assert run_dimefm(capsys, "cache", "verify", root, "--teacher", "--sources").code == 0
    whole = tree(root)
    chunk = root / "teacher.zarr/images/embedding/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    assert run_dimefm(capsys, "cache", "repair", root).code == 0
    assert tree(root) == whole
    with zipfile.ZipFile("photos.zip", "a") as archive, archive.open("9/new.png", "w") as file:
        picture((1, 2, 3), 7).save(file, "PNG")
    done = run_dimefm(capsys, "plan", config)
    assert "images.source: 1 images have appeared since" in done.out + "\n".join(done.lines)
    assert run_dimefm(capsys, "cache", "append", root).code == 0
    images = FeatureCache.open(root).images
    assert images.rows.take([30], "source") == ["9/new.png"] and np.isfinite(images.embeddings[[30]]).all()


def test_a_source_that_is_gone_is_named_by_its_location(world, capsys):
    _, config = world
    cache_teacher(load_config(config))
    Path("photos.zip").unlink()
    assert "photos.zip: not at hand; stage two needs" in refused(capsys, "distill", config)
    assert "photos.zip is not at hand" in refused(capsys, "cache", "verify", config.parent / "cache", "--sources")


@pytest.mark.parametrize(
    ("spec", "words"), [("my_images:absent", "defines no 'absent'"), ("nowhere:f", "no module 'nowhere'")]
)
def test_a_source_that_does_not_exist_is_refused_with_the_config(world, spec, words):
    _, config = world
    config.write_text(config.read_text().replace("my_images:photos", spec))
    with pytest.raises(InputError, match=rf"run\.toml: images\.source: .*{words}"):
        load_config(config)


def test_what_is_no_source_is_refused(world):
    with pytest.raises(InputError, match="my_images:no_source: made a int; wanted an instance of a class that derives"):
        open_source("my_images:no_source")


def test_a_new_kind_of_source_is_a_class_and_a_line(monkeypatch):
    class Drawn(ImageSource):
        location = "drawn:"

        def list(self):
            return [FoundImage("one.png", 3, 0)]

        def read(self, key):
            return b"png"

    monkeypatch.setattr(
        "dimefm.stages.inputs.open_source.KINDS", ((lambda spec: spec == "drawn:", lambda spec: Drawn()), *KINDS)
    )
    source = open_source("drawn:")
    assert source.at_hand() and source.locate("one.png") == "drawn:: one.png" and len(source.digest("one.png")) == 32
    assert isinstance(open_source(Path("folder")), ImageFolder) and open_source(source) is source


def test_a_folder_whose_name_looks_like_a_function_is_a_path_with_a_slash(world):
    _, config = world
    config.write_text(config.read_text().replace("my_images:photos", "./my_images:photos"))
    assert load_config(config).images.source == config.parent / "my_images:photos"
