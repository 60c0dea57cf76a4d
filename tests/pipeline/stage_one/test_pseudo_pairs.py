"""Indexes and pairs of a version that goes on from the one before: what is made anew, merged, shared."""

import json

import numpy as np
import pytest

import dimefm.pipeline.stage_one.pseudo_pairs
from dimefm.cache.disk.layout import Layout
from dimefm.cache.reader.feature_cache import Pairs

from ...support.paired_sides import CHUNK_ROWS, paired, pairs_files

WIDTH = 16


def rows(num_rows, seed, spread=0.3):
    """Rows around 12 directions; few of them are equal."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((12, WIDTH))
    return (centres[rng.integers(12, size=num_rows)] + spread * rng.standard_normal((num_rows, WIDTH))).astype(
        np.float16
    )


@pytest.fixture
def sides():
    """300 images and 500 sentences with equal rows, near and far apart, and failed ones."""
    images, sentences = rows(300, 1), rows(500, 2)
    images[[5, 130, 299]], sentences[[10, 20, 200, 201, 499]] = images[4], sentences[3]
    images[6] = images[150] = sentences[7] = np.nan
    return images, sentences


def pairs_of(layout, manifest, direction):
    pairs = Pairs.open(layout.root / manifest.pairs.store, direction)
    return pairs.ids[:], pairs.scores[:]


@pytest.mark.parametrize(("num_images", "num_sentences"), [(290, 500), (300, 470), (100, 200), (299, 1)])
@pytest.mark.parametrize("k", [4, 310])
def test_rows_that_joined_end_in_the_bytes_of_one_run(tmp_path, sides, num_images, num_sentences, k):
    """Exact indexes, equal rows on both sides of the join, failed rows, more neighbours than there are rows."""
    layout, alone = Layout(tmp_path / "cache"), Layout(tmp_path / "alone")
    images, sentences = sides
    before = paired(layout, images[:num_images], sentences[:num_sentences], k=k)
    after = paired(layout.next, images, sentences, before, k=k)
    assert pairs_files(layout.next, after) == pairs_files(alone, paired(alone, images, sentences, k=k))


def test_rows_that_failed_and_are_good_now_end_in_the_bytes_of_one_run(tmp_path, sides):
    layout, alone = Layout(tmp_path / "cache"), Layout(tmp_path / "alone")
    images, sentences = sides
    bad_images, bad_sentences = images.copy(), sentences.copy()
    bad_images[[4, 130]], bad_sentences[[3, 10, 300]] = np.nan, np.nan
    before = paired(layout, bad_images, bad_sentences, k=4)
    after = paired(layout.next, images, sentences, before, k=4)
    assert pairs_files(layout.next, after) == pairs_files(alone, paired(alone, images, sentences, k=4))


@pytest.mark.parametrize("change", ["gone", "other"])
def test_rows_that_are_gone_or_have_other_embeddings_leave_nothing_to_go_on_from(tmp_path, sides, change):
    layout, alone = Layout(tmp_path / "cache"), Layout(tmp_path / "alone")
    images, sentences = sides
    before = paired(layout, images, sentences, k=4)
    images = images.copy()
    images[20] = np.nan if change == "gone" else -images[20]
    after = paired(layout.next, images, sentences, before, k=4)
    assert pairs_files(layout.next, after) == pairs_files(alone, paired(alone, images, sentences, k=4))


def test_what_has_not_changed_is_shared_and_only_new_rows_are_searched_for(tmp_path, sides, monkeypatch):
    layout, (images, sentences) = Layout(tmp_path / "cache"), sides
    before = paired(layout, images[:290], sentences, k=4)
    asked = []
    search = dimefm.pipeline.stage_one.pseudo_pairs.nearest_targets

    def counting(block, *others):
        asked.append(len(block))
        return search(block, *others)

    monkeypatch.setattr(dimefm.pipeline.stage_one.pseudo_pairs, "nearest_targets", counting)
    after = paired(layout.next, images, sentences, before, k=4)
    assert asked == [10]
    shared = {
        name
        for name in after.files
        if any((layout.next.root / name).samefile(layout.root / old) for old in before.files)
    }
    assert "index/sentences-2.faiss" in shared and "index/images-2.faiss" not in shared
    full = {f"pairs-2.zarr/image_to_sentence/{part}/c/{chunk}/0" for part in ("ids", "scores") for chunk in range(4)}
    assert full <= shared and f"pairs-2.zarr/image_to_sentence/ids/c/{290 // CHUNK_ROWS}/0" not in shared


def test_a_damaged_file_of_the_version_before_is_made_anew(tmp_path, sides):
    layout, alone = Layout(tmp_path / "cache"), Layout(tmp_path / "alone")
    images, sentences = sides
    before = paired(layout, images[:290], sentences, k=4)
    for name in ("index/sentences.faiss", "pairs.zarr/image_to_sentence/ids/c/1/0"):
        data = bytearray((layout.root / name).read_bytes())
        data[-70] ^= 1
        (layout.root / name).write_bytes(data)
    after = paired(layout.next, images, sentences, before, k=4)
    assert pairs_files(layout.next, after) == pairs_files(alone, paired(alone, images, sentences, k=4))


def test_an_ivf_index_takes_in_new_rows_and_is_built_again_when_it_has_grown_by_half(tmp_path, capsys):
    layout = Layout(tmp_path / "cache")
    images, sentences = rows(1200, 1, 0.05), rows(2000, 2, 0.05)
    settings = {"k": 4, "index": "ivf", "min_recall": 0.6}
    before = paired(layout, images[:1000], sentences, **settings)
    assert before.index["images"].nlist == 16 and before.index["images"].trained_on == 1000
    capsys.readouterr()
    after = paired(layout.next, images, sentences, before, **settings)
    said = capsys.readouterr().err
    assert "adding 200 rows to the index over images" in said and "built again" not in said
    info = after.index["images"]
    assert (info.rows, info.trained_on, info.nprobe) == (1200, 1000, before.index["images"].nprobe)
    assert info.recall >= 0.6 and info.recall_queries == 512 and after.index["sentences"].recall_queries == 712
    document = json.loads((layout.next.root / "index/images-2.json").read_bytes())
    assert document["grown_from"] == "index/images.faiss"
    ids, scores = pairs_of(layout.next, after, "sentence_to_image")
    assert np.isin(ids, np.arange(1000, 1200)).any() and (np.diff(scores) <= 0).all()
    more = rows(600, 5, 0.05)
    paired(
        Layout(tmp_path / "more", under=layout.root),
        np.concatenate([images[:1000], more]),
        sentences,
        before,
        **settings,
    )
    assert "images: 1,600 rows, the index was made for 1,000: it is built again" in capsys.readouterr().err


def test_an_ivf_index_whose_recall_has_fallen_is_built_again(tmp_path, capsys):
    """New queries among which lists decide badly: the sentences' own index, though no sentence is new."""
    layout = Layout(tmp_path / "cache")
    sentences, images = rows(2000, 2, 0.3), rows(600, 3, 0.02)
    before = paired(layout, images, sentences, k=4, index="ivf", min_recall=0.5)
    between = np.random.default_rng(0).standard_normal((300, WIDTH)).astype(np.float16)
    raised = before.replace(pairs_settings={**before.pairs_settings, "min_recall": 0.97})
    capsys.readouterr()
    after = paired(layout.next, np.concatenate([images, between]), sentences, raised, k=4, index="ivf", min_recall=0.97)
    assert "sentences: recall@4 has fallen to" in capsys.readouterr().err
    assert after.index["sentences"].recall >= 0.97


