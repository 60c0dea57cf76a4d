"""A student's tower that was just built, tried on two inputs: what does not fit is refused before the first step."""

import torch
from torch import Tensor, nn

from ...cache.errors import InputError
from .weights_file import one_line


def require_embeddings(tower: nn.Module, inputs: Tensor, embed_dim: int, shown: str, what: str) -> Tensor:
    """What a tower emits for a batch of two, (2, embed_dim), in evaluation mode and without gradients.

    Args:
        shown, what: what messages call the tower and its inputs.

    Raises:
        InputError: if it does not run, or emits something else or numbers that are not finite.
    """
    was_training = tower.training
    tower.eval()
    try:
        with torch.no_grad():
            output = tower(inputs)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        raise InputError(f"{shown}: cannot take {what} ({one_line(error)})") from error
    finally:
        tower.train(was_training)
    found = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if found != (2, embed_dim):
        raise InputError(
            f"{shown}: emits {found} for 2 {what}; wanted (2, {embed_dim}), the width of the teacher's embeddings"
        )
    if not output.isfinite().all():
        raise InputError(f"{shown}: emits values that are not finite for 2 {what}; wanted numbers")
    return output
