"""`dimefm cache select`: the sentences that images retrieve, as a named mask, with a report of what they cover."""

from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ...cache.audit.inspect import QUANTILES, quantiles, skewness
from ...cache.errors import InputError
from ...cache.reader.feature_cache import EmbeddingSet, FeatureCache
from ...cache.reader.masks import add_mask, check_mask_name
from ...stages.retrieve.hubs import PairScores, Ranking, in_degrees, largest_hubs
from ...stages.retrieve.select import select_sentences
from ..progress import say, short

HUBS_SHOWN = 3
NO_ORIGIN = "not recorded"


def select(
    folder: Path,
    mask: str,
    *,
    side: str = "sentences",
    k: int | None = None,
    min_score: float | None = None,
    cap: int | None = None,
    target: int | None = None,
    rank: str = "cosine",
    within: str | None = None,
    images_mask: str | None = None,
) -> dict[str, Any]:
    """Choose the sentences that images retrieve and save them as a mask of the cache.

    Args:
        mask: name to save them under.
        side: `sentences`; images are nobody's choice yet.
        k: sentences that an image counts for, the best by `rank`; None is all that the cache holds for it.
        min_score: least cosine, whatever the ranking.
        cap: images that count for one sentence.
        target: sentences to keep at most.
        rank: `cosine`, `csls` or `inverted_softmax`; the last at the teacher's logit scale.
        within: a mask of sentences to choose from.
        images_mask: a mask of images to choose for.

    Returns:
        `cache`, `mask`, `settings`, `sentences` (kept, qualify, of), `images` (covered, crowded_out, without,
        without_candidate, of), `hubs` (skewness, never and largest: `before`, of the first k by plain cosine, and
        `after`, of the images that count), `origins` (source -> kept, of), `cosine` and `score` (quantiles of the
        covered images' highest cosine, and of the kept sentences' best score).

    Raises:
        InputError: if an argument is unfit, the cache has no pairs or too few of them, or nothing is chosen.
        CacheError: if the cache is unfinished or damaged.
    """
    if side != "sentences":
        raise InputError(f"--side {side}: wanted sentences; `dimefm cache mask` names a choice of images")
    if rank not in get_args(Ranking):
        raise InputError(f"--rank {rank}: wanted {', '.join(get_args(Ranking))}")
    _check(min_score, cap, target)
    check_mask_name(mask)
    cache = FeatureCache.open(folder).masked(images=images_mask, sentences=within)
    pairs = PairScores.of(cache, cast(Ranking, rank), float(cache.teacher["logit_scale"]))
    first = pairs.k if k is None else k
    if not 1 <= first <= pairs.k:
        raise InputError(
            f"--k {first}: the cache holds {pairs.k} sentences for each image; wanted 1 to {pairs.k}, or a larger "
            "pairs.k and `dimefm cache-teacher` again (no teacher is needed)"
        )
    say(f"looking at the first {first} sentences of {len(cache.images.usable):,} images")
    chosen = select_sentences(pairs, first, min_score, cap, target)
    if not chosen.keep.any():
        raise InputError(_nothing(pairs, min_score))
    before = PairScores.of(cache, "cosine", 1.0) if rank != "cosine" else pairs
    found = {
        "cache": str(cache.layout.root),
        "mask": mask,
        "settings": {
            "k": first,
            "min_score": min_score,
            "cap": cap,
            "target": target,
            "rank": rank,
            "within": within,
            "images_mask": images_mask,
        },
        "sentences": {
            "kept": int(chosen.keep.sum()),
            "qualify": chosen.qualify,
            "of": len(cache.sentences.usable),
        },
        "images": {
            "covered": len(chosen.cosines),
            "crowded_out": chosen.crowded_out,
            "without": chosen.images - len(chosen.cosines),
            "without_candidate": chosen.images - chosen.with_candidate,
            "of": chosen.images,
        },
        "hubs": {
            "before": _hubs(in_degrees(before, first), cache.sentences.usable, cache.sentences),
            "after": _hubs(chosen.degrees, np.flatnonzero(chosen.keep), cache.sentences),
        },
        "origins": _origins(cache.sentences, chosen.keep),
        "cosine": quantiles(chosen.cosines),
        "score": quantiles(chosen.scores),
    }
    add_mask(cache.layout, "sentences", mask, chosen.keep, rows_since=True)
    return found


