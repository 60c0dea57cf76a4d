"""Reading a finished cache: what stage two, evaluation and other people's programs start from."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..disk.durable import digest, to_json
from ..disk.layout import DIRECTIONS, IMAGES, SENTENCES, Layout, evaluate_head, evaluate_images
from ..disk.mapped import MappedArray
from ..disk.row_tables import RowTable, good_rows, read_own_failures
from ..errors import CacheError
from ..version.manifest import read_manifest
from ..version.plan_file import read_plan
from ..version.schema import Manifest, Plan, Views
from .masks import mask_digest, read_mask
from .pixel_packs import PixelPacks
from .source_weights import Mixture, mixture_of


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings and the table that says what each row was made from.

    Attributes:
        embeddings: (N, D) float16, as the teacher emitted them; NaN where the row failed. Of an image that has
            several views, its centre.
        rows: the row table, N rows.
        left_out: row numbers not to be used whatever the table says; they failed for this teacher alone.
        mask: (N,) bool, the rows to choose from; None is all.
        shared: the table is another cache's.
        mixture: how often rows of some sources are drawn; rows of weight 0 are not in `usable`. None: all alike.
        views: (N, 1 + K, D) float16, where K crops of each image were embedded beside its centre, which is view 0;
            else None.
    """

    embeddings: MappedArray
    rows: RowTable
    left_out: tuple[int, ...] = ()
    mask: NDArray[np.bool_] | None = None
    shared: bool = False
    mixture: Mixture | None = None
    views: MappedArray | None = None

    @classmethod
    def open(cls, layout: Layout, array: str, table: Path, num_rows: int | None = None) -> "EmbeddingSet":
        """Open one array and its table.

        Args:
            num_rows: rows that exist according to the manifest; None goes by the array.

        Raises:
            CacheError: if one of them is missing, cut or damaged.
        """
        under = layout.base.teacher_zarr if layout.under else None
        embeddings = MappedArray.open(layout.teacher_zarr, array, num_rows, under)
        failed = read_own_failures(layout.find(layout.own_failures)).get(array, {})
        views = embeddings if len(embeddings.shape) == 3 else None
        return cls(
            embeddings.view(0) if views else embeddings,
            RowTable(layout.find(table), len(embeddings)),
            tuple(failed),
            shared=layout.shares_rows,
            views=views,
        )

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def usable(self) -> NDArray[np.int64]:
        """Row numbers that have an embedding, are in the mask and have a weight above 0, ascending."""
        good = good_rows(self.rows.columns("status", "reason").slice(0, len(self)), self.shared)
        good[list(self.left_out)] = False
        if self.mixture is not None:
            good &= self.mixture.drawn
        return np.flatnonzero(good if self.mask is None else good & self.mask).astype(np.int64)


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
        names = self.images.rows.column("class_id").slice(0, len(self.images)).to_pylist()
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

    @classmethod
    def open(cls, store: Path, direction: str) -> "Pairs":
        """Open the pairs of one direction; errors as `MappedArray.open`."""
        return cls(MappedArray.open(store, f"{direction}/ids"), MappedArray.open(store, f"{direction}/scores"))


