"""A student's own text tower, built from an open_clip config, with its tokenizer: what it says of sentences, classes.

Most students have none and use the teacher's, frozen, from the cache (`frozen_text_tower.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip import SimpleTokenizer
from torch import nn

from ...cache.errors import InputError
from .architectures import model_config
from .class_vectors import ClassVectors
from .open_clip_towers import build_text_tower
from .text_encoder import TextEncoder
from .tokenizer import check_vocabulary, tokenize
from .tower_check import require_embeddings
from .weights_file import one_line

_TWO_SENTENCES = ("a photo of a goldfish.", "two men stand near a fence")


def text_student_cfg(spec: str, embed_dim: int) -> dict[str, Any]:
    """What open_clip's model config says about a student's text tower.

    Args:
        spec: an open_clip architecture, or the path of a model config (.json).
        embed_dim: width of the teacher's embeddings, whatever the config says.

    Returns:
        `{"embed_dim": …, "text_cfg": {…}, "quick_gelu": …}`.

    Raises:
        InputError: if there is none, or it is a Hugging Face model or tokenizer, whose files would be downloaded.
    """
    config = model_config(spec, ["text_cfg"], shown=_shown(spec))
    text = {**config["text_cfg"], "output_tokens": False}  # CoCa's would return its tokens beside the embedding
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if text.get(key):
            raise InputError(
                f"{_shown(spec)}: its {key} is {text[key]!r}, whose files are not part of open_clip, and a student's "
                "text tower downloads nothing; choose an architecture with open_clip's own text tower and tokenizer, "
                "such as ViT-S-32-alt"
            )
    return {"embed_dim": embed_dim, "text_cfg": text, "quick_gelu": bool(config.get("quick_gelu", False))}


def build_text_student(spec: str, embed_dim: int) -> nn.Module:
    """Build a text tower with fresh weights, from torch's current random state; arguments as `text_student_cfg`.

    Returns:
        Module from (B, context_length) int64 token ids to (B, embed_dim), not normalised. Its weights carry the names
        under which open_clip's `TextTransformer` loads them.

    Raises:
        InputError: if it cannot be built, or emits something else.
    """
    config = text_student_cfg(spec, embed_dim)
    try:
        tower = build_text_tower(config)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise InputError(f"{_shown(spec)}: its text tower cannot be built ({one_line(error)})") from error
    tokenizer = text_tokenizer(spec)
    check_vocabulary(tokenizer, config["text_cfg"].get("vocab_size", 49408), _shown(spec))
    output = require_embeddings(tower, tokenize(tokenizer, _TWO_SENTENCES), embed_dim, _shown(spec), "sentences")
    if torch.equal(output[0], output[1]):
        raise InputError(
            f"{_shown(spec)}: its text tower says the same of two sentences; wanted a pool_type that suits open_clip's "
            "own tokenizer, such as argmax"
        )
    return tower


def text_tokenizer(spec: str) -> Any:
    """The tokenizer of a text tower: open_clip's own byte-pair encoding, at the tower's context length.

    Raises:
        InputError: as `text_student_cfg`, or if its arguments are none of the tokenizer's.
    """
    text = text_student_cfg(spec, 1)["text_cfg"]
    try:
        return SimpleTokenizer(context_length=text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"{_shown(spec)}: its tokenizer cannot be built ({one_line(error)})") from error


class TextStudent(TextEncoder):
    """A student's trained text tower."""

    def class_head(self, prompts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """(classes, D) float32 unit rows from the prompts of each class, as stage one makes the teacher's.

        Raises:
            InputError: as `ClassVectors.result`.
        """
        vectors = self.encode_sentences([text for texts in prompts for text in texts])
        head = ClassVectors(prompts, vectors.shape[1])
        head.add(0, vectors)
        return head.result("the student's text tower")


def _shown(spec: str) -> str:
    return f"text = {spec!r}"
