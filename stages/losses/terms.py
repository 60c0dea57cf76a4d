"""The losses of a step, by their names in the config."""

from torch import Tensor

from ..settings.distill import LossSettings, TemperatureSettings
from .clip_kd import icl_share, mse_share
from .dime import _feature, _pvl, _udist, _vl
from .loss_inputs import LossInputs, logit_factor
from .view_relation import view_relation_share


def loss_terms(
    inputs: LossInputs,
    weights: LossSettings,
    temperature: TemperatureSettings,
    logit_scale: float,
    icl_factor: Tensor | None = None,
) -> dict[str, Tensor]:
    """This process's share of each loss that has a weight above 0, by name, not yet weighted.

    A share has this process's rows, everybody's columns, and the number of everybody's rows below the line. Summed over
    the processes, shares are the losses of the global batch, and their gradients its gradients: those with respect to
    `student_images`, plus those that the gather brings back from every process's `all_student_images`. (DDP averages
    gradients: multiply by the number of processes first.)

    Args:
        inputs: of one process; its sentences may be None where `vl` is off.
        logit_scale: number that replaces `weights.logit_scale`, which may be "teacher".
        icl_factor: scalar that replaces logit scale / temperature in `icl` where that is learned; gets a gradient.

    Raises:
        ValueError: if shapes or dtypes do not fit.
    """
    terms = {}
    if weights.vl:
        terms["vl"] = _vl(inputs, logit_factor(logit_scale, temperature.vl))
    if weights.pvl:
        terms["pvl"] = _pvl(inputs, logit_factor(logit_scale, temperature.pvl))
    if weights.udist:
        terms["udist"] = _udist(inputs, logit_factor(logit_scale, temperature.udist))
    if weights.feature:
        terms["feature"] = _feature(inputs)
    if weights.mse:
        terms["mse"] = mse_share(inputs)
    if weights.icl:
        factor = logit_factor(logit_scale, temperature.icl) if icl_factor is None else icl_factor
        terms["icl"] = icl_share(inputs, factor, weights.icl_threshold)
    if weights.views and inputs.other_views is not None:  # texts have no views
        terms["views"] = view_relation_share(inputs, logit_factor(logit_scale, temperature.views))
    return terms
