"""Sources that changed after a cache listed them: what is said about which image, and by which evidence."""

import os
import shutil

import pytest
import xxhash
from PIL import Image

from dimefm.cache import CacheError, FeatureCache
from dimefm.cache.disk.durable import digest
from dimefm.cache.disk.layout import Layout
from dimefm.cache.disk.row_tables import RowTable, write_rows
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher
from dimefm.pipeline.stage_one.inputs import LineCount
from dimefm.pipeline.stage_one.source_changes import compare_images
from dimefm.pipeline.upkeep.plan import describe_plan
from dimefm.pipeline.upkeep.verify import verify
from dimefm.stages.inputs.image_folder import ImageFolder

from ...support.worlds import make_world, picture


@pytest.fixture(scope="module", params=[False, True], ids=["times", "checksums"])
def finished(request, tmp_path_factory, tiny_teacher):
    """A world whose stage one has run; its row tables have checksums or have none."""
    config = make_world(tmp_path_factory.mktemp("sources"), tiny_teacher, num_images=9, num_sentences=4)
    if request.param:
        config.write_text(config.read_text().replace('source = "images/"', 'source = "images/"\nhash = true'))
    cache_teacher(load_config(config))
    return config


@pytest.fixture
def world(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "world", copy_function=shutil.copy2)
    return tmp_path / "world" / "run.toml"


def compare(config):
    layout = Layout(config.parent / "cache")
    return compare_images(ImageFolder(config.parent / "images"), RowTable(layout.image_rows))


def hashed(config):
    return "hash = true" in config.read_text()


def test_checksums_are_in_the_row_tables_where_they_were_asked_for(world):
    rows = FeatureCache.open(world.parent / "cache").images.rows
    found = dict(zip(rows.column("source").to_pylist(), rows.column("digest").to_pylist(), strict=True))
    data = (world.parent / "images/1/004.jpg").read_bytes()
    assert found["1/004.jpg"] == (xxhash.xxh3_128(data).hexdigest() if hashed(world) else None)
    labelled = FeatureCache.open(world.parent / "cache").evaluate["dev"].images.rows.column("digest").to_pylist()
    assert all(labelled) == hashed(world)


def test_untouched_sources_are_no_news(world):
    assert compare(world).counts() == {"changed": 0, "touched": 0, "gone": 0, "new": 0}
    assert describe_plan(load_config(world))["notes"] == []


def test_plan_says_which_images_are_new_gone_and_changed(world):
    images = world.parent / "images"
    Image.new("RGB", (32, 32)).save(images / "0/new.png")
    (images / "0/003.jpg").unlink()
    picture((9, 9, 9), 77).resize((40, 40)).save(images / "1/004.jpg")
    notes = "\n".join(describe_plan(load_config(world))["notes"])
    assert "images.source: 1 images have appeared since; this cache does not hold them: '0/new.png'" in notes
    assert "images.source: 1 images of this cache are gone: '0/003.jpg'" in notes
    assert "images.source: 1 images have changed; this cache holds the old ones: '1/004.jpg'" in notes


def test_plan_says_which_lines_have_changed_are_gone_and_are_new(world):
    captions = world.parent / "captions.txt"
    lines = captions.read_text().splitlines()
    captions.write_text("\n".join([lines[0], "another", *lines[2:]]) + "\nmore\n")
    (note,) = describe_plan(load_config(world))["notes"]
    assert note == f"sentences.source: {captions}: 1 lines have changed (row 1), 1 lines are new"
    captions.write_text(f"{lines[0]}\n")
    (note,) = describe_plan(load_config(world))["notes"]
    assert note == f"sentences.source: {captions}: 3 lines are gone (rows 1-3)"
    with pytest.raises(CacheError, match=r"made from other lines: .*3 lines are gone"):
        cache_teacher(load_config(world))


