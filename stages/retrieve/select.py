"""Sentences that fit the images: those that images retrieve, chosen so that as many images as possible have one."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .hubs import PairScores, allowed, counts

_NO_ROUND = np.iinfo(np.int16).max

_Block = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]
"""ids, cosines and scores of `rank`, and (B, k) bools: those near enough, and those that the images count for."""


@dataclass(frozen=True)
class Selection:
    """What was chosen, and how well it covers the images.

    Attributes:
        keep: (M,) bool, the chosen sentences.
        qualify: sentences that at least one image counts for.
        images: usable images.
        with_candidate: of those, images that have a sentence among their first that is near enough, chosen or not.
        crowded_out: images that have a chosen one, but none that they count for: the cap leaves them out.
        cosines: (images covered,) float32, the highest cosine of each image that has a chosen one, counting or not.
        scores: (sentences kept,) float32, the best corrected score of each chosen sentence, in the order of rows.
        degrees: (M,) int64, images that count for each chosen sentence.
    """

    keep: NDArray[np.bool_]
    qualify: int
    images: int
    with_candidate: int
    crowded_out: int
    cosines: NDArray[np.float32]
    scores: NDArray[np.float32]
    degrees: NDArray[np.int64]


def select_sentences(
    pairs: PairScores,
    first: int,
    min_cosine: float | None = None,
    cap: int | None = None,
    target: int | None = None,
) -> Selection:
    """Choose the sentences that images retrieve. Exact: equal pairs give equal choices.

    An image counts for the best `first` sentences of its ranking, of those for the ones of at least `min_cosine`, and
    of those for the ones that have it among their best `cap` images. Sentences that some image counts for qualify. If
    they are more than `target`, they are taken in rounds: first every image's best one, then every image's second, ...;
    within a round by their best score, the lower row first among equals. So images have one each before any has two.

    A cap alone drops no sentence, for its best image always counts. With a target it lets the images that a hub crowds
    out ask for their next sentence one round earlier.

    Memory: 19 bytes for each sentence, 4 for each image, and that of `allowed` where there is a cap.

    Args:
        first: at least 1; more than there are candidates is all of them.
    """
    kept_pairs = None if cap is None else allowed(pairs, cap, first, min_cosine)

    def blocks() -> Iterator[_Block]:
        for rows in pairs.blocks():
            ids, cosines, scores = pairs.rank(rows)
            near = counts(ids, cosines, first, min_cosine)
            # With a cap, whoever counts is near enough as well: `allowed` has looked.
            yield ids, cosines, scores, near, near.copy() if kept_pairs is None else kept_pairs[rows]

    rounds, best = _rounds(blocks(), len(pairs.usable_sentences))
    candidates = np.flatnonzero(rounds < _NO_ROUND)
    keep = np.zeros(len(rounds), dtype=np.bool_)
    if target is None or len(candidates) <= target:
        keep[candidates] = True
    else:
        order = np.lexsort((candidates, -best[candidates], rounds[candidates]))
        keep[candidates[order[:target]]] = True
    degrees, scores = np.zeros(len(keep), dtype=np.int64), np.full(len(keep), -np.inf, dtype=np.float32)
    cosines, with_candidate, crowded_out, num_images = [], 0, 0, 0
    for ids, found, score, near, there in blocks():
        num_images += len(ids)
        with_candidate += int(near.any(axis=1).sum())
        near &= keep[np.where(near, ids, 0)]
        there &= near
        chosen, times = np.unique(ids[there], return_counts=True)
        degrees[chosen] += times
        np.maximum.at(scores, ids[there], score[there])
        crowded_out += int((near.any(axis=1) & ~there.any(axis=1)).sum())
        cosines.append(np.where(near, found, -np.inf).max(axis=1)[near.any(axis=1)])
    covered = np.concatenate(cosines).astype(np.float32) if cosines else np.empty(0, dtype=np.float32)
    return Selection(keep, len(candidates), num_images, with_candidate, crowded_out, covered, scores[keep], degrees)


def _rounds(blocks: Iterator[_Block], num_sentences: int) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """For each sentence the round in which it is first proposed, and its best score of those that propose it then."""
    rounds = np.full(num_sentences, _NO_ROUND, dtype=np.int16)
    best = np.full(num_sentences, -np.inf, dtype=np.float32)
    for ids, _, scores, _, there in blocks:
        proposed = (np.cumsum(there, axis=1) - 1)[there].astype(np.int16)
        wanted, score = ids[there], scores[there]
        order = np.lexsort((-score, proposed, wanted))
        sentences, begins = np.unique(wanted[order], return_index=True)
        proposed, score = proposed[order][begins], score[order][begins]
        sooner = (proposed < rounds[sentences]) | ((proposed == rounds[sentences]) & (score > best[sentences]))
        rounds[sentences[sooner]], best[sentences[sooner]] = proposed[sooner], score[sooner]
    return rounds, best
