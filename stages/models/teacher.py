"""What a teacher is, whatever library built it: the protocol that stage one, checks and repair are written against.

A new kind of teacher is a file that implements `Teacher` and a line in `settings.models.TEACHERS`; one from outside of
the package is a function that the config names (`teacher.model = "package.module:function"`).
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..images.crops import Crop
from ..settings.models import TeacherSettings
from .teacher_identity import configured_identity

_LIBRARIES = ("torchvision", "open_clip_torch", "timm", "pillow", "numpy", "transformers", "tokenizers")


class ImageTeacher(Protocol):
    """The image side of a teacher. Embeddings are what the model emits, before normalisation."""

    settings: TeacherSettings
    """What it was loaded with: `precision`, `batch_size`, `device`."""
    device: torch.device
    """Where the model is, one device."""
    embed_dim: int
    """D, the width of its embeddings."""
    logit_scale: float
    """What cosines are multiplied by before a softmax; students use it by default."""
    image_size: tuple[int, int]
    """(height, width) of its input, pixels."""
    preprocess_cfg: dict[str, Any]
    """How it wants its images, ready for JSON: all keys of open_clip's `PreprocessCfg`, lists instead of tuples.
    Students read `mean`, `std` and `interpolation` from it, evaluation the resize mode too."""

    def crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """The centre view of one upright RGB image: (height, width, 3) uint8. Called in threads; uses no torch.

        Raises:
            ImageError: if this image cannot be brought to the input's size.
        """

    def view(self, image: Image.Image, crop: Crop) -> NDArray[np.uint8]:
        """A crop of one upright RGB image, resized to the input: (height, width, 3) uint8. As `crop`, for threads."""

    def normalise(self, crops: Tensor) -> Tensor:
        """(B, height, width, 3) uint8 crops to the model's input, (B, 3, height, width) float32 on its device."""

    def encode_images(self, images: Tensor) -> Tensor:
        """What `normalise` returns to (B, D) float32 embeddings on the CPU."""

    def identity(self) -> dict[str, Any]:
        """All that an embedding depends on, ready for JSON: equal identities on equal machines give equal bytes.

        `basic_identity` and, at least, `weights`: a digest of the weights.
        """


class Teacher(ImageTeacher, Protocol):
    """A teacher with both sides: images and sentences in one space."""

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """(len(sentences), L) int64 token ids on the CPU, L the same for all. Called in a thread."""

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids to (B, D) float32 embeddings on the CPU."""


@runtime_checkable
class SavesTextTower(Protocol):
    """Optional: a teacher whose text tower can be kept in the cache, for prompts that come later."""

    def save_text_tower(self, folder: Path) -> None:
        """Write files that `frozen_text_tower.load_text_tower` reads into an empty folder."""

    def text_tower_bytes(self) -> int:
        """About what they take on disk."""


def basic_identity(teacher: ImageTeacher) -> dict[str, Any]:
    """What the identity of every teacher holds: settings, preprocessing, width, scale, library versions."""
    return {
        **configured_identity(teacher.settings),
        "preprocess": teacher.preprocess_cfg,
        "logit_scale": teacher.logit_scale,
        "embed_dim": teacher.embed_dim,
        "libraries": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Versions of what an embedding is computed with."""
    libraries = {"torch": str(torch.__version__)}
    for name in _LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return libraries


def out_of_memory(teacher: ImageTeacher, batch_size: int) -> str:
    """One line for a batch that the device cannot hold. A smaller one would give other last bits: none is tried."""
    return (
        f"teacher.batch_size = {batch_size}: such a batch does not fit into the memory of {teacher.device}; lower it "
        "(it is part of a cache's identity: start that cache anew)"
    )
