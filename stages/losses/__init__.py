"""The losses. Their names can be imported from here; torch is loaded when one of them is asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .diagnostics import effective_candidates
    from .dime import feature_loss, pvl_loss, udist_loss, vl_loss

__all__ = ["effective_candidates", "feature_loss", "pvl_loss", "udist_loss", "vl_loss"]


def __getattr__(name: str) -> Any:
    # The table of losses is read where torch must not be loaded: `--help`, `plan`, a refused config.
    if name in __all__:
        from . import dime

        return getattr(dime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
