"""The teacher cache on disk: reading and writing it knows no torch and no model."""

from typing import TYPE_CHECKING, Any

from .errors import CacheError, DimefmError, InputError

if TYPE_CHECKING:
    from .reader.feature_cache import EmbeddingSet, EvaluateSet, FeatureCache, Pairs

__all__ = ["CacheError", "DimefmError", "EmbeddingSet", "EvaluateSet", "FeatureCache", "InputError", "Pairs"]


def __getattr__(name: str) -> Any:
    # zarr and pyarrow take a second to load; `--help` and a refused config do without them.
    if name in __all__:
        from .reader import feature_cache

        return getattr(feature_cache, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
