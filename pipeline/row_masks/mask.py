"""`dimefm cache mask`: a choice of rows from a file gets a name."""

from pathlib import Path
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.text_files import decode_text
from ...cache.errors import InputError
from ...cache.reader.feature_cache import EmbeddingSet, FeatureCache
from ...cache.reader.masks import Side, add_mask


def mask_from_file(folder: Path, name: str, side: str, keep: Path) -> str:
    """Save a mask of a finished cache.

    Args:
        side: `images` or `sentences`.
        keep: a text file with the numbers of the rows to keep, one a line; or a .npy file with them, or with one bool
            for each row.

    Returns:
        A line that says what was saved.

    Raises:
        InputError: if the file, the side or the name is unfit, or the name is taken.
        CacheError: if the cache is unfinished, damaged or being written by another process.
    """
    named = side_of(side)
    cache = FeatureCache.open(folder)
    rows: EmbeddingSet = getattr(cache, named)
    chosen = _read(keep, len(rows))
    add_mask(cache.layout, named, name, chosen)
    share = f"{chosen.sum():,} of {len(rows):,} {named}"
    return f'{folder}: mask {name} keeps {share}; {named}.mask = "{name}" chooses them for a run'


def side_of(name: str) -> Side:
    """Raises InputError unless the name is `images` or `sentences`."""
    if name not in get_args(Side):
        raise InputError(f"--side {name}: wanted images or sentences")
    return cast(Side, name)


def _read(path: Path, num_rows: int) -> NDArray[np.bool_]:
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            found = np.array([int(line) for line in decode_text(path.read_bytes()).split()], dtype=np.int64)
    except (OSError, ValueError) as error:
        raise InputError(f"--keep {path}: not row numbers, one a line, and not a .npy array ({error})") from error
    if found.dtype == np.bool_ and found.shape == (num_rows,):
        return np.asarray(found)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputError(
            f"--keep {path}: {found.dtype} {found.shape}; wanted row numbers, or {num_rows:,} bools, one for each row"
        )
    if found.size and not 0 <= found.min() <= found.max() < num_rows:
        raise InputError(f"--keep {path}: rows {found.min()} to {found.max()}; wanted 0 to {num_rows - 1}")
    keep = np.zeros(num_rows, dtype=np.bool_)
    keep[found] = True
    return keep
