"""How far a score may be trusted: percentile bootstrap over the images of a set (Efron, 1979). NumPy alone.

The images are drawn again, as many as there are and with replacement, `RESAMPLES` times; the interval holds the middle
`LEVEL` of the scores that come out. The draws depend on the seed and the number of images alone, and all scores of an
image are drawn together: what is said of a difference or a ratio is paired, and two runs that are scored on different
days are held against each other on the same draws.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import Hits

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
_DRAWS_AT_ONCE = 1 << 22

Values = NDArray[np.floating[Any]] | NDArray[np.bool_]
Interval = tuple[float, float]


def bootstrap_means(values: Values, resamples: int = RESAMPLES, seed: int = SEED) -> NDArray[np.float64]:
    """Means of every column over images that are drawn with replacement, the same images for all columns.

    Args:
        values: (N, K) a number for each image and score, such as hits; at least one image.
        resamples: how often N images are drawn.

    Returns:
        (resamples, K). The draws are those of `numpy.random.default_rng(seed).integers(N, size=(resamples, N))`.

    >>> bootstrap_means(np.array([[1.0, 5.0], [1.0, 5.0]]), resamples=2).tolist()
    [[1.0, 5.0], [1.0, 5.0]]
    """
    num_images = len(values)
    numbers = np.random.default_rng(seed)
    table = values.astype(np.float64)
    means = np.empty((resamples, table.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // num_images)
    for first in range(0, resamples, step):
        drawn = numbers.integers(num_images, size=(min(step, resamples - first), num_images))
        # How often each image was drawn: a product with these is far quicker than gathering the rows.
        counts = np.stack([np.bincount(row, minlength=num_images) for row in drawn])
        means[first : first + len(drawn)] = counts @ table / num_images
    return means


def interval(statistics: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """The middle `level` of resampled statistics; NaN, NaN where one of them is not finite (a ratio by 0).

    Args:
        statistics: (resamples,)

    >>> interval(np.arange(101.0), level=0.5)
    (25.0, 75.0)
    """
    if not np.isfinite(statistics).all():
        return float("nan"), float("nan")
    low, high = np.quantile(statistics, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_interval(values: Values, resamples: int = RESAMPLES, seed: int = SEED, level: float = LEVEL) -> Interval:
    """Interval of a mean over images, such as an accuracy.

    Args:
        values: (N,) a number for each image.

    >>> mean_interval(np.array([True, True, True]))
    (1.0, 1.0)
    """
    return interval(bootstrap_means(values[:, None], resamples, seed)[:, 0], level)


def paired_interval(
    first: Values,
    second: Values,
    statistic: Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]] = np.subtract,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> Interval:
    """Interval of a comparison between two models over the same images, each resample drawing both alike.

    An interval of the difference that leaves out 0 says more than two intervals that overlap: images that both get
    right, or both wrong, do not widen it.

    Args:
        first, second: (N,) a number for each image, of the same images in the same order.
        statistic: of the two means; the difference, or `np.divide` for a retention.

    Raises:
        ValueError: if the numbers of images differ.

    >>> paired_interval(np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0]))
    (0.0, 0.0)
    """
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} images: wanted the same ones")
    both: NDArray[np.float64] = np.stack([first, second], axis=1).astype(np.float64)
    means = bootstrap_means(both, resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(statistic(means[:, 0], means[:, 1]), level)


def compared(key: str, student: Hits, teacher: Hits) -> dict[str, Any]:
    """Accuracy of both and their ratio, the retention, each with its interval, from the same draws; None for x / 0."""
    means = bootstrap_means(np.stack([student, teacher], axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[:, 0] / means[:, 1]
    return {
        f"student_{key}": float(student.mean()),
        f"student_{key}_interval": list(interval(means[:, 0])),
        f"teacher_{key}": float(teacher.mean()),
        f"teacher_{key}_interval": list(interval(means[:, 1])),
        "retention": float(student.mean()) / float(teacher.mean()) if teacher.any() else None,
        "retention_interval": list(interval(ratios)) if np.isfinite(ratios).all() else None,
    }


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
