"""temporary"""
from typing import Protocol, Any
from ..cache.errors import InputError
import pyarrow as pa
from .images import read_file
class PixelSource(Protocol):
    kind: str
    def tickets(self, rows): ...
    def read(self, ticket): ...
    def where(self, ticket): ...
class ImageFiles:
    kind = "files"
    def __init__(self, root, images):
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; stage two needs the images that stage one embedded")
        self.root=root; self.sources=images.rows.column("source").cast(pa.large_string()).combine_chunks()
    def tickets(self, rows): return [str(self.root / s) for s in self.sources.take(pa.array(rows)).to_pylist()]
    def read(self, ticket):
        from pathlib import Path
        return read_file(Path(ticket))
    def where(self, ticket): return ticket
def choose_pixels(cache, root, setting): return ImageFiles(root, cache.images)
