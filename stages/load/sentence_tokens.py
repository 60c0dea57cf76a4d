"""Token ids of a step's sentences, made from the text in the cache's row table a few steps before they are wanted."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from ...cache.reader.feature_cache import EmbeddingSet
from ..models.text_student import text_tokenizer
from ..models.tokenizer import tokenize, tokenizer_identity

_WORDS_KEPT = 1 << 20
"""Words whose encoding a tokenizer remembers: it forgets nothing by itself, and a corpus never runs out of new ones."""


class SentenceTokens:
    """Makes the token ids of sentence rows for one or several text towers.

    The texts lie in memory as one Arrow column, their bytes one after the other and 8 more for each: 28 million
    sentences of 60 bytes take 1.9 GB, in each process, and about three times that while they are read. A step makes
    Python strings of its own rows alone.
    """

    def __init__(self, sentences: EmbeddingSet, specs: Iterable[str]) -> None:
        """Read the texts.

        Args:
            sentences: the cached sentences.
            specs: what text towers are built from; those whose tokenizers are the same share the work.

        Raises:
            InputError: if a tower has no tokenizer here.
        """
        self._texts: pa.Array = sentences.rows.column("text").cast(pa.large_string()).combine_chunks()
        pa.default_memory_pool().release_unused()  # what decoding took, twice the texts, would stay with the process
        self._tokenizers: list[tuple[Any, list[str]]] = []
        known: dict[tuple[Any, ...], list[str]] = {}
        for spec in dict.fromkeys(specs):
            tokenizer = text_tokenizer(spec)
            same = known.setdefault(tuple(tokenizer_identity(tokenizer).values()), [])
            if not same:
                self._tokenizers.append((tokenizer, same))
            same.append(spec)

    def __call__(self, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        """For each spec (n, its context length) int64 token ids of some rows."""
        texts = self._texts.take(pa.array(rows)).to_pylist()
        tokens: dict[str, Tensor] = {}
        for tokenizer, specs in self._tokenizers:
            ids = tokenize(tokenizer, texts)
            tokens |= dict.fromkeys(specs, ids)
            if len(tokenizer.cache) > _WORDS_KEPT:
                tokenizer.cache = {word: word for word in tokenizer.cache if word == tokenizer.cache[word]}
        return tokens
