"""Sentences to token ids, with the tokenizer that a text tower was trained with."""

import codecs
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor

from ...cache.disk.durable import digest
from ...cache.errors import InputError

_CHARACTERS_PER_TOKEN = 64
_LOCAL, _CONFIG = "local-dir:", "open_clip_config.json"
_PROBE = (
    "",
    "a photo of a goldfish.",
    "Zwölf große Boxkämpfer, 12,345 naïve cafés & 3 < 4!",
    "金魚の写真 \N{GOAT} \x00 <end_of_text>",
    "one sentence that does not fit " * 20,
)


def load_tokenizer(name: str) -> Any:
    """The tokenizer that open_clip finds for a model name, `hf-hub:…` or `local-dir:…`.

    Raises:
        InputError: if it needs files or a package that are not here.
    """
    try:
        with _without_mark(name) as readable:
            return open_clip.get_tokenizer(readable)
    except ImportError as error:
        raise InputError(f"{name}: its tokenizer needs the package {error.name}; pip install {error.name}") from error
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{name}: its tokenizer cannot be loaded ({reason}); put its files beside the model's"
        ) from error


@contextmanager
def _without_mark(name: str) -> Iterator[str]:
    """The same model for open_clip, which cannot read a folder's config that begins with a byte order mark."""
    folder = Path(name.removeprefix(_LOCAL))
    config = folder / _CONFIG
    if not name.startswith(_LOCAL) or not config.is_file() or not config.read_bytes().startswith(codecs.BOM_UTF8):
        yield name
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if file.name != _CONFIG:
                Path(copy, file.name).symlink_to(file.resolve())
        Path(copy, _CONFIG).write_bytes(config.read_bytes().removeprefix(codecs.BOM_UTF8))
        yield f"{_LOCAL}{copy}"


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids, padded or cut to the tower's context length.

    Only the beginning of a text can reach the ids, so no more is handed on: byte-pair encoding takes time quadratic
    in the length of a word, and one line of base64 would hold up everything.

    Returns:
        (len(texts), context_length) int64.
    """
    longest = _CHARACTERS_PER_TOKEN * tokenizer.context_length
    ids: Tensor = tokenizer([text[:longest] for text in texts])
    return ids


def tokenizer_identity(tokenizer: Any) -> dict[str, str | int]:
    """What tells two tokenizers apart: class, context length, and a digest of their ids for a few odd sentences."""
    ids = tokenize(tokenizer, _PROBE).numpy().astype(np.int64)
    return {
        "class": type(tokenizer).__name__,
        "context_length": int(tokenizer.context_length),
        "ids": digest(ids.tobytes()),
    }


def check_vocabulary(tokenizer: Any, vocab_size: int, where: str) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for: on a GPU that would end in a device error.

    Raises:
        InputError: naming both numbers.
    """
    largest = int(torch.max(tokenize(tokenizer, _PROBE)))
    if largest >= vocab_size:
        raise InputError(
            f"{where}: vocab_size = {vocab_size}, but its tokenizer ({type(tokenizer).__name__}) makes ids up to "
            f"{largest} and above; wanted the tokenizer or the vocab_size that the weights were trained with"
        )
