"""Mixtures: shares exact over time, passes of each source's own, and the plain order where nothing is weighted."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dimefm.cache import FeatureCache, InputError
from dimefm.cache.disk.row_tables import IMAGE_COLUMNS, SENTENCE_COLUMNS, RowTable, write_rows
from dimefm.cache.reader.masks import add_mask
from dimefm.cache.reader.source_weights import OTHERS, Mixture, mixture_of
from dimefm.stages.retrieve.hubs import PairScores
from dimefm.stages.sample.order import BankStream, Share, Stream
from dimefm.stages.sample.weighted_sources import MixtureStream, row_stream
from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings

from ...support.small_cache import make_cache
from ...support.small_pairs import add_pairs
from ...support.training import train_one

STUDENT = StudentSettings(model="timm:resnet10t", image_size=32)


def mixture(sizes, weights):
    """Rows 0 to sizes[0] - 1 belong to the first source, ...; a weight of None is that of the others."""
    named = {f"s{i}": weight for i, weight in enumerate(weights) if weight is not None}
    codes = [OTHERS if weight is None else list(named).index(f"s{i}") for i, weight in enumerate(weights)]
    return Mixture(named, np.repeat(np.array(codes, dtype=np.int32), sizes))


def stream(sizes, weights, batch, seed=0, name="images"):
    return MixtureStream(np.arange(sum(sizes)), batch, seed, name, mixture(sizes, weights))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(20, 60), min_size=1, max_size=6),
    weights=st.lists(st.sampled_from([None, 0.1, 0.5, 2.0, 3.0, 7.25]), min_size=6, max_size=6),
    batch=st.integers(1, 20),
)
def test_counts_stay_within_a_few_rows_of_the_shares_at_every_step(sizes, weights, batch):
    weights = [*weights[: len(sizes) - 1], None]
    found, mass = stream(sizes, weights, batch), np.array([n * (w or 1) for n, w in zip(sizes, weights)])
    bounds, drawn = np.cumsum(sizes), np.zeros(len(sizes))
    own = [i for i, weight in enumerate(weights) if weight is not None]
    for step in range(25):
        rows = found.draw(step).rows
        drawn += np.bincount(np.searchsorted(bounds, rows, side="right"), minlength=len(sizes))
        away = drawn - (step + 1) * batch * mass / mass.sum()
        limit = (1 + sum(1 / i for i in range(1, len(sizes)))) / 2 + 1e-9
        assert np.abs(away[own]).max(initial=0) <= limit
        assert len(rows) == batch and abs(np.delete(away, own).sum()) <= limit


def test_shares_are_exact_over_a_common_period_and_every_row_of_a_source_is_drawn_equally_often():
    # 4 x 3 + 10 x 1 + 16 x 0.5 = 30 rows' worth: each 30 rows have 12, 10 and 8, however batches are cut.
    found = stream([4, 10, 16], [3.0, None, 0.5], batch=6)
    for period in range(1, 4):
        rows = np.concatenate([found.draw(step).rows for step in range(10 * period)])  # two periods each
        times = np.bincount(rows, minlength=30)
        assert (times[:4] == 6 * period).all() and (times[4:14] == 2 * period).all()
        assert (times[14:] == period).all()


def test_a_pass_of_a_source_covers_its_rows_once_and_views_change_with_it():
    found = stream([6, 20], [2.0, None], batch=8)
    drawn = [found.draw(step) for step in range(40)]
    seen = Counter((int(row), int(turn)) for draw in drawn for row, turn in zip(draw.rows, draw.passes))
    assert max(seen.values()) == 1
    whole = [turn for turn in range(15) if sum((row, turn) in seen for row in range(6)) == 6]
    assert len(whole) >= 15  # 320 rows, of which 120 are these six: 20 passes


def test_no_row_is_in_a_batch_twice_unless_a_pass_of_its_source_ends_there():
    found = stream([6, 20, 30], [2.0, None, 0.5], batch=8)
    for step in range(300):
        draw = found.draw(step)
        times = Counter(draw.rows.tolist())
        for row in (row for row, number in times.items() if number > 1):
            assert len(set(draw.passes[draw.rows == row].tolist())) == times[row]


def test_a_step_is_a_function_of_the_step_alone_and_far_ones_cost_no_more():
    forward = [stream([30, 50], [2.0, None], 16).draw(step) for step in range(20)]
    found = stream([30, 50], [2.0, None], 16)
    for step in (19, 0, 7):
        assert (found.draw(step).rows == forward[step].rows).all()
        assert (found.draw(step).passes == forward[step].passes).all()
    assert len(found.draw(10**12).rows) == 16


def test_seeds_names_and_sources_have_orders_of_their_own_and_a_batch_is_mixed():
    orders = [stream([40, 40], [2.0, None], 30, *key).draw(0).rows for key in [(0,), (1,), (0, "sentences")]]
    assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()
    halves = [np.mean(orders[0][part] < 40) for part in (slice(0, 15), slice(15, 30))]
    assert all(0.2 < share < 0.95 for share in halves)  # 20 of 30 are of the first source


def test_the_order_does_not_change_from_one_release_to_the_next():
    # Regression values: another order would silently break the resuming of runs that are under way.
    assert stream([10, 20], [2.0, None], 6).draw(1).rows.tolist() == [11, 29, 5, 25, 0, 3]


def test_shares_of_processes_put_in_order_are_the_whole_step_and_a_bank_goes_beside_it():
    whole = stream([10, 20, 20], [0.0, 2.0, None], 12)
    shares = [Share(whole, rank, 3) for rank in range(3)]
    assert (np.concatenate([share.draw(4).rows for share in shares]) == whole.draw(4).rows).all()
    bank = BankStream(whole, 20, seed=0)
    for step in range(20):
        rows = bank.draw(step).rows
        assert len(set(rows)) == 20 and not np.isin(rows, whole.draw(step).rows).any() and rows.min() >= 10


def test_rows_of_weight_0_are_never_drawn_and_do_not_count():
    found = stream([10, 20], [0.0, None], 5)
    assert len(found) == 20
    assert min(found.draw(step).rows.min() for step in range(40)) == 10


def test_a_mixture_describes_itself_for_the_record():
    found = json.loads(json.dumps(stream([10, 20, 5], [2.0, None, 0.0], 6).describe()))
    assert found["sources"] == {
        "s0": {"rows": 10, "share": 0.5},
        "(others)": {"rows": 20, "share": 0.5},
    }
    assert found["rows"] == 30 and "Feistel" in found["permutation"]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([3, 40], [50.0, None], r"images\.weights: s0 would give 25 rows to each batch of 32 but has only 3; lower"),
        ([3, 40], [0.0, 0.0], r"images\.weights: no usable row has a weight above 0"),
        ([30, 20], [0.0, None], r"distill\.batch_images = 32: the cache has only 20 usable images"),
    ],
)
def test_weights_that_a_batch_cannot_have_are_refused(sizes, weights, message):
    with pytest.raises(InputError, match=message):
        stream(sizes, weights, 32)


def table(tmp_path, names, column):
    schema = IMAGE_COLUMNS if column == "source" else SENTENCE_COLUMNS
    write_rows(tmp_path / "rows.parquet", schema, ({column: name} for name in names), 3)
    return RowTable(tmp_path / "rows.parquet")


def test_an_images_source_is_its_first_folder_and_a_sentences_its_file(tmp_path):
    names = ["a.jpg", "cats/1.jpg", "cats/more/2.jpg", "catsup.jpg", "dogs/cats/3.jpg", "b.jpg"]
    found = mixture_of(table(tmp_path, names, "source"), "images", {"cats": 2, ".": 0.5, "dogs": 1})
    assert dict(found.weights) == {".": 0.5, "cats": 2.0}
    assert found.source.tolist() == [0, 1, 1, 0, -1, 0] and found.drawn.all()
    names = ["web.txt", "web.txt", "prompts", "captions.txt"]
    found = mixture_of(table(tmp_path, names, "origin"), "sentences", {"prompts": 0})
    assert found.source.tolist() == [-1, -1, 0, -1] and found.drawn.tolist() == [True, True, False, True]


def test_an_unknown_source_is_refused_with_those_there_are(tmp_path):
    rows = table(tmp_path, ["a.jpg", "dogs/1.jpg"], "source")
    with pytest.raises(InputError, match=r"^images\.weights\.cats: no images come from there; there is: \., dogs$"):
        mixture_of(rows, "images", {"cats": 1})
    rows = table(tmp_path, [f"{i:02d}/x.jpg" for i in range(20)], "source")
    with pytest.raises(InputError, match=r"there is: 00, 01, .*, 11 and 8 more"):
        mixture_of(rows, "images", {"cats": 2.0})


def foldered(tmp_path):
    """The small cache, its images 20 to 39 in a folder `late`, its sentences of two files, 4 pairs each way."""
    cache = make_cache(tmp_path)
    (tmp_path / "images/late").mkdir()
    records = list(cache.images.rows.records())
    for record in records[20:]:
        (tmp_path / "images" / record["source"]).rename(tmp_path / "images/late" / record["source"])
        record["source"] = f"late/{record['source']}"
    write_rows(cache.layout.image_rows, IMAGE_COLUMNS, records, 16)
    sentences = [record | {"origin": "ab"[record["row"] >= 10]} for record in cache.sentences.rows.records()]
    write_rows(cache.layout.sentence_rows, SENTENCE_COLUMNS, sentences, 16)
    return add_pairs(FeatureCache.open(cache.layout.root))


def test_without_weights_or_with_weights_of_1_the_order_is_as_it_was(tmp_path):
    cache = foldered(tmp_path)
    for weights in ({}, {"late": 1.0, ".": 1.0}):
        same = cache.weighted(images=weights)
        assert same.row_weights == {} and type(row_stream(same.images, 8, 0, "images")) is Stream
    plain = Stream(cache.images.usable, 8, 0, "images")
    assert (row_stream(cache.images, 8, 0, "images").draw(3).rows == plain.draw(3).rows).all()


def test_weights_go_with_masks_and_a_weight_of_0_leaves_rows_out_of_everything(tmp_path):
    cache = foldered(tmp_path)
    add_mask(cache.layout, "images", "even", np.arange(40) % 2 == 0)
    cache = FeatureCache.open(cache.layout.root).masked(images="even").weighted({".": 2.0}, {"b": 0.0})
    assert cache.row_weights == {"images": {".": 2.0}, "sentences": {"b": 0.0}}
    assert cache.sentences.usable.tolist() == list(range(10)) and len(cache.images.usable) == 20
    rows = np.concatenate([row_stream(cache.images, 6, 0, "images").draw(step).rows for step in range(30)])
    assert (rows % 2 == 0).all() and (rows < 20).sum() == 120
    ids = PairScores.of(cache, "cosine", 20.0).rank(cache.images.usable)[0]
    assert ids.max() < 10 and ids.min() == -1


def test_training_follows_the_weights_its_record_says_so_and_others_are_refused(tmp_path):
    cache = foldered(tmp_path)
    run = DistillSettings(epochs=2, batch_images=8, loss=LossSettings(feature=1.0), device="cpu", workers=1)
    weighted = cache.weighted(images={"late": 3.0})
    result = train_one(weighted, tmp_path / "images", STUDENT, run, tmp_path / "run", stop_after=2)
    assert result.total_steps == 2 * 39 // 8
    record = json.loads((tmp_path / "run/run.json").read_bytes())
    assert record["row_weights"] == {"images": {"late": 3.0}}
    assert record["order"]["images"]["sources"]["late"] == {"rows": 20, "share": pytest.approx(60 / 79)}
    for other in ({}, {"late": 2.0}):
        with pytest.raises(InputError, match=r"row_weights\.images\.late = 3\.0"):
            train_one(cache.weighted(images=other), tmp_path / "images", STUDENT, run, tmp_path / "run")
    assert train_one(weighted, tmp_path / "images", STUDENT, run, tmp_path / "run").finished


def test_a_run_from_before_there_were_weights_goes_on_without_any(tmp_path):
    cache = foldered(tmp_path)
    run = DistillSettings(epochs=1, batch_images=8, loss=LossSettings(feature=1.0), device="cpu", workers=1)
    train_one(cache, tmp_path / "images", STUDENT, run, tmp_path / "run", stop_after=1)
    path = tmp_path / "run/run.json"
    record = json.loads(path.read_bytes())
    del record["row_weights"]
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"row_weights\.images\.late = None, but this run asks for 2\.0"):
        train_one(cache.weighted(images={"late": 2.0}), tmp_path / "images", STUDENT, run, tmp_path / "run")
    assert train_one(cache, tmp_path / "images", STUDENT, run, tmp_path / "run").finished
