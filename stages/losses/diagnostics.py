"""What is logged of a step's losses besides their values."""

from torch import Tensor

from .loss_inputs import logit_factor
from .similarity_blocks import LogWeights, Rows
from .wide_kl import row_entropies


def effective_candidates(
    rows: Rows, columns: Rows, temperature: float, logit_scale: float, log_weights: LogWeights | None = None
) -> Tensor:
    """How many columns a row's softmax spreads over: exp(entropy), mean over the rows.

    At 1 the target is one-hot, at `len(columns)` uniform: either way the loss teaches little.

    Args:
        rows: (B, D) embeddings, any float dtype, any norm.
        columns: (N, D) embeddings that each row is compared to; several matrices in a tuple stand below one another.
        temperature: of the softmax.
        logit_scale: multiplies cosines.
        log_weights: added to the logits.

    Returns:
        Scalar between 1 and N.
    """
    factor = logit_factor(logit_scale, temperature)
    return row_entropies(rows, columns, factor, log_weights=log_weights).exp().mean()
