"""The teacher cache on disk: reading and writing it knows no torch and no model."""

from .errors import CacheError, DimefmError, InputError
from .feature_cache import EmbeddingSet, EvaluateSet, FeatureCache, Pairs

__all__ = ["CacheError", "DimefmError", "EmbeddingSet", "EvaluateSet", "FeatureCache", "InputError", "Pairs"]
