"""A student's tower tried on a few inputs: what does not fit is refused in one line."""

import torch
from torch import Tensor, nn
from torch.distributed import DistError

from ...cache.errors import InputError
from .weights_file import one_line


def require_embeddings(
    tower: nn.Module, inputs: Tensor, embed_dim: int, shown: str, what: str, *, training: bool = False
) -> Tensor:
    """What a tower emits for a batch: one tensor alone, (B, embed_dim), of finite numbers of any float type.

    Args:
        shown, what: what messages call the tower and its inputs.
        training: in training mode and with gradients, else in evaluation mode and without.

    Raises:
        InputError: if it does not run, or emits something else or numbers that are not finite.
    """
    was_training = tower.training
    tower.train(training)
    try:
        with torch.set_grad_enabled(training):
            output = tower(inputs)
    except (torch.OutOfMemoryError, DistError):
        raise  # no fault of the tower's
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise InputError(f"{shown}: cannot take {what} ({one_line(error)})") from error
    finally:
        tower.train(was_training)
    number = len(inputs)
    found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if found != (number, embed_dim):
        raise InputError(
            f"{shown}: emits {found} for {number} {what}; wanted ({number}, {embed_dim}), the width of the teacher's "
            "embeddings"
        )
    if not output.is_floating_point():
        raise InputError(f"{shown}: emits {output.dtype} for {number} {what}; wanted floating point numbers")
    if not output.isfinite().all():
        raise InputError(f"{shown}: emits values that are not finite for {number} {what}; wanted numbers")
    return output
