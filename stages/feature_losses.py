"""Names that users import from here: they live in `stages/losses/clip_kd.py`."""

from .losses.clip_kd import icl_loss, mse_loss

__all__ = ["icl_loss", "mse_loss"]
