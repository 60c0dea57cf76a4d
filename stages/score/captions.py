"""Captions of a labelled set's images, embedded by the text tower in the cache; no teacher is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.durable import read_json
from ...cache.errors import InputError
from ..devices import resolve_device
from ..models.frozen_text_tower import load_text_tower


@dataclass(frozen=True)
class Captions:
    """Captions of some images.

    Attributes:
        texts: M of them, those of an image one after the other.
        image_of: (M,) int64 row of the image that each belongs to.
    """

    texts: list[str]
    image_of: NDArray[np.int64]


def read_captions(path: Path, sources: Sequence[str], name: str) -> Captions:
    """Read a JSON object, image -> its captions.

    Args:
        sources: paths of the set's images below its folder, in the order of their rows.
        name: of the set, for errors.

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
    return Captions(texts, np.array(image_of, dtype=np.int64))


def embed_captions(text_tower: Path, captions: Captions, device: str = "auto") -> NDArray[np.float32]:
    """(M, D) embeddings by a cached text tower, before normalisation.

    Args:
        text_tower: folder of the tower, `FeatureCache.text_tower`.

    Raises:
        CacheError: if the tower is missing or damaged.
        InputError: if its tokenizer needs a package that is not installed.
    """
    return load_text_tower(text_tower, resolve_device(device)).encode_sentences(captions.texts)
