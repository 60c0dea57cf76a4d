"""Whether a worker may embed: what it is tried with, and what it must come out with. The client's side of it."""

import secrets
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ....cache.disk.durable import attempt_bytes, digest
from ....cache.errors import InputError
from ....cache.version.plan_file import first_difference
from ....stages.embed.shard import readable
from ....stages.embed.tasks import ShardTask
from ....stages.images.decode import ImageError, decode_image
from ....stages.models.teacher import Teacher
from ....stages.settings.models import TeacherSettings
from .worker_side import Introduction, Sample, Task, Tried, probe, versions

SAMPLED = 8
"""Images of each source, and sentences, that a worker is tried with."""

SHARDS_SAMPLED = 4

SAME_ROW = 0.999
"""Least cosine between what a worker and the client embed."""

MUST_AGREE = ("dimefm", "pillow", "libjpeg", "libwebp")
"""Another version of the package or of what decodes images is refused; others show in the probe, and are remarked."""


class Trial:
    """What every worker of one run is tried with.

    It is a context manager: a token stands in the cache's folder meanwhile.
    """

    def __init__(self, tasks: Sequence[ShardTask], settings: TeacherSettings, weights: str, teacher: Teacher) -> None:
        """Read the sample and embed it with the client's own teacher.

        Args:
            tasks: shards to embed, at least one.
        """
        at_most = min(SAMPLED, settings.batch_size)
        samples = tuple(_samples(tasks, teacher, at_most))
        images = [sample.source.read(key) for sample in samples[:1] for key in sample.keys]
        sentences = tuple(islice(_sentences(tasks), at_most))
        self._embeddings = probe(teacher, images, sentences)
        self._identity, self._versions = teacher.identity(), versions()
        secret = secrets.token_bytes(16)
        self._token = attempt_bytes(tasks[0].store / "trial", secret)
        self.task = Task(settings, weights, samples, sentences, self._token.partial, secret)

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *exception: object) -> None:
        self._token.discard()

    def require_versions(self, worker: Introduction) -> None:
        """Raises InputError if a worker has another version of what must agree."""
        for name in MUST_AGREE:
            there, here = (found.get(name, "none") for found in (worker.versions, self._versions))
            if there != here:
                raise InputError(f"it has {name} {there}, this process has {here}; install the same")

    def judge(self, worker: Introduction, tried: Tried) -> str | None:
        """Whether a worker's embeddings are those of this process; a remark if they are only nearly so.

        Raises:
            InputError: what is wrong, for a line that begins with the worker's name.
            CacheError: likewise, if the file that it wrote into the cache is not there.
        """
        try:
            tried.answer.require_sound()
        finally:
            tried.answer.discard()
        there, here = ({**identity, "libraries": {}} for identity in (tried.identity, self._identity))
        if different := first_difference(there, here):
            raise InputError(f"its teacher's {different[0]} is {different[1]}, this process has {different[2]}")
        if tried.embeddings.tobytes() == self._embeddings.tobytes():
            return None
        least = _least_cosine(tried.embeddings, self._embeddings)
        if not least >= SAME_ROW:
            raise InputError(
                f"it embeds the sample with a cosine of {least:.5f} to this process; wanted {SAME_ROW} at least"
            )
        others = [
            f"{name} {worker.versions[name]} where this process has {here}"
            for name, here in self._versions.items()
            if worker.versions.get(name, here) != here
        ]
        return f"embeds with other last bits than this process (cosine {least:.7f}){': ' * bool(others)}" + ", ".join(
            others
        )


def _least_cosine(there: np.ndarray, here: np.ndarray) -> float:
    if there.shape != here.shape:
        return float("nan")
    there, here = there.astype(np.float64), here.astype(np.float64)
    good = np.isfinite(here).all(axis=1) & here.any(axis=1)
    there, here = there[good], here[good]
    norms = np.linalg.norm(there, axis=1) * np.linalg.norm(here, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(((there * here).sum(axis=1) / norms).min(initial=1.0))


def _spread(tasks: Sequence[ShardTask]) -> Sequence[ShardTask]:
    return tasks[:: max(1, len(tasks) // SHARDS_SAMPLED)][:SHARDS_SAMPLED]


def _samples(tasks: Sequence[ShardTask], teacher: Teacher, at_most: int) -> Iterator[Sample]:
    """Images of each source that this process can read and decode, from a few of the shards to come."""
    for array in dict.fromkeys(task.array for task in tasks if task.source):
        chosen = _spread([task for task in tasks if task.array == array])
        source = chosen[0].source
        assert source is not None
        digests: dict[Any, str] = {}
        for number, task in enumerate(chosen, start=1):
            given = [key for key in readable(task) if key is not None]
            for key in given[:: max(1, len(given) // SAMPLED)][:SAMPLED]:
                if len(digests) >= number * at_most // len(chosen):
                    break
                try:
                    data = source.read(key)
                    teacher.crop(decode_image(data))
                except ImageError:
                    continue
                digests[key] = digest(data)
        if digests:
            yield Sample(source, tuple(digests), tuple(digests.values()))


def _sentences(tasks: Sequence[ShardTask]) -> Iterator[str]:
    """A few sentences and prompts of the shards to come."""
    chosen = _spread([task for task in tasks if task.kind == "sentences"])
    for task in chosen:
        good = [text for text in readable(task) if text is not None]
        yield from good[:: max(1, len(good) // 2)][:2]
    for task in tasks:
        if task.kind == "head":
            yield from (prompts[0] for prompts in task.prompts)
