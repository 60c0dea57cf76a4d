"""Captions of a labelled set's images, from a JSON file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.durable import read_json
from ...cache.errors import InputError


def read_captions(path: Path, sources: Sequence[str], name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Read a JSON object, image -> its captions.

    Args:
        sources: paths of the set's images below its folder, in the order of their rows.
        name: of the set, for errors.

    Returns:
        M captions, those of an image one after the other; and (M,) the row of the image that each belongs to.

    Raises:
        InputError: if the file is missing or holds anything else, or names an image that the set has not.
    """
    wanted = 'a JSON object such as {"birds/1.jpg": ["a small bird on a branch"]}'
    document = read_json(path, wanted)
    if not isinstance(document, dict) or not document:
        raise InputError(f"{path}: no captions; wanted {wanted}")
    rows = {source: row for row, source in enumerate(sources)}
    texts, image_of = [], []
    for source, captions in document.items():
        if source not in rows:
            raise InputError(f"{path}: {source!r} is no image of evaluate.{name} (its first is {sources[0]!r})")
        if not isinstance(captions, list) or not captions:
            raise InputError(f"{path}: {source!r}: found {captions!r}; wanted a list of captions, at least one")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise InputError(f"{path}: {source!r}: the caption {caption!r} is no text")
            texts.append(caption)
            image_of.append(rows[source])
    return texts, np.array(image_of, dtype=np.int64)
