"""Which device `auto` means, and what is said when its memory is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..cache.errors import InputError


def devices_of(setting: str) -> list[torch.device]:
    """Devices that a setting names: for `auto` and `cuda` every GPU there is; `auto` without one is the CPU.

    Raises:
        InputError: for a device that this machine does not have.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if setting == "cpu" or (setting == "auto" and not gpus):
        return [torch.device("cpu")]
    named = gpus if setting in ("auto", "cuda") else [gpu for gpu in gpus if str(gpu) == setting]
    if not named:
        raise InputError(
            f"device = {setting!r}: this machine has {len(gpus)} GPUs; wanted 'auto', 'cpu', 'cuda' or 'cuda:N'"
        )
    return named


def resolve_device(setting: str) -> torch.device:
    """The first device that a setting names."""
    return devices_of(setting)[0]


@contextmanager
def memory_errors_as(advice: str) -> Iterator[None]:
    """Turn running out of memory, a GPU's or this machine's, into one line: the advice.

    Raises:
        InputError: in place of torch's own error; every other error passes.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            raise InputError(advice) from error
        raise
