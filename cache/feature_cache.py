"""Reading a finished cache: what stage two, evaluation and other people's programs start from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from .arrays import MappedArray
from .durable import digest
from .errors import CacheError
from .layout import IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from .manifest import read_manifest
from .plan import identity, read_plan
from .rows import OK, RowTable


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings and the table that says what each row was made from.

    Attributes:
        embeddings: (N, D) float16, as the teacher emitted them; NaN where the row failed.
        rows: the row table, N rows.
    """

    embeddings: MappedArray
    rows: RowTable

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """Row numbers that have an embedding, ascending."""
        status = self.rows.column("status").slice(0, len(self))
        return np.flatnonzero(pc.equal(status, OK).to_numpy()).astype(np.int64)


@dataclass(frozen=True)
class EvaluateSet:
    """A labelled set: its image embeddings, labels and the teacher's class vectors.

    Attributes:
        images: embeddings and rows of the set's images.
        class_ids: sorted; a label is a position in it.
        class_names: what each class was called in its prompts.
        head: (classes, D) float32, unit rows.
    """

    images: EmbeddingSet
    class_ids: list[str]
    class_names: list[list[str]]
    head: NDArray[np.float32]

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,) position of each image's class in `class_ids`."""
        position = {class_id: i for i, class_id in enumerate(self.class_ids)}
        names = self.images.rows.column("class_id").to_pylist()
        return np.array([position[name] for name in names], dtype=np.int64)


@dataclass(frozen=True)
class Pairs:
    """Neighbours of every row on the other side, best first.

    Attributes:
        ids: (rows, k) int64, -1 where there is none.
        scores: (rows, k) float32 cosine, NaN where there is none.
    """

    ids: MappedArray
    scores: MappedArray


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache, open for reading."""

    layout: Layout
    plan: dict[str, Any]
    manifest: dict[str, Any]
    images: EmbeddingSet
    sentences: EmbeddingSet
    evaluate: dict[str, EvaluateSet]

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureCache":
        """Open a finished cache.

        Raises:
            CacheError: if it is not there, unfinished, of a newer format, foreign, or a file of it is missing or cut.
        """
        layout = Layout(Path(folder))
        plan = read_plan(layout)
        if plan is None:
            raise CacheError(f"{layout.root}: no teacher cache (no plan.json); run `dimefm cache-teacher` first")
        manifest = read_manifest(layout)
        if manifest is None:
            raise CacheError(f"{layout.root}: unfinished (no manifest.json); run `dimefm cache-teacher` to finish it")
        if manifest.get("plan") != identity(layout):
            raise CacheError(f"{layout.root}: plan.json is not the one that manifest.json was written for; restore it")

        def embedding_set(name: str, table: Path) -> EmbeddingSet:
            rows = manifest["arrays"][name]["rows"]
            return EmbeddingSet(MappedArray.open(layout.teacher_zarr, name, rows), RowTable(table))

        evaluate = {}
        for name, inputs in plan["inputs"]["evaluate"].items():
            head = MappedArray.open(layout.teacher_zarr, evaluate_head(name), len(inputs["class_ids"]))
            images = embedding_set(evaluate_images(name), layout.evaluate_rows(name))
            evaluate[name] = EvaluateSet(images, inputs["class_ids"], inputs["class_names"], head[:])
        return cls(
            layout,
            plan,
            manifest,
            embedding_set(IMAGES, layout.image_rows),
            embedding_set(SENTENCES, layout.sentence_rows),
            evaluate,
        )

    @property
    def identity(self) -> str:
        """Digest of teacher, inputs and row lists."""
        return str(self.manifest["plan"])

    @property
    def version(self) -> str:
        """Digest of everything in the manifest: it changes when the cache does."""
        return digest(self.layout.manifest.read_bytes())

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher's identity, as plan.json has it: `logit_scale`, `embed_dim`, `preprocess`, ..."""
        return dict(self.plan["teacher"])

    @property
    def text_tower(self) -> Path:
        """Folder of the teacher's frozen text tower."""
        return self.layout.text_tower

    @property
    def transductive(self) -> list[str]:
        """Evaluation sets whose class names were among the training sentences."""
        return list(self.manifest["transductive"])

    def pairs(self, direction: str) -> Pairs | None:
        """Pseudo-pairs, `image_to_sentence` or `sentence_to_image`; None where retrieval was off."""
        if not self.manifest["pairs"]:
            return None
        store = self.layout.root / self.manifest["pairs"]["store"]
        return Pairs(MappedArray.open(store, f"{direction}/ids"), MappedArray.open(store, f"{direction}/scores"))
