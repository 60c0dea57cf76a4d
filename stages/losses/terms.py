"""The losses of a step, by their names in the config."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...cache.errors import InputError
from ..settings.loss_terms import ActiveLoss
from ..settings.plugins import load_function
from .loss_inputs import LossInputs, TeacherInputs, logit_factor


@dataclass(frozen=True)
class Loss:
    """A loss that is on, its functions imported.

    Attributes:
        settings: its name, weight and options in the config.
        function: called as `function(inputs=LossInputs, factor=number, **options)`, returns this process's share.
        diagnostics: called in the same way with `TeacherInputs`, returns numbers by name; None where it has none.
    """

    settings: ActiveLoss
    function: Callable[..., Tensor]
    diagnostics: Callable[..., dict[str, Tensor]] | None


def load_losses(active: Iterable[ActiveLoss]) -> list[Loss]:
    """Import the functions of losses.

    Raises:
        InputError: one line if one cannot be imported or called.
    """
    losses = []
    for one in active:
        takes = "inputs", "factor", *one.options
        diagnostics = None if one.diagnostics is None else load_function(one.diagnostics, takes)
        losses.append(Loss(one, load_function(one.function, takes), diagnostics))
    return losses


def loss_terms(
    inputs: LossInputs, losses: Sequence[Loss], logit_scale: float, factors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """This process's share of each loss, by name, not yet weighted.

    A share has this process's rows, everybody's columns, and the number of everybody's rows below the line. Summed over
    the processes, shares are the losses of the global batch, and their gradients its gradients: those with respect to
    `local_student`, plus those that the gather brings back from every process's `global_student`. (DDP averages
    gradients: multiply by the number of processes first.)

    Args:
        logit_scale: multiplies cosines.
        factors: by name, scalars that replace logit scale / temperature where that is learned; they get a gradient.

    Raises:
        ValueError: if shapes or dtypes do not fit.
        InputError: if a loss returns something else than a scalar.
    """
    terms = {}
    for loss in losses:
        name = loss.settings.name
        factor = (factors or {}).get(name, _factor(loss, logit_scale))
        term = loss.function(inputs=inputs, factor=factor, **loss.settings.options)
        if not isinstance(term, Tensor) or term.ndim:
            found = f"a tensor {tuple(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
            raise InputError(f"distill.loss.{name}: returned {found}; wanted a scalar tensor, this process's share")
        terms[name] = term
    return terms


def loss_diagnostics(
    inputs: TeacherInputs, losses: Sequence[Loss], logit_scale: float, others: str
) -> dict[str, Tensor]:
    """Diagnostics of the teacher's softmaxes over this process's rows, as `LOSS_NAME`: see `Loss.diagnostics`.

    Args:
        others: what the others are, `sentences` or `images`, in the place of `others` in a name.
    """
    values: dict[str, Tensor] = {}
    for loss in losses:
        if loss.diagnostics is not None:
            found = loss.diagnostics(inputs=inputs, factor=_factor(loss, logit_scale), **loss.settings.options)
            values |= {f"{loss.settings.name}_{key.replace('others', others)}": value for key, value in found.items()}
    return values


def _factor(loss: Loss, logit_scale: float) -> Any:
    temperature = loss.settings.temperature
    return logit_factor(logit_scale, 1.0 if temperature is None else temperature)
