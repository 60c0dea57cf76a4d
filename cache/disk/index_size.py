"""How many lists an index gets, and about how much disk and memory it takes. Arithmetic alone."""

from typing import Literal

import numpy as np

from .cosine import BLOCK_BYTES

IndexKind = Literal["auto", "flat", "ivf"]

FLAT_ROWS = 100_000
"""`auto` is exact up to this many rows. Measured with queries of another modality, which need many lists probed: at
100,000 x 768 an IVF index searches no faster than the exact one, at 200,000 x 256 three times as fast."""

MIN_ROWS_PER_LIST = 39
"""FAISS's own lower bound for k-means; fewer training rows make poor lists."""

TRAIN_ROWS_PER_LIST = 64

FAISS_TRAIN_ROWS = 100_000
"""Of the sample, for which FAISS computes residuals, whatever the scalar quantizer does with them."""


def resolve_kind(num_rows: int, kind: IndexKind) -> Literal["flat", "ivf"]:
    """What `auto` means for this many rows."""
    if kind == "auto":
        return "flat" if num_rows <= FLAT_ROWS else "ivf"
    return kind


def num_lists(num_rows: int) -> int:
    """Lists of an IVF index: the power of two at or below 4 * sqrt(rows), fewer where too few rows could train them."""
    return min(_power_of_two(4 * num_rows**0.5), trainable_lists(num_rows))


def trainable_lists(num_train_rows: int) -> int:
    """Most lists that a training sample of this size makes, a power of two."""
    return _power_of_two(num_train_rows / MIN_ROWS_PER_LIST)


def index_bytes(num_rows: int, width: int, kind: IndexKind) -> int:
    """About the size of an index's file, which is also what it takes in memory to search it."""
    if resolve_kind(num_rows, kind) == "flat":
        return num_rows * (4 * width + 8)
    return num_rows * (2 * width + 8) + num_lists(num_rows) * 4 * width


def build_bytes(num_rows: int, width: int, kind: IndexKind) -> int:
    """About the most anonymous memory that building an index takes: to train it or, later, to measure it.

    FAISS trains on the sample and on two copies of a part of it. Beside the rows of the index there are a few blocks:
    rows being brought to length 1, and products with the queries that recall is measured on.
    """
    block = min(BLOCK_BYTES, 4 * width * num_rows)
    measuring = index_bytes(num_rows, width, kind) + int(4.6 * block)
    if resolve_kind(num_rows, kind) == "flat":
        return measuring
    num_train = num_lists(num_rows) * TRAIN_ROWS_PER_LIST
    training = 4 * width * num_train + max(int(3.4 * block), 8 * width * min(num_train, FAISS_TRAIN_ROWS))
    return max(training, measuring)


def _power_of_two(number: float) -> int:
    """The highest at or below a number; 1 at least."""
    return 1 << max(0, int(np.log2(max(1.0, number))))