@dataclass(frozen=True)
class FeatureCache:
    """A finished cache, open for reading. It stays as it was when it was opened, even when the cache grows.

    Attributes:
        masks: of `images` and `sentences`, the mask that chooses rows: its `name` and `digest`.
        pixels: the images themselves, small, where stage one has kept them.
    """

    layout: Layout
    plan: Plan
    manifest: Manifest
    images: EmbeddingSet
    sentences: EmbeddingSet
    evaluate: dict[str, EvaluateSet]
    masks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    pixels: PixelPacks | None = None
    _pairs: Mapping[str, Pairs] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureCache":
        """Open a finished cache.

        Raises:
            CacheError: if it is not there, unfinished, of a newer format, foreign, or a file of it is missing or cut.
        """
        layout = Layout(Path(folder))
        manifest = read_manifest(layout)
        if manifest is None and not layout.plan.exists():
            raise CacheError(f"{layout.root}: no teacher cache (no plan.json); run `dimefm cache-teacher` first")
        if manifest is None:
            raise CacheError(f"{layout.root}: unfinished (no manifest.json); run `dimefm cache-teacher` to finish it")
        path = layout.root / manifest.plan_file
        if not path.exists() or digest(path.read_bytes()) != manifest.plan:
            raise CacheError(f"{path}: missing, or not the one that manifest.json was written for; restore it")
        plan = Plan.read(path)

        def embedding_set(name: str, table: Path) -> EmbeddingSet:
            return EmbeddingSet.open(layout, name, table, manifest.arrays[name].rows)

        evaluate = {}
        for name, inputs in plan.inputs.evaluate.items():
            head = MappedArray.open(layout.teacher_zarr, evaluate_head(name), len(inputs.class_ids))
            images = embedding_set(evaluate_images(name), layout.evaluate_rows(name))
            evaluate[name] = EvaluateSet(images, inputs.class_ids, inputs.class_names, head[:])
        return cls(
            layout,
            plan,
            manifest,
            embedding_set(IMAGES, layout.image_rows),
            embedding_set(SENTENCES, layout.sentence_rows),
            evaluate,
            pixels=PixelPacks.open(layout, manifest),
            _pairs=_open_pairs(layout, manifest),
        )

    def masked(self, images: str | None = None, sentences: str | None = None) -> "FeatureCache":
        """The same cache with only the rows of named masks `usable`; None chooses all rows.

        Raises:
            InputError: if there is no such mask; it names those that there are.
            CacheError: if its file is missing or damaged.
        """
        changes: dict[str, Any] = {"masks": dict(self.masks)}
        for side, name in (("images", images), ("sentences", sentences)):
            if name is not None:
                whole: EmbeddingSet = getattr(self, side)
                keep = read_mask(self.layout, self.manifest, side, name, len(whole))
                changes[side] = replace(whole, mask=keep)
                changes["masks"][side] = {"name": name, "digest": mask_digest(self.layout, self.manifest, side, name)}
        return replace(self, **changes)

    def weighted(
        self, images: Mapping[str, float] | None = None, sentences: Mapping[str, float] | None = None
    ) -> "FeatureCache":
        """The same cache, the rows of some sources drawn more often than others by a run, or never.

        Args:
            images: first folder below the source (`.`: none) -> weight; those that are not named have 1.
            sentences: name of the file, or `prompts` -> weight.

        Raises:
            InputError: if there is no such source; it names those that there are.
        """
        changes: dict[str, Any] = {}
        for side, weights in (("images", images), ("sentences", sentences)):
            whole: EmbeddingSet = getattr(self, side)
            if mixture := mixture_of(whole.rows, side, weights or {}):
                changes[side] = replace(whole, mixture=mixture)
        return replace(self, **changes)

    @property
    def row_weights(self) -> dict[str, dict[str, float]]:
        """Weights other than 1 of `images` and `sentences`, as `weighted` was given them."""
        sides = {"images": self.images.mixture, "sentences": self.sentences.mixture}
        return {side: dict(mixture.weights) for side, mixture in sides.items() if mixture is not None}

    @property
    def identity(self) -> str:
        """Digest of what a student is trained from: teacher, images, views, sentences. A labelled set may join."""
        plan = self.plan
        parts = {"teacher": plan.teacher, "images": plan.inputs.images, "sentences": plan.inputs.sentences}
        parts |= {"views": plan.views} if plan.views else {}
        return digest(to_json({name: part.to_dict() for name, part in parts.items()}))

    @property
    def crops(self) -> Views | None:
        """The crops that were embedded beside the centre of each image; None where there are none."""
        return self.plan.views

    @property
    def version(self) -> str:
        """Digest of everything in the manifest: it changes when the cache does."""
        return digest(to_json(self.manifest.to_dict()))

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher's identity, as plan.json has it: `logit_scale`, `embed_dim`, `preprocess`, ..."""
        return self.plan.teacher.to_dict()

    @property
    def text_tower(self) -> Path:
        """Folder of the teacher's frozen text tower."""
        return self.layout.text_tower

    @property
    def transductive(self) -> list[str]:
        """Evaluation sets whose class names were among the training sentences."""
        return list(self.manifest.transductive)

    def pairs(self, direction: str) -> Pairs | None:
        """Pseudo-pairs, `image_to_sentence` or `sentence_to_image`; None where retrieval was off.

        Raises:
            CacheError: if they are missing or damaged, which keeps nobody from the embeddings.
        """
        if not self.manifest.pairs:
            return None
        return self._pairs.get(direction) or Pairs.open(self.layout.root / self.manifest.pairs.store, direction)


def _open_pairs(layout: Layout, manifest: Manifest) -> dict[str, Pairs]:
    """Pairs of both directions, mapped now: a later version of the cache removes their files in the end."""
    found: dict[str, Pairs] = {}
    if manifest.pairs is None:
        return found
    for direction in DIRECTIONS:
        with suppress(CacheError):  # raised when they are asked for
            found[direction] = Pairs.open(layout.root / manifest.pairs.store, direction)
    return found


def draws_from_rounded_sizes(cache: FeatureCache) -> bool:
    """Whether a cache's crops, replayed on its kept pictures, are drawn from those pictures' own rounded sizes.

    So it is where the pictures are another cache's, kept without crops in mind: they do not say from what they
    were made smaller.
    """
    if cache.crops is None or cache.pixels is None or cache.manifest.pixels:
        return False
    owner = read_plan(Layout(cache.layout.root / str(cache.plan.rows_of)))
    return owner is None or not owner.views
