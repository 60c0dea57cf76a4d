"""Which device `auto` means, how the GPUs of a host are dealt, and what is said when memory is full."""

import os
from collections.abc import Iterator, Sequence
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


def gpu_names() -> list[str]:
    """What the GPUs that this process may use are called on its host, in torch's order.

    Names from CUDA_VISIBLE_DEVICES, or numbers: two processes of one host that name the same GPU mean the same one,
    though each counts its own from `cuda:0`.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [names[i] if i < len(names) else str(i) for i in range(torch.cuda.device_count())]


def deal_gpu(names: Sequence[str], taken: Sequence[str]) -> int:
    """Which of the GPUs that a process may use it is to use: the first one that the fewest others of its host have.

    Args:
        names: of its GPUs, as `gpu_names` gives them; at least one.
        taken: names of the GPUs that others of the same host were dealt.

    >>> deal_gpu(["0", "1"], ["0"]), deal_gpu(["1", "2", "0"], ["0"]), deal_gpu(["0", "1"], ["1", "0"])
    (1, 0, 0)
    """
    return min(range(len(names)), key=lambda i: taken.count(names[i]))


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
