"""Whether captions find their images and images their captions: recall at k, where pairs are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.disk.text_files import read_json
from ...cache.errors import InputError
from ..devices import resolve_device
from ..models.frozen_text_tower import load_text_tower
from .bootstrap import bootstrap_means, interval
from .embedded_set import EmbeddedSet
from .metrics import Matrix, unit_rows
from .score_inputs import ScoreInputs

AT = (1, 5, 10)
_COSINES_AT_ONCE = 1 << 23

Rows = NDArray[np.int64]


def retrieval(inputs: ScoreInputs) -> dict[str, Any]:
    """The score of the table: `recall_scores` of the set, by the captions that its setting names.

    Captions are embedded by the cache's text tower, once for all runs, and by the student's own, where it has one.
    """
    texts, image_of = require_captions(inputs)
    folder = inputs.cache.text_tower

    def embed() -> NDArray[np.float32]:
        inputs.note(f"embedding {len(texts):,} captions of {inputs.name}")
        return load_text_tower(folder, resolve_device("auto")).encode_sentences(texts)

    captions = inputs.memo.once(("embedded captions", folder.resolve(), inputs.name, tuple(texts)), embed)
    own = None if inputs.text is None else inputs.text.encode_sentences(texts)
    return recall_scores(inputs.set, captions, image_of, own)


def require_captions(inputs: ScoreInputs) -> tuple[list[str], Rows]:
    """As `read_captions`, once for all runs, of the file that the set's setting names; errors likewise."""
    path, images = Path(inputs.settings["captions"]), inputs.labelled.images
    sources = images.rows.column("source").slice(0, len(images)).to_pylist()
    key = ("captions", path, inputs.name, tuple(sources))
    captions: tuple[list[str], Rows] = inputs.memo.once(key, lambda: read_captions(path, sources, inputs.name))
    return captions


def read_captions(path: Path, sources: Sequence[str], name: str) -> tuple[list[str], Rows]:
    """Read a JSON object, image -> its captions.

    Args:
        sources: paths of the set's images below its folder, in the order of their rows.
        name: of the set, for errors.

    Returns:
        M captions, those of an image one after the other; and (M,) the row of the image that each belongs to.

    Raises:
        InputError: if the file is missing or holds anything else, or names an image that the set has not.
    """
    wanted = 'a JSON object such as {"birds/1.jpg": ["a small bird on a branch"]}'
    document = read_json(path, wanted)
    if not isinstance(document, dict) or not document:
        raise InputError(f"{path}: no captions; wanted {wanted}")
    rows = {source: row for row, source in enumerate(sources)}
    texts, image_of = [], []
    for source, captions in document.items():
        if source not in rows:
            raise InputError(f"{path}: {source!r} is no image of evaluate.{name} (its first is {sources[0]!r})")
        if not isinstance(captions, list) or not captions:
            raise InputError(f"{path}: {source!r}: found {captions!r}; wanted a list of captions, at least one")
        for caption in captions:
            if not isinstance(caption, str) or not caption.strip():
                raise InputError(f"{path}: {source!r}: the caption {caption!r} is no text")
            texts.append(caption)
            image_of.append(rows[source])
    return texts, np.array(image_of, dtype=np.int64)


def best_own_ranks(queries: Matrix, candidates: Matrix, pairs: Rows) -> Rows:
    """How many candidates each query ranks before the nearest one of its own; 0 is the best.

    Args:
        queries: (Q, D) embeddings of any norm.
        candidates: (C, D) likewise; of equally near ones the first comes first, one of NaN comes last.
        pairs: (P, 2) rows of a query and of a candidate that belong together.

    Returns:
        (Q,) int64; C, a miss at every k, for a query that is NaN or has no candidate of its own but those of NaN.

    >>> images, captions = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 0.1], [1.0, 0.9], [0.1, 1.0]])
    >>> best_own_ranks(images, captions, np.array([[0, 1], [1, 2]])).tolist()
    [1, 0]
    """
    rows, others = unit_rows(queries), unit_rows(candidates)
    num_candidates = len(others)
    # Last bits of a product depend on the column: equal candidates share one.
    whole = np.ascontiguousarray(others).view(np.dtype((np.void, others[:1].nbytes)))[:, 0]
    distinct, column = np.unique(whole, return_inverse=True)
    others = distinct.view(others.dtype).reshape(len(distinct), -1)
    ranks = np.empty(len(rows), dtype=np.int64)
    ordered = pairs[np.argsort(pairs[:, 0], kind="stable")]
    step = max(1, _COSINES_AT_ONCE // num_candidates)
    for first in range(0, len(rows), step):
        cosines = np.nan_to_num((rows[first : first + step] @ others.T)[:, column], nan=-np.inf)
        low, high = np.searchsorted(ordered[:, 0], [first, first + step])
        asked, own = ordered[low:high, 0] - first, ordered[low:high, 1]
        theirs = np.full_like(cosines, -np.inf)
        theirs[asked, own] = cosines[asked, own]
        best = theirs.argmax(axis=1)[:, None]
        nearest = np.take_along_axis(theirs, best, axis=1)
        before = (cosines > nearest) | ((cosines == nearest) & (np.arange(num_candidates) < best))
        ranks[first : first + step] = np.where(np.isfinite(nearest[:, 0]), before.sum(axis=1), num_candidates)
    return ranks


def recall_scores(
    embedded: EmbeddedSet, captions: Matrix, image_of: Rows, student_captions: Matrix | None = None
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 of student and teacher on a set whose images have captions, as JSON values.

    Args:
        embedded: the images, as both see them. One that could not be read is never found, nor finds.
        captions: (M, D) embeddings by the teacher's text tower; at least one.
        image_of: (M,) the image that each belongs to.
        student_captions: (M, D) by the student's own text tower, for its side; None: the teacher's serve both.

    Returns:
        `images` (those with captions), `captions`; `image_to_text` and `text_to_image`, each with `student_r1`,
        `student_r1_interval`, …, `teacher_r10_interval`. Intervals draw images, each with its captions. All images
        of the set, and all captions, are candidates.
    """
    pairs = np.stack([image_of, np.arange(len(image_of))], axis=1).astype(np.int64)
    num_images = len(embedded.labels)
    counts = np.bincount(image_of, minlength=num_images)
    drawn = counts > 0
    to_text: dict[str, Any] = {}
    to_image: dict[str, Any] = {}
    of_student = captions if student_captions is None else student_captions
    for side, texts in (("student", of_student), ("teacher", captions)):
        images = getattr(embedded, side)
        image_ranks = best_own_ranks(images, texts, pairs)
        caption_ranks = best_own_ranks(texts, images, pairs[:, ::-1])
        for k in AT:
            found = np.bincount(image_of, weights=caption_ranks < k, minlength=num_images)
            to_text |= _recall(f"{side}_r{k}", image_ranks[drawn] < k, np.ones(drawn.sum()))
            to_image |= _recall(f"{side}_r{k}", found[drawn], counts[drawn])
    sizes = {"images": int(drawn.sum()), "captions": len(captions)}
    return {**sizes, "image_to_text": to_text, "text_to_image": to_image}


def _recall(key: str, found: NDArray[Any], asked: NDArray[Any]) -> dict[str, Any]:
    """Share of queries that found, with its interval; `found` and `asked` count the queries of each image."""
    table: NDArray[np.float64] = np.stack([found, asked], axis=1).astype(np.float64)
    means = bootstrap_means(table)
    return {key: float(found.sum() / asked.sum()), f"{key}_interval": list(interval(means[:, 0] / means[:, 1]))}
