"""Training images and sentences that an export needs: to calibrate, to prove, to certify. Drawn once, disjoint."""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...cache.errors import DimefmError, InputError
from ...cache.reader.feature_cache import FeatureCache
from ...stages.export.export_job import CalibrationData
from ...stages.export.proof import TEXTS, sample_sentences
from ...stages.export.text_side import TextSide
from ...stages.export.training_pictures import CALIBRATION_ROWS, TrainingPictures, split_rows
from ...stages.inputs.image_source import ImageSource
from ...stages.inputs.kept_pixels import KeptPixels
from ...stages.inputs.open_source import open_source
from ..config.remembered import config_of

CALIBRATION_SENTENCES = 1
"""Seed of the sentences that calibrate; those that are proved on have another."""


class DrawnRows:
    """What an export takes of the cache."""

    def __init__(
        self, cache: FeatureCache, record: Mapping[str, Any], text: TextSide | None, note: Callable[[str], None]
    ) -> None:
        """Nothing is read yet."""
        self._cache, self._record, self._text, self._note = cache, record, text, note
        self._split = split_rows(cache)

    @cached_property
    def pictures(self) -> TrainingPictures:
        """Pictures of training rows: the kept ones, or else the originals that the cache's config names.

        Raises:
            InputError: if there are neither.
        """
        size = self._record["student"][self._record["name"]]["image_size"]
        return TrainingPictures(self._cache, self._source(), self._record["preprocess"], size)

    @cached_property
    def proof(self) -> tuple[NDArray[np.int64], Tensor]:
        """Rows to prove on and their pictures; raises InputError where there are none."""
        rows, pictures = self.pictures.read(self._split[1])
        if not len(rows):
            raise InputError(f"{self.pictures.source.location}: none of the images that were drawn can be read")
        return rows, pictures

    def calibration(self) -> CalibrationData:
        """What int8 is calibrated on, none of it proved on.

        Raises:
            InputError: if there are no pictures.
        """
        rows, pictures = self.pictures.read(self._split[0])
        if not len(rows):
            raise InputError("--precision int8: no training image can be read to calibrate with; take --precision fp16")
        source = self.pictures.source
        kind = f"kept pixels ({source.name})" if isinstance(source, KeptPixels) else "training images"
        return CalibrationData(self.pictures.normalise(pictures), self._tokens(), kind, self._split[2])

    def _tokens(self) -> Tensor | None:
        if self._text is None:
            return None
        proved, _ = sample_sentences(self._cache, TEXTS)
        rows, texts = sample_sentences(self._cache, TEXTS + CALIBRATION_ROWS, seed=CALIBRATION_SENTENCES)
        others = [text for row, text in zip(rows, texts) if row not in set(proved.tolist())]
        return self._text.tokens((others or texts)[:CALIBRATION_ROWS])

    def _source(self) -> ImageSource:
        if self._cache.pixels is not None:
            return KeptPixels(self._cache.pixels)
        try:
            source = open_source(config_of(self._cache.layout).images.source)
        except DimefmError as error:
            raise InputError(f"no kept pixels, and the training images cannot be found ({error})") from error
        if not source.at_hand():
            raise InputError(f"no kept pixels, and the training images are {source.absent} ({source.location})")
        return source
