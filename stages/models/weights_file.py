"""Weights as files: read without running any code from them, or refused in one line; and told apart by a digest."""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from ...cache.disk.durable import digest
from ...cache.errors import InputError

_NESTED = ("ema", "state_dict_ema", "model_ema", "state_dict", "model")
"""Where training checkpoints keep a model's tensors, averaged ones first: ours, timm's and open_clip's."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of one that `torch.save` wrote, by name, on the CPU.

    Of a training checkpoint, the averaged weights where it has some, else the model's. Prefixes that DDP and
    torch.compile add to names are taken off.

    Raises:
        InputError: if it is missing, damaged, holds no tensors, or cannot be read without running code from it.
    """
    with weights_errors(path):
        is_safe = path.suffix == ".safetensors"
        document: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(document, dict):
        nested = [document[key] for key in _NESTED if isinstance(document.get(key), dict)]
        document = nested[0] if nested else document
        tensors = {str(name): value for name, value in document.items() if isinstance(value, Tensor)}
        if tensors:
            return dict(clean_state_dict(tensors))
    raise InputError(f"{path}: no named tensors in it; wanted a state dict")


@contextmanager
def weights_errors(path: Path) -> Iterator[None]:
    """Turn what can go wrong while weights are read, and put into a model, into one line.

    Raises:
        InputError: in place of the libraries' many errors.
    """
    try:
        yield
    except (
        pickle.UnpicklingError,
        SafetensorError,
        zipfile.BadZipFile,
        EOFError,
        StopIteration,
        AttributeError,
        TypeError,
        KeyError,
        ValueError,
        RuntimeError,
    ) as error:
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            found = (
                "not plain weights (TorchScript, or Python objects that would run code when loaded); use the model's "
                "safetensors or hub weights, or, where the file came from, load it and write its state_dict() with "
                "safetensors.torch.save_file"
            )
        elif "loading state_dict" in str(error):
            found = (
                f"not the weights of this architecture ({one_line(error)}); choose the model config that they were "
                "trained with"
            )
        else:
            found = f"damaged or no checkpoint ({one_line(error)}); fetch the file again"
        raise InputError(f"{path}: {found}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def weights_digest(state: Mapping[str, Any]) -> str:
    """Digest of names, formats and bytes of tensors, whatever file they came in and in whatever order."""
    pieces: list[bytes | memoryview] = []
    for name, tensor in sorted(state.items()):
        pieces.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        pieces.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest(*pieces)


def one_line(error: BaseException) -> str:
    """The gist of an error whose text may run over many lines: its first two that are not blank."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300].removesuffix(": ")
