"""Orders: every pass covers each row once, differently, and any step is known without those before it."""

import json

import numpy as np
import pytest

from dimefm.cache import InputError
from dimefm.stages.counter_random import uniforms
from dimefm.stages.sample.order import BankStream, KeyedPermutation, Share, Stream


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 65_537])
def test_a_keyed_permutation_is_one(n):
    assert sorted(KeyedPermutation(n, key=7)[np.arange(n)]) == list(range(n))


def test_a_keyed_permutation_sends_every_position_everywhere_equally_often():
    places = np.array([KeyedPermutation(10, key)[np.arange(10)] for key in range(4000)])
    counts = np.array([np.bincount(places[:, i], minlength=10) for i in range(10)])
    # Each of the 100 counts is binomial(4000, 1/10): mean 400, standard deviation 19.
    assert np.abs(counts - 400).max() < 5 * 19


def test_neighbours_do_not_stay_neighbours():
    order = KeyedPermutation(10_000, key=3)[np.arange(10_000)].astype(float)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_each_pass_covers_each_row_exactly_once_and_in_another_order():
    rows = np.array([2, 3, 5, 7, 11, 13, 17])
    stream = Stream(rows, batch=3, seed=0, name="images")
    drawn = [stream.draw(step) for step in range(7)]  # 21 rows: three passes, batches straddle their ends
    sequence = np.concatenate([draw.rows for draw in drawn]).reshape(3, 7)
    assert [sorted(one) for one in sequence] == [sorted(rows)] * 3
    assert len({tuple(one) for one in sequence}) == 3
    assert np.concatenate([draw.passes for draw in drawn]).tolist() == [0] * 7 + [1] * 7 + [2] * 7


def test_a_step_is_a_function_of_the_step_alone():
    rows = np.arange(1000)
    forward = [Stream(rows, 64, seed=1, name="images").draw(step).rows for step in range(40)]
    stream = Stream(rows, 64, seed=1, name="images")
    for step in (39, 0, 17, 17):
        assert (stream.draw(step).rows == forward[step]).all()


def test_seeds_and_names_have_orders_of_their_own():
    rows = np.arange(1000)
    orders = [Stream(rows, 1000, *key).draw(0).rows for key in [(0, "images"), (1, "images"), (0, "sentences")]]
    assert not (orders[0] == orders[1]).all() and not (orders[0] == orders[2]).all()


def test_the_order_does_not_change_from_one_release_to_the_next():
    # Regression values: another order would silently break the resuming of runs that are under way.
    assert Stream(np.arange(100), 6, seed=0, name="images").draw(0).rows.tolist() == [65, 44, 20, 66, 36, 91]


def test_a_far_step_of_a_huge_stream_costs_no_more():
    stream = Stream(np.arange(50_000), 256, seed=0, name="images")
    far = stream.draw(10**9)
    assert len(set(far.rows)) >= 200 and (far.passes == 10**9 * 256 // 50_000).any()


def test_a_batch_larger_than_the_cache_is_refused_naming_the_setting():
    with pytest.raises(InputError, match=r"distill\.batch_sentences = 9: .* only 8 usable sentences"):
        Stream(np.arange(8), 9, seed=0, name="sentences")


def test_a_bank_has_distinct_usable_rows_and_none_of_its_steps_own():
    rows = np.arange(100, 150)
    images = Stream(rows, batch=20, seed=0, name="images")
    bank = BankStream(images, 30, seed=0)  # exactly what is left beside a batch
    for step in range(12):  # 50 rows in batches of 20: some steps straddle the end of a pass
        drawn = bank.draw(step).rows
        assert len(drawn) == len(set(drawn)) == 30 and set(drawn) <= set(rows)
        assert not set(drawn) & set(images.draw(step).rows)


def test_a_bank_is_a_function_of_seed_and_step_and_uses_all_rows_equally():
    images = Stream(np.arange(40), batch=4, seed=0, name="images")
    drawn = [BankStream(images, 8, seed=0).draw(step).rows for step in range(2000)]
    assert (BankStream(images, 8, seed=0).draw(7).rows == drawn[7]).all()
    assert not (BankStream(images, 8, seed=1).draw(7).rows == drawn[7]).all()
    # Each count is binomial(2000, 8/40): mean 400, standard deviation 18.
    assert np.abs(np.bincount(np.concatenate(drawn), minlength=40) - 400).max() < 5 * 18


def test_a_bank_larger_than_what_a_batch_leaves_is_refused_naming_the_setting():
    images = Stream(np.arange(8), 5, seed=0, name="images")
    with pytest.raises(InputError, match=r"distill\.bank_images = 4: beside the 5 images of a batch .* only 3 usable"):
        BankStream(images, 4, seed=0)


def test_shares_put_in_order_are_the_whole_step():
    whole = Stream(np.arange(50), 12, seed=0, name="images")
    for stream in (whole, BankStream(whole, 12, seed=0)):
        shares = [Share(stream, rank, 3).draw(4) for rank in range(3)]
        assert (np.concatenate([share.rows for share in shares]) == stream.draw(4).rows).all()
        assert (np.concatenate([share.passes for share in shares]) == stream.draw(4).passes).all()


def test_a_step_that_does_not_divide_among_processes_is_refused_naming_the_setting():
    images = Stream(np.arange(50), 12, seed=0, name="images")
    with pytest.raises(InputError, match=r"distill\.batch_images = 12: does not divide evenly among 5 processes"):
        Share(images, 0, 5)
    with pytest.raises(InputError, match=r"distill\.bank_images = 7: does not divide evenly among 2 processes"):
        Share(BankStream(images, 7, seed=0), 0, 2)


def test_an_order_describes_itself_for_the_record():
    images = Stream(np.arange(50), 12, seed=3, name="images")
    for stream in (images, BankStream(images, 6, seed=3)):
        found = json.loads(json.dumps(stream.describe()))
        assert (found["seed"], found["rounds"], found["rows"]) == (3, 8, 50) and "Feistel" in found["permutation"]


def test_uniforms_belong_to_their_row_and_pass_and_are_uniform():
    rows, passes = np.arange(2000), np.zeros(2000, dtype=np.int64)
    numbers = uniforms(5, rows, passes, 10)
    assert (uniforms(5, rows[[7, 3]], passes[:2], 10) == numbers[[7, 3]]).all()
    assert not (uniforms(5, rows, passes + 1, 10) == numbers).any()
    assert not (uniforms(6, rows, passes, 10) == numbers).any()
    assert ((numbers >= 0) & (numbers < 1)).all()
    # 20,000 uniform numbers: the mean's standard deviation is 0.002, that of a correlation of 2000 is 0.022.
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.005
    assert np.abs(np.corrcoef(numbers.T) - np.eye(10)).max() < 0.11