def select_lines(found: dict[str, Any]) -> list[str]:
    """What `select` found, for a person to read."""
    sentences, images = found["sentences"], found["images"]
    cut = "" if sentences["qualify"] == sentences["kept"] else f" ({sentences['qualify']:,} qualified)"
    lines = [
        f"{found['cache']}: kept {sentences['kept']:,} of {sentences['of']:,} sentences{cut}",
        f"images with a kept sentence: {images['covered']:,} of {images['of']:,}"
        + (f" ({images['crowded_out']:,} of them beyond the cap)" if images["crowded_out"] else "")
        + f"; {images['without']:,} have none ({images['without_candidate']:,} had none near enough to begin with)",
        "",
        f"{'retrieved':<12}{'max':>10}{'skewness':>10}{'never':>9}  most often",
    ]
    for name, item in found["hubs"].items():
        hubs = item["largest"]
        most = f"{hubs[0]['row']:,} {short(hubs[0]['text'])}" if hubs else ""
        largest = hubs[0]["images"] if hubs else 0
        lines.append(
            f"  {name:<10}{largest:>10,}{item['skewness']:>10.2f}{100 * item['never']:>7.1f} %  {most}".rstrip()
        )
    lines += ["", "kept of each source"]
    lines += [f"  {short(name)}: {item['kept']:,} of {item['of']:,}" for name, item in found["origins"].items()]
    lines += ["", " " * 32 + "".join(f"{100 * q:>8g} %" for q in QUANTILES)]
    for title, values in (
        ("cosine to the nearest kept", found["cosine"]),
        (f"score ({found['settings']['rank']})", found["score"]),
    ):
        lines.append(f"  {title:<30}" + "".join(f"{values[str(q)]:>10.3f}" for q in QUANTILES))
    lines.append(f'saved as a mask; sentences.mask = "{found["mask"]}" chooses them for a run')
    return lines


def _check(min_score: float | None, cap: int | None, target: int | None) -> None:
    if min_score is not None and not -1 <= min_score <= 1:
        raise InputError(f"--min-score {min_score:g}: a cosine; wanted -1 to 1, such as 0.25")
    for name, number in (("cap", cap), ("target", target)):
        if number is not None and number < 1:
            raise InputError(f"--{name} {number}: wanted at least 1")


def _nothing(pairs: PairScores, min_score: float | None) -> str:
    """Why nothing is chosen, and what would help."""
    best = max((float(np.nanmax(pairs.rank(rows)[1], initial=-1)) for rows in pairs.blocks()), default=-1.0)
    if min_score is None or best == -1.0:
        return "no image retrieves any of these sentences, so nothing would be kept; widen --within or --images-mask"
    return f"--min-score {min_score:g}: no image has a sentence that near (the nearest has {best:.3f}); lower it"


def _hubs(degrees: NDArray[np.int64], among: NDArray[np.int64], sentences: EmbeddingSet) -> dict[str, Any]:
    """How evenly some sentences are retrieved, and the largest hubs of them."""
    largest = largest_hubs(degrees, HUBS_SHOWN)
    texts = sentences.rows.take(largest.tolist(), "text")
    return {
        "skewness": skewness(degrees[among]),
        "never": float(np.mean(degrees[among] == 0)),
        "largest": [
            {"row": int(row), "text": text, "images": int(degrees[row])}
            for row, text in zip(largest, texts, strict=True)
        ],
    }


def _origins(sentences: EmbeddingSet, keep: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    """For each source its kept sentences and those there were to choose from, the sources by name."""
    if not sentences.rows.has("origin"):
        return {}
    origins = pc.fill_null(sentences.rows.column("origin"), NO_ORIGIN)

    def count(rows: NDArray[np.int64]) -> dict[str, int]:
        counted = pc.value_counts(origins.take(pa.array(rows))).to_pylist()
        return {item["values"]: item["counts"] for item in counted}

    of, kept = count(sentences.usable), count(np.flatnonzero(keep))
    return {name: {"kept": kept.get(name, 0), "of": of[name]} for name in sorted(of)}
