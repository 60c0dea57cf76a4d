"""What stage one reads: images, sentences and labelled sets, opened from a config."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...cache.disk.layout import IMAGES, SENTENCES
from ...stages.inputs.image_source import ImageSource
from ...stages.inputs.open_source import open_source
from ...stages.settings.data import EvaluateSettings, SentencesSettings
from ..config.load import Config


@dataclass(frozen=True)
class LabelledSource:
    """The images of a labelled set; its classes and templates are in its settings."""

    images: ImageSource
    settings: EvaluateSettings


@dataclass(frozen=True)
class Sources:
    """Where the rows of a cache come from.

    Attributes:
        evaluate: labelled sets by name.
        hash_images: whether each image's checksum joins its row.
        max_failed: share of training images that may fail.
    """

    images: ImageSource
    sentences: SentencesSettings
    evaluate: Mapping[str, LabelledSource]
    hash_images: bool = False
    max_failed: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "Sources":
        """Open the sources of a config; nothing is read yet."""
        evaluate = {name: LabelledSource(open_source(item.images), item) for name, item in config.evaluate.items()}
        images = config.images
        return cls(open_source(images.source), config.sentences, evaluate, images.hash, images.max_failed)

    def images_of(self, array: str) -> ImageSource | None:
        """The source of an array of image embeddings; None for sentences, and for a set that the config lacks."""
        if array == IMAGES:
            return self.images
        labelled = None if array == SENTENCES else self.evaluate.get(array.split("/")[1])
        return labelled.images if labelled else None
