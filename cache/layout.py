"""Where things lie inside a cache folder."""

from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
"""Version of the layout that this code writes, and the newest one it reads."""

IMAGES = "images/embedding"
SENTENCES = "sentences/embedding"


def evaluate_images(name: str) -> str:
    """Array of an evaluation set's image embeddings."""
    return f"evaluate/{name}/images/embedding"


def evaluate_head(name: str) -> str:
    """Array of an evaluation set's class vectors."""
    return f"evaluate/{name}/head"


@dataclass(frozen=True)
class Layout:
    """Paths below the folder of one cache."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def manifest_digest(self) -> Path:
        return self.root / "manifest.xxh3"

    @property
    def journal(self) -> Path:
        return self.root / "log" / "shards.jsonl"

    @property
    def timings(self) -> Path:
        return self.root / "log" / "timings.jsonl"

    @property
    def lock(self) -> Path:
        return self.root / "log" / "writer.lock"

    @property
    def teacher_zarr(self) -> Path:
        return self.root / "teacher.zarr"

    def pairs_zarr(self, version: int) -> Path:
        """Pairs of one version of the cache: readers of an older one go on undisturbed."""
        return self.root / f"pairs{_suffix(version)}.zarr"

    def index(self, side: str, version: int) -> Path:
        """FAISS file over `images` or `sentences`, of one version of the cache."""
        return self.root / "index" / f"{side}{_suffix(version)}.faiss"

    @property
    def image_rows(self) -> Path:
        return self.root / "rows" / "images.parquet"

    @property
    def sentence_rows(self) -> Path:
        return self.root / "rows" / "sentences.parquet"

    def evaluate_rows(self, name: str) -> Path:
        return self.root / "rows" / "evaluate" / f"{name}.parquet"

    @property
    def text_tower(self) -> Path:
        return self.root / "text_tower"

    @property
    def first_names(self) -> set[str]:
        """Names that may lie in the folder before plan.json does."""
        return {"log", "rows"}


def _suffix(version: int) -> str:
    return "" if version == 1 else f"-{version}"
