"""Asking the teacher for sentences: tokenised ahead, embedded in full batches of fixed boundaries, as images are."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from ..models.class_vectors import ClassVectors
from ..models.teacher import Teacher
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
    head = ClassVectors(prompts, teacher.embed_dim)
    texts = [text for texts in prompts for text in texts]
    _encode_texts(teacher, texts, batch_size, head.add, lock, {"decode": 0.0})
    return head.result("the teacher")


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
