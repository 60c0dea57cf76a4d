"""What an exporter gets, and what it gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.errors import InputError
from .text_side import TextSide

OPEN_CLIP_TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4
"""Largest difference between a student and what was written of it in float32, relative to the embedding's norm."""
LEAST_HALF_COSINE = 0.9999
"""Of an embedding in half precision with the student's."""


@dataclass(frozen=True)
class CalibrationData:
    """What the ranges of int8 activations are taken from.

    Attributes:
        images: (n, 3, S, S) float32, normalised, of training images.
        tokens: (m, L) int64, of training sentences; None where no text tower is written.
        source: where the pictures came from, for the record.
        left_out: candidates that look like an image of a labelled set.
    """

    images: Tensor
    tokens: Tensor | None
    source: str
    left_out: int = 0


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        student: the trained image tower, in evaluation mode on the CPU, float32.
        record: its `run.json`, with what `load_student` adds.
        text: the text tower that belongs to it; None where the cache keeps none.
        logit_scale: the teacher's own.
        folder: an empty folder to write into.
        precision: `fp32`, `fp16` or `int8`.
        calibration: gives pictures and sentences, read at the first call; raises InputError where there are none.
        note: tells the person one line.
    """

    student: nn.Module
    record: Mapping[str, Any]
    text: TextSide | None
    logit_scale: float
    folder: Path
    precision: str
    calibration: Callable[[], CalibrationData]
    note: Callable[[str], None]

    @property
    def name(self) -> str:
        """The student's, as in `[student.NAME]`."""
        return str(self.record["name"])

    @property
    def spec(self) -> str:
        """`model` of its `[student.NAME]`."""
        return str(self.record["student"][self.name]["model"])

    @property
    def image_size(self) -> int:
        """Side of its square input, pixels."""
        return int(self.record["student"][self.name]["image_size"])

    @property
    def embed_dim(self) -> int:
        """Width of its embeddings."""
        return int(self.record["embed_dim"])

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's `preprocess_cfg` at the student's size."""
        return {**self.record["preprocess"], "size": [self.image_size, self.image_size]}

    def example_images(self, count: int = 2) -> Tensor:
        """(count, 3, S, S) float32: noise that a seed repeats."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, 3, self.image_size, self.image_size, generator=generator)


@dataclass
class Exported:
    """What was written, opened again by the library that will load it.

    Attributes:
        image: (B, 3, S, S) float32 to (B, D), from the files alone.
        text: (B, L) int64 token ids to (B, D); None where no text tower was written.
        usage: three lines of Python that load it, run in its folder.
        facts: for export.json.
        notes: for the card, a sentence each.
        movable: whether the modules can be moved to a GPU.
        baseline: the same graph in float32 in the same runtime, for latency; None: the student in torch.
    """

    image: nn.Module
    text: nn.Module | None
    usage: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    movable: bool = True
    baseline: nn.Module | None = None


class OneTensor(nn.Module):
    """A tower that returns its embedding alone, whatever it returns beside it (CoCa's returns its tokens)."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        emitted = self.tower(inputs)
        embeddings: Tensor = emitted[0] if isinstance(emitted, tuple) else emitted
        return embeddings


@torch.inference_mode()
def emitted(module: nn.Module, inputs: Tensor) -> NDArray[np.float32]:
    """(B, D) float32 of some inputs, on the CPU."""
    return np.asarray(module(inputs).float().cpu().numpy())


def largest_difference(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Largest norm of a row's difference, relative to the norm of the wanted row.

    >>> round(largest_difference(np.float32([[3, 4.5]]), np.float32([[3, 4]])), 3)
    0.1
    """
    norms = np.maximum(np.linalg.norm(wanted, axis=1), 1e-12)
    return float((np.linalg.norm(found - wanted, axis=1) / norms).max())


def smallest_cosine(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Smallest cosine between two rows of the same number.

    >>> smallest_cosine(np.float32([[2, 0], [0, 1]]), np.float32([[1, 0], [1, 0]]))
    0.0
    """
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((found * wanted).sum(axis=1) / np.maximum(norms, 1e-12)).min())


def require_same(
    written: nn.Module, tower: nn.Module, inputs: Tensor, precision: str, tolerance: float
) -> dict[str, Any]:
    """Hold what was written against the tower that it was made of.

    Returns:
        `largest_difference`, relative, and `smallest_cosine`, over the rows of `inputs`.

    Raises:
        InputError: beyond the tolerance in float32, or below `LEAST_HALF_COSINE` in half precision. int8 has its proof.
    """
    found, wanted = emitted(written, inputs), emitted(tower, inputs)
    difference, cosine = largest_difference(found, wanted), smallest_cosine(found, wanted)
    if precision == "fp32" and not difference <= tolerance:
        raise InputError(
            f"what was written differs from the student by {difference:.1e} of its embedding, wanted {tolerance:.0e}; "
            "take another --format"
        )
    if precision == "fp16" and not cosine >= LEAST_HALF_COSINE:
        raise InputError(
            f"in half precision the student's embeddings have a cosine of {cosine:.5f} with its own, wanted "
            f"{LEAST_HALF_COSINE}; take --precision fp32"
        )
    return {"largest_difference": difference, "smallest_cosine": cosine, "inputs": len(inputs)}


def at_precision(state: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """Tensors as they are written: in half precision the matrices are float16; norms and scalars stay float32."""
    written = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu()
        if value.is_floating_point():
            value = value.to(torch.float16 if precision == "fp16" and value.ndim > 1 else torch.float32)
        written[name] = value.clone(memory_format=torch.contiguous_format)
    return written