def test_files_of_one_name_are_told_apart(world):
    shutil.rmtree(world.parent / "cache")
    (world.parent / "b").mkdir()
    (world.parent / "b/captions.txt").write_text("one\ntwo\nthree\n")
    world.write_text(world.read_text().replace('["captions.txt"]', '["captions.txt", "b/captions.txt"]'))
    cache_teacher(load_config(world))
    assert describe_plan(load_config(world))["notes"] == []
    (world.parent / "b/captions.txt").write_text("one\n2\n")
    wanted = {"counts": {"changed": 1, "gone": 1, "new": 0}, "rows": {"changed": [[5, 5]], "gone": [[6, 6]]}}
    found = verify(world.parent / "cache", world, sources=True)["sources"]["sentences"]
    assert {key: found[key] for key in wanted} == wanted
    assert describe_plan(load_config(world))["notes"] == [f"sentences.source: {note}" for note in found["notes"]]


def test_a_copied_image_is_no_change_where_a_checksum_can_tell(world):
    path = world.parent / "images/0/000.jpg"
    os.utime(path, ns=(1, 1))
    assert compare(world).counts() == {"changed": 0, "touched": 0 if hashed(world) else 1, "gone": 0, "new": 0}


def test_other_bytes_of_the_same_size_are_a_change_where_a_checksum_can_tell(world):
    path = world.parent / "images/0/000.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    kind = "changed" if hashed(world) else "touched"
    assert getattr(compare(world), kind) == {0: "0/000.jpg"}


def test_a_labelled_set_is_watched_too(world):
    (world.parent / "dev/c_red/0.png").unlink()
    notes = describe_plan(load_config(world))["notes"]
    assert notes == ["evaluate.dev.images: 1 images of this cache are gone: 'c_red/0.png'"]


def test_what_lies_beside_the_images_is_no_news_but_one_line_of_plan(world):
    images = world.parent / "images"
    for name in ("._000.jpg", ".DS_Store", "0/Thumbs.db"):
        (images / name).write_bytes(b"x")
    (images / "a.heic").write_bytes(b"x")
    assert describe_plan(load_config(world))["notes"] == [
        "images.source: 1 .heic passed over: not JPEG, PNG or WebP",
        "images.source: 3 hidden or system files and folders passed over (._*, .DS_Store, Thumbs.db, @eaDir, ...)",
    ]
    cache_teacher(load_config(world))


def test_rows_that_are_passed_over_by_now_are_not_gone(world):
    layout, images = Layout(world.parent / "cache"), world.parent / "images"
    names = {"0/000.jpg": "._0.jpg", "0/003.jpg": ".a/1.jpg"}

    def renamed(row):
        return {**row, "source": names.get(row["source"], row["source"])}

    table = RowTable(layout.image_rows)
    write_rows(layout.image_rows, table.schema, list(map(renamed, table.records())), 4)
    (images / ".a").mkdir()
    for old, new in names.items():
        (images / old).rename(images / new)
    assert compare(world).counts() == {"changed": 0, "touched": 0, "gone": 0, "new": 0}
    (images / "1/new.jfif").write_bytes((images / "1/004.jpg").read_bytes())
    assert compare(world).new == ["1/new.jfif"]


def test_a_pipe_in_an_images_place_is_not_waited_for(world):
    path = world.parent / "images/0/000.jpg"
    path.unlink()
    os.mkfifo(path)
    assert compare(world).changed == {0: "0/000.jpg"}


def test_another_folder_is_refused(world):
    shutil.rmtree(world.parent / "images")
    (world.parent / "images").mkdir()
    Image.new("RGB", (32, 32)).save(world.parent / "images/other.png")
    with pytest.raises(CacheError, match="holds none of the 9 images"):
        compare(world)


def test_lines_of_a_file_are_counted_with_the_digest_of_its_beginning(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(b"one\r\n\ntwo")
    whole = LineCount(path, upto=2).read_all()
    assert whole.document().to_dict() == {"name": "lines.txt", "rows": 3, "digest": digest(b"one\n\ntwo\n")}
    assert (whole.num_good, whole.digest_upto) == (2, digest(b"one\n\n"))
    assert LineCount(path, upto=0).read_all().digest_upto == digest()
    assert LineCount(path, upto=4).read_all().digest_upto is None
