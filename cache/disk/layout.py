"""Where things lie inside a cache folder."""

from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
"""Version of the layout that this code writes, and the newest one it reads."""

IMAGES = "images/embedding"
SENTENCES = "sentences/embedding"

SIDES = {"images": IMAGES, "sentences": SENTENCES}
"""Side of a cache -> its array."""

DIRECTIONS = {"image_to_sentence": ("images", "sentences"), "sentence_to_image": ("sentences", "images")}
"""Array of pairs -> which side asks and which side answers."""


def evaluate_images(name: str) -> str:
    """Array of an evaluation set's image embeddings."""
    return f"evaluate/{name}/images/embedding"


def evaluate_head(name: str) -> str:
    """Array of an evaluation set's class vectors."""
    return f"evaluate/{name}/head"


@dataclass(frozen=True)
class Layout:
    """Paths below the folder of one cache.

    Attributes:
        root: the folder.
        under: of a version in the making, the folder of the cache that it is laid over: what `root` has not, is there.
    """

    root: Path
    under: Path | None = None

    @property
    def next(self) -> "Layout":
        """Where the files of the next version wait that will replace files of this one, under the same names."""
        return Layout(self.root / "next", under=self.root)

    @property
    def mend(self) -> "Layout":
        """Where a repair makes the version that will replace a damaged one."""
        return Layout(self.root / "mend", under=self.root)

    @property
    def base(self) -> "Layout":
        """The cache itself, of a version in the making."""
        return self if self.under is None else Layout(self.under)

    def find(self, path: Path) -> Path:
        """Where a file of this layout is: in its own folder, or else in the one below."""
        if self.under is None or path.exists():
            return path
        return self.under / path.relative_to(self.root)

    def name_of(self, path: Path) -> str:
        """A file's name in the manifest, wherever it was found."""
        root = self.root if self.under is None or path.is_relative_to(self.root) else self.under
        return path.relative_to(root).as_posix()

    @property
    def plan(self) -> Path:
        """The plan of version 1; of a version in the making, its plan until it has a number."""
        return self.plan_of(1) if self.under is None else self.root / "growing.json"

    def plan_of(self, version: int) -> Path:
        """The plan that came with a version of the cache."""
        return self.root / f"plan{_suffix(version)}.json"

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
    def spares(self) -> Path:
        """Spare copies of files, each named after its digest."""
        return self.root / "log" / "spare"

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

    def packs(self, setting: str) -> str:
        """Folder of the kept pixels that `cache.pixels` names, below the cache; in the journal, their array."""
        return f"pixels/{setting}"

    @property
    def image_rows(self) -> Path:
        return self.root / "rows" / "images.parquet"

    @property
    def sentence_rows(self) -> Path:
        return self.root / "rows" / "sentences.parquet"

    def evaluate_rows(self, name: str) -> Path:
        return self.root / "rows" / "evaluate" / f"{name}.parquet"

    @property
    def shares_rows(self) -> bool:
        """Whether the row tables are another cache's: linked, and with failures of this one's own beside them."""
        return self.base.image_rows.parent.is_symlink() and self.find(self.own_failures).exists()

    @property
    def own_failures(self) -> Path:
        """Of a cache that shares another one's row tables: rows that failed for its own teacher."""
        return self.root / "failed.parquet"

    def mask(self, side: str, name: str) -> Path:
        """A named choice of rows of `images` or `sentences`."""
        return self.root / "masks" / side / f"{name}.parquet"

    @property
    def text_tower(self) -> Path:
        return self.root / "text_tower"

    @property
    def first_names(self) -> set[str]:
        """Names that may lie in the folder before plan.json does."""
        return {"log", "rows"}


def _suffix(version: int) -> str:
    return "" if version == 1 else f"-{version}"


def table_of(layout: Layout, array: str) -> Path:
    """The row table of an array of embeddings, where it is."""
    if array == IMAGES:
        return layout.find(layout.image_rows)
    if array == SENTENCES:
        return layout.find(layout.sentence_rows)
    return layout.find(layout.evaluate_rows(array.split("/")[1]))
