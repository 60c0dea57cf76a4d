"""A student in training on a labelled set: scored as `dimefm evaluate` would, and left as it was."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...cache.reader.feature_cache import FeatureCache
from ..inputs.image_source import ImageSource
from ..models.text_student import TextStudent
from ..run_folder.load_student import student_of, text_student_of
from ..score.embed_set import embed_pictures, labelled_set, require_images
from ..score.labelled_pictures import LabelledPictures
from ..score.zero_shot import student_scores
from .student import Student

KEEP_BYTES = 2**30
"""A set whose pictures need no more memory than that is decoded once; a larger one each time that it is scored."""


class DevScores:
    """The set that a run's steps are scored on.

    What is scored is a copy of the student, built as `evaluate` builds it: nothing can disturb the one that learns, and
    on one device the scores are those of `evaluate`. Pictures and copies are made when they are first wanted.

    Attributes:
        name: of the set.
    """

    def __init__(
        self,
        cache: FeatureCache,
        name: str,
        images_root: str | Path | ImageSource,
        device: torch.device,
        *,
        workers: int = 0,
        prompts: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            name: of the set, as in `[evaluate.NAME]`.
            images_root: where the set's images are: a folder, or what else `open_source` opens.
            workers: threads that decode; 0 takes one for each core.
            prompts: of each class of the set, for students with a text tower of their own.

        Raises:
            InputError: if the cache has no such set.
        """
        self.name, self._labelled = name, labelled_set(cache, name)
        self._root, self._device, self._workers, self._prompts = images_root, device, workers, prompts
        self._pictures: dict[int, LabelledPictures] = {}
        self._copies: dict[str, tuple[nn.Module, TextStudent | None]] = {}

    def require(self) -> None:
        """Raises InputError if the folder of its images is missing."""
        require_images(self._root, self.name)

    def score(
        self, student: Student, record: dict[str, Any], stopped: Callable[[], bool] | None = None
    ) -> dict[str, Any]:
        """Scores of a student as it is now, with averaged weights where it keeps some.

        Args:
            record: its run's.
            stopped: asked between batches, whether to give up.

        Returns:
                    `step`, `set`, `weights` (`ema` or `model`) and what `student_scores` says.

        Raises:
            Stopped: if `stopped` said so.
        """
        weights, state = student.chosen_weights()
        model, text = self._copy(record)
        model.load_state_dict(state["model"])
        embedded = embed_pictures(model, self._labelled, self._pictures_for(record), self._device, stopped)
        if text is not None:
            assert self._prompts is not None, "a text tower wants prompts"
            text.tower.load_state_dict(state["text_model"])
            embedded = dataclasses.replace(embedded, student_head=text.class_head(self._prompts))
        return {"step": student.step, "set": self.name, "weights": weights, **student_scores(embedded)}

    def _copy(self, record: dict[str, Any]) -> tuple[nn.Module, TextStudent | None]:
        name = record["name"]
        if name not in self._copies:
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                self._copies[name] = student_of(record).to(self._device), text_student_of(record, self._device)
        return self._copies[name]

    def _pictures_for(self, record: dict[str, Any]) -> LabelledPictures:
        size = record["student"][record["name"]]["image_size"]
        if size not in self._pictures:
            self._pictures[size] = LabelledPictures(
                self._labelled,
                self._root,
                record["preprocess"],
                size,
                workers=self._workers,
                keep_bytes=KEEP_BYTES,
            )
        return self._pictures[size]
