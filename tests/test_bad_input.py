"""Bad input as a user meets it, through the commands: a reason for the row, or one line and exit code 1.

What a decoder or a reader makes of a single bad file is in test_images.py and test_sentences.py.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dimefm.cache import FeatureCache
from dimefm.pipeline.config.load import load_config
from dimefm.pipeline.stage_one import embed_shards as embedding
from dimefm.pipeline.stage_one.cache_teacher import cache_teacher

from .stages.inputs.test_image_folder import bomb, encoded
from .support.commands import refused, run_dimefm
from .support.worlds import make_world, picture

TURNED = Image.Exif()
TURNED[0x0112] = 6
NOISE = picture((90, 120, 200), 5).resize((64, 64))


@pytest.fixture
def fresh(tmp_path, tiny_teacher) -> Path:
    return make_world(tmp_path, tiny_teacher, num_images=12, num_sentences=14)


# Rows: every odd image and sentence in one world, each with what its row has to say.

ODD_IMAGES = {
    b"cut.jpg": (encoded(NOISE, "JPEG")[:600], "truncated"),
    b"empty.png": (b"", "empty file"),
    b"gif.jpg": (encoded(NOISE, "GIF"), "not a JPEG, PNG or WebP image"),
    b"text.png": (b"<html>404</html>", "not a JPEG, PNG or WebP image"),
    b"png.jpg": (encoded(NOISE, "PNG"), None),
    b"bomb.png": (bomb(), "decompression bomb"),
    b"sixteen.png": (encoded(Image.fromarray(np.full((40, 40), 30_000, np.uint16)), "PNG"), None),
    b"cmyk.jpg": (encoded(NOISE.convert("CMYK"), "JPEG"), None),
    b"palette.png": (encoded(NOISE.quantize(16), "PNG"), None),
    b"alpha.webp": (encoded(NOISE.convert("RGBA"), "WEBP"), None),
    b"animated.webp": (encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]), None),
    b"turned.jpg": (
        encoded(NOISE, "JPEG", exif=TURNED),
        None,
    ),
    b"pixel.png": (encoded(NOISE.resize((1, 1)), "PNG"), None),
    b"sliver.png": (encoded(NOISE.resize((1, 10_000)), "PNG"), None),
    b"new\nline.png": (encoded(NOISE, "PNG"), None),
    b"quote\"'s.png": (encoded(NOISE, "PNG"), None),
    "ünï – 中.png".encode(): (encoded(NOISE, "PNG"), None),
    b"latin-\xe9.png": (encoded(NOISE, "PNG"), "file name is not UTF-8"),
}
ODD_SENTENCES = {
    b"": "blank",
    b" \t ": "blank",
    b"word " * 20_000: "longer than 65536 bytes",
    b"a" * 60_000: None,
    b"nul \0 byte": None,
    "一只猫坐在垫子上": None,
    "قطة على السجادة": None,
    "🐈 on a mat": None,
    b"caf\xe9 au lait": "not UTF-8",
    b'quote "and" comma,': None,
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory, tiny_teacher) -> FeatureCache:
    """Stage one over a folder of odd images, with a loop of links in it, and a file of odd sentences."""
    config = make_world(tmp_path_factory.mktemp("odd"), tiny_teacher, num_images=6, num_sentences=1)
    images = config.parent / "images"
    for name, (data, _) in ODD_IMAGES.items():
        Path(os.fsdecode(os.fsencode(images) + b"/" + name)).write_bytes(data)
    (images / "0/loop").symlink_to(images, target_is_directory=True)
    (images / "0/self.jpg").symlink_to("self.jpg")
    lines = [line if isinstance(line, bytes) else line.encode() for line in ODD_SENTENCES]
    (config.parent / "captions.txt").write_bytes(b"\n".join(lines) + b"\n")
    config.write_text(config.read_text().replace('source = "images/"', 'source = "images/"\nmax_failed = 0.5'))
    cache_teacher(load_config(config))
    return FeatureCache.open(config.parent / "cache")


@pytest.mark.parametrize("name", ODD_IMAGES, ids=lambda name: repr(name)[2:-1])
def test_an_odd_image_has_an_embedding_or_its_rows_reason(odd, name):
    source = name.decode(errors="backslashreplace")
    rows = odd.images.rows
    row = rows.column("source").to_pylist().index(source)
    reason = ODD_IMAGES[name][1]
    assert rows.take([row], "reason") == [reason]
    assert np.isfinite(odd.images.embeddings[[row]]).all() == (reason is None)
    assert (row in odd.images.usable) == (reason is None)


def test_a_loop_of_links_adds_no_row_and_a_link_to_itself_is_a_broken_one(odd):
    rows = odd.images.rows
    assert len(odd.images) == 6 + len(ODD_IMAGES) + 1
    assert rows.take([rows.column("source").to_pylist().index("0/self.jpg")], "reason") == ["broken link"]


@pytest.mark.parametrize("row", range(len(ODD_SENTENCES)), ids=lambda row: repr(list(ODD_SENTENCES)[row])[:24])
def test_an_odd_sentence_has_an_embedding_or_its_rows_reason(odd, row):
    line, reason = list(ODD_SENTENCES.items())[row]
    assert odd.sentences.rows.take([row], "reason") == [reason]
    assert np.isfinite(odd.sentences.embeddings[[row]]).all() == (reason is None)
    if reason is None:
        assert odd.sentences.rows.take([row], "text") == [line.decode() if isinstance(line, bytes) else line]


def test_odd_names_and_sentences_pass_through_json_and_one_screen(odd, capfd):
    folder = odd.layout.root
    for command in (["inspect", folder], ["duplicates", folder, "--threshold", "0.99"]):
        assert run_dimefm(capfd, "cache", *command).code == 0
        assert json.loads(run_dimefm(capfd, "cache", *command, "--json").out)["cache"] == str(folder)


def test_an_image_that_vanishes_during_the_run_costs_its_own_row(fresh, monkeypatch):
    vanished = fresh.parent / "images/0/009.jpg"
    embed = embedding.embed_shards

    def vanish_first(*arguments: object, **options: object) -> None:
        vanished.unlink()
        embed(*arguments, **options)

    monkeypatch.setattr("dimefm.pipeline.stage_one.cache_teacher.embed_shards", vanish_first)
    fresh.write_text(fresh.read_text().replace('source = "images/"', 'source = "images/"\nmax_failed = 0.1'))
    cache_teacher(load_config(fresh))
    cache = FeatureCache.open(fresh.parent / "cache")
    (row,) = set(range(12)) - set(cache.images.usable.tolist())
    assert cache.images.rows.take([row], "source") == ["0/009.jpg"]
    assert cache.images.rows.take([row], "reason") == ["gone"]


# Whole sources and checkpoints: one line, and nothing begun.


def test_sentences_in_another_encoding_are_one_line(fresh, capfd):
    (fresh.parent / "captions.txt").write_text("eins\nzwei\n", encoding="utf-16")
    line = refused(capfd, "cache-teacher", fresh)
    assert "captions.txt" in line and "UTF-16" in line and "iconv" in line


def test_a_file_of_nothing_but_another_encoding_is_one_line(fresh, capfd):
    (fresh.parent / "captions.txt").write_bytes("é\nü\n".encode("latin-1"))
    assert "no usable sentence in 2 lines" in refused(capfd, "cache-teacher", fresh)


@pytest.mark.parametrize("content", [b"", b"\n\n \n"], ids=["no line", "blank lines"])
def test_an_empty_corpus_is_one_line(fresh, capfd, content):
    (fresh.parent / "captions.txt").write_bytes(content)
    assert "no usable sentence" in refused(capfd, "cache-teacher", fresh)
    assert not (fresh.parent / "cache/plan.json").exists()


def test_a_folder_without_images_is_one_line(fresh, capfd):
    shutil.rmtree(fresh.parent / "images")
    (fresh.parent / "images").mkdir()
    assert "no image below it" in refused(capfd, "cache-teacher", fresh)


def test_more_neighbours_than_either_side_has_leaves_the_rest_empty(fresh):
    fresh.write_text(fresh.read_text().replace("k = 3", "k = 20"))
    cache_teacher(load_config(fresh))
    cache = FeatureCache.open(fresh.parent / "cache")
    for direction, others in (("image_to_sentence", 14), ("sentence_to_image", 12)):
        pairs = cache.pairs(direction)
        ids, scores = pairs.ids[:], pairs.scores[:]
        assert (np.sort(ids[:, :others], axis=1) == np.arange(others)).all() and (ids[:, others:] == -1).all()
        assert np.isfinite(scores[:, :others]).all() and np.isnan(scores[:, others:]).all()


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


def test_a_checkpoint_with_a_pickle_inside_is_one_line_and_does_not_run(fresh, capfd, tiny_teacher):
    trace, weights = fresh.parent / "trace", fresh.parent / "weights.pt"
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}, "note": Payload(trace)}, weights)
    fresh.write_text(fresh.read_text().replace(str(tiny_teacher[1]), "weights.pt"))
    line = refused(capfd, "cache-teacher", fresh)
    assert "weights.pt" in line and "safetensors" in line
    assert not trace.exists() and not (fresh.parent / "cache/plan.json").exists()
