"""Sentences of a step, some of them retrieved: how many, which, how often, and the same again after an interruption."""

import json
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from dimefm.cache import InputError
from dimefm.cache.reader.masks import add_mask
from dimefm.stages.retrieve.hubs import PairScores, allowed
from dimefm.stages.sample.order import Share, Stream
from dimefm.stages.sample.retrieved import PairStream
from dimefm.stages.settings.distill import DistillSettings, LossSettings, PairSampling
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.processes import open_world
from dimefm.stages.train.schedule import Schedule

from ...support.small_cache import make_cache
from ...support.small_pairs import add_pairs
from ...support.training import TIMES, train_one, weights_of

SCALE = 5.0
BATCH, SENTENCES, K = 8, 20, 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """40 images, of which row 3 failed, 30 sentences, 4 neighbours both ways."""
    return add_pairs(make_cache(tmp_path_factory.mktemp("pairs")), k=K)


def stream(cache, seed=0, sentences=SENTENCES, **settings):
    images = Stream(cache.images.usable, BATCH, seed, "images")
    random = Stream(cache.sentences.usable, sentences, seed, "sentences")
    return PairStream(cache, images, random, PairSampling(**{"per_image": 2, **settings}), seed, SCALE), images


def retrieved(draw):
    return draw.rows[np.isfinite(draw.cosines)]


def candidates(cache, rows):
    """{image: {sentence: cosine}}"""
    ids, cosines, _ = PairScores.of(cache, "cosine", SCALE).rank(rows)
    return {row: dict(zip(one, other)) for row, one, other in zip(rows.tolist(), ids.tolist(), cosines.tolist())}


@pytest.mark.parametrize("sampling", ["score", "uniform"])
@pytest.mark.parametrize("rank", ["cosine", "csls", "inverted_softmax"])
def test_every_step_has_as_many_distinct_sentences_and_retrieved_ones_are_its_images_own(cache, sampling, rank):
    pairs, images = stream(cache, sampling=sampling, rank=rank)
    for step in range(30):  # 20 of 30 sentences: every second random draw straddles the end of a pass
        draw = pairs.draw(step)
        assert len(draw.rows) == len(set(draw.rows.tolist())) == SENTENCES and draw.weights is None
        assert set(draw.rows.tolist()) <= set(cache.sentences.usable.tolist())
        own = candidates(cache, images.draw(step).rows)
        for row, cosine in zip(draw.rows.tolist(), draw.cosines.tolist()):
            if not np.isnan(cosine):
                assert cosine in {found[row] for found in own.values() if row in found}
        assert 2 <= len(retrieved(draw)) <= 2 * BATCH


def test_what_an_image_brings_is_its_two_best_where_one_has_all_the_weight(cache):
    settings = PairSampling(per_image=2)
    images = Stream(cache.images.usable, BATCH, 0, "images")
    random = Stream(cache.sentences.usable, SENTENCES, 0, "sentences")
    pairs = PairStream(cache, images, random, settings, 0, logit_scale=1e7)
    for step in range(5):
        ids, _, _ = PairScores.of(cache, "cosine", SCALE).rank(images.draw(step).rows)
        assert set(retrieved(pairs.draw(step)).tolist()) == set(ids[:, :2].ravel().tolist())


def test_a_step_is_a_function_of_the_step_alone(cache):
    forward = [stream(cache, rank="csls", cap=9)[0].draw(step) for step in range(12)]
    again = stream(cache, rank="csls", cap=9)[0]
    for step in (11, 0, 7, 7):
        assert (again.draw(step).rows == forward[step].rows).all()
        assert np.array_equal(again.draw(step).cosines, forward[step].cosines, equal_nan=True)
    other = [stream(cache, seed=1)[0].draw(step).rows.tolist() for step in range(3)]
    assert other != [draw.rows.tolist() for draw in forward[:3]]


