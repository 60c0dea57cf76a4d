"""Numbers of a sound file that no model can have been trained with, told from those that are merely unusual.

A softmax over cosines, which lie between -1 and 1, is trained with a scale of 10 to about 120: CLIP begins at 14.3 and
is held to 100 (Radford et al., ICML 2021, section 2.5), sigmoid models begin at 10 and end at up to about 120 (Zhai et
al., ICCV 2023). Weights hold the logarithm of it.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ...cache.errors import InputError
from ..settings.models import TeacherSettings

_LARGEST = 1000.0
"""Nothing beyond is a scale: two cosines that differ by 0.01 would already be e^10 apart."""
_USUAL = (5.0, 150.0)
"""Others are remarked, not refused: losses may have been trained without a bound."""
_SHOWN = 3


def is_logit_scale(scale: float | None) -> bool:
    """Whether it is a number that can multiply cosines before a softmax: above 0, up to 1,000."""
    return scale is not None and 0 < scale <= _LARGEST  # which a NaN is not


def require_logit_scale(log: float, weights: Path) -> None:
    """Refuse weights whose logit scale can be none.

    Args:
        log: its logarithm, as weights hold it.

    Raises:
        InputError: with the number and the key to set.
    """
    scale = math.inf if log > 700 else math.exp(log)
    if is_logit_scale(scale):
        return
    meant = f"; {log:.4g} itself looks like one" if 1 < log <= _LARGEST else ""
    raise InputError(
        f"{weights}: their logit scale is {scale:.4g}, the exponential of {log:.4g}, but CLIP bounds it at 100 and "
        f"sigmoid models have up to about 120{meant}: set teacher.logit_scale to the right number, or fetch the "
        "weights again"
    )


def scale_remark(scale: float, key: str) -> str:
    """One line on a logit scale that is unusual, "" on others."""
    if _USUAL[0] <= scale <= _USUAL[1]:
        return ""
    effect = "nearly uniform" if scale < _USUAL[0] else "nearly one-hot"
    return (
        f"logit scale {scale:.4g} is unusual (CLIP: 14 to 100, sigmoid models: up to about 120) and makes softmaxes "
        f"{effect}; if the teacher was not trained with it, set {key}"
    )


def bias_remark(bias: Tensor | None) -> str:
    """One line on a sigmoid model's bias that is unusual (they end at -10 to -20), "" on others and on none."""
    if bias is None or -100 <= float(bias) <= 0:
        return ""
    return f"logit bias {float(bias):.4g} is unusual (sigmoid models: -10 to -20); nothing here uses it"


def require_finite(model: nn.Module, weights: Path, settings: TeacherSettings) -> None:
    """Refuse weights that are NaN or infinite; a few embeddings need not show it. The logit scale is looked at apart.

    Raises:
        InputError: naming the first tensors.
    """
    # A CoCa's captioner is not used, and open_clip leaves one of its tensors as the memory was.
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "logit_scale" and not name.startswith("text_decoder.")
    }
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        shown = ", ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
        narrow = "" if settings.precision == "fp32" else " or set teacher.precision = 'fp32'"
        raise InputError(
            f"{weights}: {shown}: NaN or infinite in {settings.precision}; wanted numbers: fetch the weights again"
            f"{narrow}"
        )
