"""Asking the teacher for sentences: tokenised ahead, embedded in full batches of fixed boundaries, as images are."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from ...cache.errors import InputError
from ..models.open_clip_teacher import Teacher
from ..profiling import phase
from .image_rows import Lock, ShardResult, ShardRows, run_batches


def embed_sentence_shard(teacher: Teacher, texts: Sequence[str | None], batch_size: int, lock: Lock) -> ShardResult:
    """Embed sentences; None, a sentence that cannot be embedded, is embedded as the empty one and then marked.

    Args:
        texts: the shard's sentences.
        batch_size: rows of every forward pass.
        lock: held while the model runs; tokenising starts before it is asked for.

    Raises:
        InputError: if a batch does not fit into the device's memory.
    """
    rows = ShardRows(len(texts), (teacher.embed_dim,))
    rows.reasons.update({row: None for row, text in enumerate(texts) if text is None})
    seconds = {"read": 0.0, "decode": 0.0}
    seconds |= _encode_texts(teacher, texts, batch_size, rows.take, lock, seconds)
    return rows.result(seconds)


def class_head(teacher: Teacher, prompts: Sequence[Sequence[str]], batch_size: int, lock: Lock) -> np.ndarray:
    """One vector for each class: every prompt's embedding normalised, their mean, normalised.

    Args:
        prompts: the prompts of each class, at least one.
        batch_size: rows of every forward pass; the prompts of all classes run on through the batches.
        lock: held while the model runs.

    Returns:
        (classes, D) float32, unit rows.

    Raises:
        InputError: if a class has no prompt or no direction: a NaN among its embeddings, or a mean of zero.
    """
    class_of = np.repeat(np.arange(len(prompts)), [len(texts) for texts in prompts])
    sums = np.zeros((len(prompts), teacher.embed_dim))

    def take(first: int, block: np.ndarray) -> None:
        classes = class_of[first : first + len(block)]
        vectors = block[: len(classes)].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            np.add.at(sums, classes, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))

    texts = [text for texts in prompts for text in texts]
    _encode_texts(teacher, texts, batch_size, take, lock, {"decode": 0.0})
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    broken = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(broken):
        first = int(broken[0])
        raise InputError(
            f"class prompts: class {first} of {len(prompts)} has no vector (its prompts: {list(prompts[first])[:2]}); "
            "wanted at least one prompt, and a teacher whose embeddings of them are finite and not zero"
        )
    return np.asarray(sums / norms, dtype=np.float32)


def _encode_texts(
    teacher: Teacher,
    texts: Sequence[str | None],
    batch_size: int,
    take: Callable[[int, np.ndarray], None],
    lock: Lock,
    seconds: dict[str, float],
) -> dict[str, float]:
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:

        @phase("tokenise")
        def tokenize(first: int) -> Tensor:
            started = time.perf_counter()
            batch = [text or "" for text in texts[first : first + batch_size]]
            tokens = teacher.tokenize(batch + [""] * (batch_size - len(batch)))
            seconds["decode"] += time.perf_counter() - started
            return tokens

        try:
            return run_batches(
                teacher,
                range(0, len(texts), batch_size),
                lambda first: pool.submit(tokenize, first).result,
                phase("forward")(teacher.encode_tokens),
                take,
                lock,
            )
        finally:
            pool.shutdown(cancel_futures=True)
