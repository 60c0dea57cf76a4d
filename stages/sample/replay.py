"""Replaying the crops that stage one embedded: which of an image's crops a student sees in which pass."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.mapped import MappedArray
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..counter_random import key_of, uniforms
from ..images.crops import Crops
from ..settings.distill import DistillSettings
from ..settings.loss_terms import wanting
from .order import Draw, Drawn

OWN = "own crops against the centre view"
"""What a run's record calls crops that no embedding belongs to; all runs that do not say are of this kind."""


@dataclass(frozen=True)
class Replay:
    """The first crops of a cache, each with its own embedding.

    Attributes:
        crops: those that the cache holds.
        count: how many of them are replayed, from the first one on.
        seed: of the run.
    """

    crops: Crops
    count: int
    seed: int

    def views(self, rows: NDArray[np.int64], passes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which view each row is seen in: it begins anywhere and takes one after the other, so n passes see n views.

        Args:
            rows, passes: (B,) row numbers, and how often each was drawn before.

        Returns:
            (B,) int64 from 1 to `count`.
        """
        first = uniforms(key_of(self.seed, "first crop"), rows, np.zeros_like(rows), 1)[:, 0] * self.count
        return 1 + (first.astype(np.int64) + passes) % self.count

    def others(self, draw: Draw, views: MappedArray) -> NDArray[np.float16]:
        """Embeddings of the crops that the images of a draw are not seen in, image after image.

        Args:
            draw: (B,) rows and the view of each.
            views: (N, 1 + K, D) of the cache.

        Returns:
            (B · (count - 1), D).
        """
        assert draw.views is not None
        kept = np.arange(1, self.count + 1) != draw.views[:, None]
        return np.asarray(views[draw.rows][:, 1 : self.count + 1][kept])

    def document(self) -> dict[str, Any]:
        """`views` of a run's record."""
        return {"policy": "replay", "count": self.count, "crops": self.crops.settings.model_dump(mode="json")}


class Replayed(Drawn):
    """A stream whose draws say which view of each row they take."""

    def __init__(self, stream: Drawn, replay: Replay) -> None:
        self._stream, self._replay = stream, replay

    def draw(self, step: int) -> Draw:
        draw = self._stream.draw(step)
        return replace(draw, views=self._replay.views(draw.rows, draw.passes))


def choose_replay(settings: DistillSettings, cache: FeatureCache) -> Replay | None:
    """What `distill.views` means for a cache.

    Returns:
        None for crops of the student's own against the embedding of the centre.

    Raises:
        InputError: if more crops are wanted than there are, or if crops are replayed and `distill.augment` is set,
            which would do nothing.
    """
    crops, setting = Crops.read(cache.crops), settings.views
    there = crops.count if crops else 0
    count = there if setting == "auto" else setting
    if count > there:
        holds = f"{there} crops of each image" if there else 'the centre of each image alone (cache.views = "center")'
        raise InputError(
            f"distill.views = {count}: {cache.layout.root} holds {holds}; wanted at most {there}, or another cache"
        )
    if (losses := wanting(settings.losses, "views")) and count < 2:
        raise InputError(
            f"distill.loss.{losses[0]}: holds a view against the other cached views of its batch, but {count} crops "
            "are replayed; wanted distill.views of 2 or more, from a cache that has them (cache.views)"
        )
    if crops is None or not count:
        return None
    if settings.augment.model_fields_set:
        raise InputError(
            f"distill.augment: is set, but {count} crops are replayed from {cache.layout.root} (distill.views = "
            f"{setting}), and the student has none of its own; remove that table, or set distill.views = 0"
        )
    return Replay(crops, count, settings.seed)
