"""One vector for each class from the embeddings of its prompts: the rows of a zero-shot classifier."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import InputError


class ClassVectors:
    """Each prompt's embedding normalised, their mean for each class, normalised; from embeddings block by block."""

    def __init__(self, prompts: Sequence[Sequence[str]], embed_dim: int) -> None:
        """Begin with nothing; embeddings come in the order of the `prompts` of each class, at least one."""
        self._prompts = prompts
        self._class_of = np.repeat(np.arange(len(prompts)), [len(texts) for texts in prompts])
        self._sums = np.zeros((len(prompts), embed_dim))

    def add(self, first: int, block: NDArray[np.floating]) -> None:
        """Take (B, D) embeddings, those of the prompts from number `first` on; rows beyond the last are padding."""
        classes = self._class_of[first : first + len(block)]
        vectors = block[: len(classes)].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            np.add.at(self._sums, classes, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    def result(self, tower: str) -> NDArray[np.float32]:
        """(classes, D) unit rows.

        Args:
            tower: what embedded the prompts, for the message.

        Raises:
            InputError: if a class has no prompt or no direction: a NaN among its embeddings, or a mean of zero.
        """
        norms = np.linalg.norm(self._sums, axis=1, keepdims=True)
        broken = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
        if len(broken):
            first = int(broken[0])
            raise InputError(
                f"class {first} of {len(norms)} has no vector by {tower} (its prompts: "
                f"{list(self._prompts[first])[:2]}); wanted at least one prompt, and embeddings that are finite and "
                "not zero"
            )
        return np.asarray(self._sums / norms, dtype=np.float32)
