"""The state of a run on disk: all that its next step depends on, replaced in one piece."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...cache.disk.durable import write_bytes
from ...cache.errors import InputError

FORMAT = 1
"""Version of what a checkpoint holds."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a state durably; a crash at any moment leaves the old file or the new one.

    Args:
        state: tensors, numbers, strings, lists and dicts only: it is read back without running any code.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_bytes(path, buffer.getbuffer())


def load_checkpoint(path: Path, remedy: str = "delete it to train from the start") -> dict[str, Any]:
    """Read a state, onto the CPU, running no code from the file.

    Args:
        remedy: what to do about a damaged one, for the message.

    Raises:
        InputError: if the file is missing, damaged, or no checkpoint of this project.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; train the student first") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable checkpoint; {remedy}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise InputError(f"{path}: checkpoint format {found}, wanted {FORMAT}; {remedy}")
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of torch's generators that a training step draws from (dropout, drop path)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators back. A run moved to another kind of device goes on with that device's fresh seed."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def weights_to_use(state: dict[str, Any]) -> str:
    """Key of the weights to use outside of training: `ema`, averaged ones, where a state has some, else `model`."""
    return "model" if state.get("ema") is None else "ema"


def load_weights(student: nn.Module, state: dict[str, Any], path: Path, key: str = "model") -> None:
    """Give a student the weights under `key` of a state from `path`; InputError if they are another model's."""
    try:
        student.load_state_dict(state[key])
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{path}: its weights do not fit the student that run.json names; was its code changed?"
        ) from error
