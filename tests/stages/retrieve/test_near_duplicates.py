"""Rows that are linked, however far apart, belong to the lowest of them."""

import numpy as np
import pytest

from dimefm.stages.retrieve.near_duplicates import lowest_linked


@pytest.mark.parametrize(("num_rows", "num_links"), [(1, 0), (10, 7), (300, 200), (300, 900)])
def test_each_row_is_linked_to_the_lowest_that_can_be_reached(num_rows, num_links):
    first, second = np.random.default_rng(num_rows).integers(0, num_rows, (2, num_links))
    expected = np.arange(num_rows)
    for _ in range(num_rows):  # spread the lower number over every link, as long as the longest chain can be
        for one, other in zip(first, second):
            expected[one] = expected[other] = min(expected[one], expected[other])
    assert lowest_linked(num_rows, first, second).tolist() == expected.tolist()


def test_a_long_chain_in_disorder_hangs_together():
    chain = np.random.default_rng(0).permutation(np.arange(1, 2000))
    assert not lowest_linked(2000, chain, chain - 1).any()
    assert lowest_linked(2000, chain[chain != 1000], chain[chain != 1000] - 1)[1999] == 1000