def test_candidates_below_the_least_cosine_are_left_out_and_an_image_may_bring_none(cache):
    scores = np.sort(cache.pairs("image_to_sentence").scores[cache.images.usable].ravel())
    least = float(scores[int(0.8 * len(scores))])
    pairs, images = stream(cache, min_score=least)
    some = 0
    for step in range(20):
        draw = pairs.draw(step)
        found = draw.cosines[np.isfinite(draw.cosines)]
        own = candidates(cache, images.draw(step).rows).values()
        good = {row for one in own for row, cosine in one.items() if cosine >= least}
        assert (found >= least).all() and set(retrieved(draw).tolist()) <= good and len(draw.rows) == SENTENCES
        some += len(found)
    assert some
    none = stream(cache, min_score=1.0)[0].draw(0)
    assert np.isnan(none.cosines).all()
    plain = Stream(cache.sentences.usable, SENTENCES, 0, "sentences").draw(0).rows
    assert (none.rows == plain).all()  # then it is the random stream


def test_images_that_the_cap_takes_a_sentence_from_do_not_bring_it(cache):
    cap = 3
    keep = allowed(PairScores.of(cache, "cosine", SCALE), cap)
    pairs, images = stream(cache, per_image=1, cap=cap)
    brought = Counter()
    for step in range(60):
        rows = images.draw(step).rows
        ids, _, _ = PairScores.of(cache, "cosine", SCALE).rank(rows)
        may = set(ids[keep[rows]].tolist())
        assert set(retrieved(pairs.draw(step)).tolist()) <= may
        brought.update(retrieved(pairs.draw(step)).tolist())
    assert len(brought) > 10


def test_sentences_outside_the_mask_are_neither_retrieved_nor_drawn(tmp_path):
    cache = add_pairs(make_cache(tmp_path), k=K)
    keep = np.arange(30) % 4 != 0
    add_mask(cache.layout, "sentences", "some", keep)
    masked = type(cache).open(cache.layout.root).masked(sentences="some")
    pairs, _ = stream(masked, sentences=20)
    drawn = np.concatenate([pairs.draw(step).rows for step in range(40)])
    assert set(drawn.tolist()) == set(np.flatnonzero(keep).tolist())


def chances(logits, count):
    """P(a candidate is among `count` drawn one after the other by softmax), by going through all orders."""
    rates = np.exp(logits)
    found = np.zeros(len(rates))

    def go_on(chosen, chance):
        if len(chosen) == count:
            found[chosen] += chance
            return
        left = [i for i in range(len(rates)) if i not in chosen]
        for i in left:
            go_on([*chosen, i], chance * rates[i] / rates[left].sum())

    go_on([], 1.0)
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("sampling", ["score", "uniform"])
def test_candidates_are_brought_as_often_as_their_softmax_says(tmp_path, sampling, count):
    # Image i's candidates are sentences 4·i … 4·i + 3 and nobody else's, so what a step retrieves tells who chose what.
    cache = make_cache(tmp_path, num_images=8, num_sentences=40)
    ids = np.arange(32).reshape(8, 4)
    scores = np.random.default_rng(0).uniform(-0.3, 0.3, (8, 4)).astype(np.float32)
    scores = -np.sort(-scores, axis=1)
    ids[3], scores[3] = -1, np.nan  # the image that failed
    cache = add_pairs(cache, image_to_sentence=(ids, scores))
    images = Stream(cache.images.usable, 7, 0, "images")
    random = Stream(cache.sentences.usable, 40, 0, "sentences")
    pairs = PairStream(cache, images, random, PairSampling(per_image=count, sampling=sampling), 0, SCALE)
    steps = 1500
    counts = np.bincount(np.concatenate([retrieved(pairs.draw(step)) for step in range(steps)]), minlength=40)
    for row in cache.images.usable:
        wanted = chances(SCALE * scores[row].astype(float) if sampling == "score" else np.zeros(4), count)
        # Each count is binomial: five standard deviations.
        spread = np.sqrt(steps * wanted * (1 - wanted))
        assert (np.abs(counts[ids[row]] - steps * wanted) < 5 * spread + 1e-9).all()
    assert not counts[32:].any() and not counts[12:16].any()