def test_rows_without_clusters_are_searched_exactly_and_one_line_says_so(tmp_path, capsys):
    layout, alone, again = (Layout(tmp_path / name) for name in ("cache", "alone", "again"))
    rng = np.random.default_rng(0)
    images, sentences = (rng.standard_normal((n, 64)).astype(np.float16) for n in (900, 2500))
    before = paired(layout, images, sentences[:2400], k=4, index="ivf")
    said = [line for line in capsys.readouterr().err.splitlines() if "no clusters" in line]
    assert len(said) == 2 and "wanted 0.95; exact search is faster and is taken" in said[1]
    info = before.index["sentences"]
    assert (info.type, info.recall, info.nlist) == ("IDMap,SQfp16", 1.0, None) and info.tried["recall"] < 0.95
    exact = paired(alone, images, sentences[:2400], k=4, index="flat")
    for direction in ("image_to_sentence", "sentence_to_image"):
        for ours, theirs in zip(pairs_of(layout, before, direction), pairs_of(alone, exact, direction)):
            assert ours.tobytes() == theirs.tobytes()
    after = paired(layout.next, images, sentences, before, k=4, index="ivf")
    assert after.index["sentences"].type == "IDMap,SQfp16" and after.index["sentences"].trained_on == 2400
    exact = paired(again, images, sentences, k=4, index="flat")
    for ours, theirs in zip(
        pairs_of(layout.next, after, "image_to_sentence"), pairs_of(again, exact, "image_to_sentence")
    ):
        assert ours.tobytes() == theirs.tobytes()
