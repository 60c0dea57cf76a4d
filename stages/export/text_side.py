"""The text tower that goes with an exported student: its own, or its teacher's frozen one, which the cache keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...cache.disk.text_files import read_json
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..models.frozen_text_tower import WEIGHTS_NAME, load_text_tower
from ..models.teacher_source import CONFIG_NAME
from ..models.text_encoder import TextEncoder
from ..models.text_student import TextStudent, text_student_cfg
from ..models.tokenizer import tokenize, tokenizer_identity

CPU = torch.device("cpu")
TEACHER, OWN = "teacher", "student"


@dataclass(frozen=True)
class TextSide:
    """A text tower in float32 on the CPU, with what open_clip and a tokenizer need to be built again.

    Attributes:
        owner: `teacher` or `student`.
        encoder: the tower and its tokenizer.
        model_cfg: `text_cfg`, `quick_gelu` and what else open_clip's model config says; None where open_clip did not
            make it.
        tokenizer_files: what the tokenizer reads; none for open_clip's own, which open_clip has.
        logit_bias: of a sigmoid teacher.
    """

    owner: str
    encoder: TextEncoder
    model_cfg: dict[str, Any] | None
    tokenizer_files: Sequence[Path] = ()
    logit_bias: float | None = None

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """(M, L) int64 token ids."""
        return tokenize(self.encoder.tokenizer, sentences)

    @property
    def tokenizer(self) -> dict[str, Any]:
        """What tells its tokenizer from others."""
        return tokenizer_identity(self.encoder.tokenizer)


def text_side(cache: FeatureCache, record: dict[str, Any], own: TextStudent | None) -> TextSide | None:
    """The text tower of a run.

    Args:
        own: the student's, where it has one.

    Returns:
        None where the student has none and its teacher's is not in the cache (a teacher from outside may save none).

    Raises:
        CacheError: if it is there and damaged.
        InputError: if its tokenizer needs a package that is not installed.
    """
    if own is not None:
        spec = str(record["student"][record["name"]]["text"])
        return TextSide(OWN, _in_float(own), text_student_cfg(spec, record["embed_dim"]))
    folder = cache.text_tower
    if not folder.exists():
        return None
    encoder = _in_float(load_text_tower(folder, CPU))
    config = None  # a text tower that open_clip did not make
    if (folder / CONFIG_NAME).exists():
        config = read_json(folder / CONFIG_NAME, "the text tower of a cache").get("model_cfg")
    ours = {CONFIG_NAME, WEIGHTS_NAME}
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in ours]
    return TextSide(TEACHER, encoder, config, files, _logit_bias(folder / WEIGHTS_NAME))


def _in_float(encoder: TextEncoder) -> TextEncoder:
    encoder.tower.float().to(CPU)
    encoder.device = CPU
    return encoder


def _logit_bias(path: Path) -> float | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return float(file.get_tensor("logit_bias")) if "logit_bias" in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); `dimefm cache verify` tells what is damaged") from error