def test_equal_parts_have_alike_and_make_the_whole(cache):
    pairs, _ = stream(cache)
    for step in range(10):
        whole = pairs.draw(step)
        parts = [Share(pairs, rank, 4).draw(step) for rank in range(4)]
        assert (np.concatenate([part.rows for part in parts]) == whole.rows).all()
        numbers = [len(retrieved(part)) for part in parts]
        assert max(numbers) - min(numbers) <= 1 and sum(numbers) == len(retrieved(whole))


def test_random_sentences_come_equally_often(cache):
    # Without candidates all are random: each of 30 is in 20 of 30 of the steps; binomial at most, five deviations.
    pairs, _ = stream(cache, min_score=1.0)
    counts = np.bincount(np.concatenate([pairs.draw(step).rows for step in range(900)]), minlength=30)
    assert np.abs(counts - 600).max() < 5 * np.sqrt(900 * 2 / 3 / 3)


def test_settings_that_cannot_be_served_are_refused():
    with pytest.raises(ValidationError, match="may retrieve 512 sentences, but batch_sentences = 300"):
        DistillSettings(batch_images=256, batch_sentences=300, pairs=PairSampling(per_image=2))


def test_retrieving_for_nobody_is_one_line(cache):
    settings = DistillSettings(loss=LossSettings(feature=1.0), batch_images=8, pairs=PairSampling(per_image=1))
    with open_world("cpu") as world, pytest.raises(InputError, match="nothing looks at sentences"):
        Schedule(cache, settings, world)


def test_a_cache_without_pairs_is_one_line(tmp_path):
    settings = DistillSettings(batch_images=8, batch_sentences=20, device="cpu", pairs=PairSampling(per_image=1))
    with open_world("cpu") as world, pytest.raises(InputError, match=r"no pseudo-pairs \(pairs.k = 0\)"):
        Schedule(make_cache(tmp_path), settings, world)


TRAINED = DistillSettings(
    epochs=3,
    batch_images=BATCH,
    batch_sentences=SENTENCES,
    lr=0.01,
    log_every=1,
    checkpoint_every=4,
    device="cpu",
    workers=1,
    pairs=PairSampling(per_image=2, rank="csls", cap=20),
)


def train(world, run, settings=TRAINED, steps=None):
    cache, folder = world
    student = StudentSettings(model="own_students:with_dropout", image_size=8)
    train_one(cache, folder / "images", student, settings, folder / run, stop_after=steps)
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_a_resumed_run_repeats_one_that_was_not_interrupted_and_says_what_it_retrieved(world):
    world = add_pairs(world[0]), world[1]
    whole = train(world, "whole")
    train(world, "run", steps=5)
    assert train(world, "run") == whole
    first, second = weights_of(world[1] / "whole"), weights_of(world[1] / "run")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with open_world("cpu") as alone:
        sentences = Schedule(world[0], TRAINED, alone).sentences
    for line in whole:
        draw = sentences.draw(line["step"] - 1)
        assert line["pairs_share"] == pytest.approx(len(retrieved(draw)) / SENTENCES)
        assert line["pairs_cosine"] == pytest.approx(np.nanmean(draw.cosines), abs=1e-6)
    record = json.loads((world[1] / "whole" / "run.json").read_text())
    assert record["distill"]["pairs"] == TRAINED.pairs.model_dump()
    assert record["order"]["sentences"]["random"]["rows"] == 30


def test_a_run_goes_on_with_the_pairs_it_began_with_and_an_older_run_without_any(world):
    world = add_pairs(world[0]), world[1]
    plain = TRAINED.model_copy(update={"pairs": PairSampling()})
    train(world, "run", plain, steps=3)
    path = world[1] / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["distill"]["pairs"], record["pairs"]  # as it was before there were such keys
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"distill.pairs.per_image = 0, but this run asks for 2"):
        train(world, "run")
    assert len(train(world, "run", plain)) == 14


def test_without_candidates_metrics_have_no_mean_of_nothing(world):
    world = add_pairs(world[0]), world[1]
    lines = train(world, "run", TRAINED.model_copy(update={"pairs": PairSampling(per_image=1, min_score=1.0)}), 2)
    assert [line["pairs_share"] for line in lines] == [0.0, 0.0] and "pairs_cosine" not in lines[0]
