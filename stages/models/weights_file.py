"""Weights as files: read without running any code from them, or refused in one line; and told apart by a digest."""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...cache.disk.durable import digest
from ...cache.errors import InputError
from .checkpoint_states import State, choose_state


def read_weights(path: Path, share: Callable[[State], float]) -> tuple[dict[str, Tensor], str]:
    """A model's tensors out of a `.safetensors` file or of one that `torch.save` wrote, by name, on the CPU.

    Args:
        share: how much of the model a state has, 0 to 1; of those that fit equally well, averaged ones are taken.

    Returns:
        The tensors, and what to say where the file holds others that fit, else "".

    Raises:
        InputError: if it is missing, damaged, holds no tensors, or cannot be read without running code from it.
    """
    with weights_errors(path):
        is_safe = path.suffix == ".safetensors"
        document: Any = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    chosen = choose_state(document, share)
    if chosen is None:
        raise InputError(f"{path}: damaged or no checkpoint: no named tensors in it; wanted a state dict")
    return chosen


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
        AssertionError,
    ) as error:
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            found = (
                "not plain weights (TorchScript, or Python objects that would run code when loaded); use the model's "
                "safetensors or hub weights, or, where the file came from, load it and write its state_dict() with "
                "safetensors.torch.save_file"
            )
        elif "loading state_dict" in str(error) or isinstance(error, AssertionError):
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
