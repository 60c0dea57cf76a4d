"""dimefm: distil CLIP-class teachers into small students from a cache of the teacher's embeddings."""

__version__ = "0.1.0"
