"""What a score is computed from: one run on one labelled set."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.reader.feature_cache import EvaluateSet, FeatureCache
from ..models.text_student import TextStudent
from .embedded_set import EmbeddedSet


class Memo:
    """Results that several runs or sets share, such as embedded captions and fitted probes; computed once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The result of `compute` for this key, from the first time that it was asked for."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may look at.

    Attributes:
        run: the run's folder.
        name: the set's, as in `[evaluate.NAME]`.
        images: where the set's images are: a folder, or what else `open_source` opens.
        settings: those of `[evaluate.NAME]` that turn scores on, by key.
        cache: the run's.
        embedded: every set of this call, embedded by the student and its teacher, by name; empty while `require` is
            asked.
        text: the student's own text tower; None where it uses the teacher's, which is in the cache.
        memo: shared by all runs and sets of a call.
        note: tells the person one line.
    """

    run: Path
    name: str
    images: str
    settings: Mapping[str, Any]
    cache: FeatureCache
    embedded: Mapping[str, EmbeddedSet]
    text: TextStudent | None
    memo: Memo
    note: Callable[[str], None]

    @property
    def set(self) -> EmbeddedSet:
        """The set that is scored."""
        return self.embedded[self.name]

    @property
    def labelled(self) -> EvaluateSet:
        """The set as the cache has it."""
        return self.cache.evaluate[self.name]
