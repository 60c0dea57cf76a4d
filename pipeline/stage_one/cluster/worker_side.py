"""What runs on a Dask worker: it says who it is, is tried, and embeds shards. The client commits what it writes."""

import importlib.metadata
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import features

from ....cache.disk.durable import Attempt, attempt_bytes, digest
from ....cache.errors import InputError
from ....stages.devices import devices_of, gpu_names
from ....stages.embed.shard import embed_shard
from ....stages.embed.tasks import ShardDone, ShardTask
from ....stages.images.decode import ImageError, decode_image
from ....stages.inputs.image_source import ImageSource
from ....stages.models.load_teacher import load_teacher
from ....stages.models.teacher import Teacher, library_versions
from ....stages.settings.models import TeacherSettings

PROCESS = uuid.uuid4().hex
"""Of this process: one that was restarted under the same address has to be tried again."""


class Teachers:
    """The teachers of one process: each device loads its own once and runs one shard at a time."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[TeacherSettings, torch.device], tuple[Teacher, Lock, str]] = {}
        self._loading = Lock()

    def put(self, settings: TeacherSettings, teacher: Teacher) -> None:
        self._loaded[settings, teacher.device] = (teacher, Lock(), teacher.identity()["weights"])

    def get(self, settings: TeacherSettings, device: torch.device, weights: str) -> tuple[Teacher, Lock]:
        """The teacher of a device, and the lock to hold while it runs.

        Raises:
            InputError: if its weights have another hash than is wanted.
        """
        with self._loading:
            if (settings, device) not in self._loaded:
                self.put(settings, load_teacher(settings, device))
            teacher, lock, own_weights = self._loaded[settings, device]
        if own_weights != weights:
            self.clear()  # the file may have been replaced since it was read: the next try reads it again
            raise InputError("teacher.pretrained holds other weights than the one this run began with")
        return teacher, lock

    def clear(self) -> None:
        self._loaded.clear()


TEACHERS = Teachers()


class NotTriedError(Exception):
    """This process is not the one that was tried: its worker was restarted."""


@dataclass(frozen=True)
class Introduction:
    """Who a worker is.

    Attributes:
        process: `PROCESS`.
        device: the first one that `teacher.device` means there.
        gpus: what its GPUs are called on its host, if it is to be dealt one; else none.
        versions: of this package, of what decodes images, and of what embeddings are computed with.
    """

    process: str
    host: str
    device: str
    gpus: list[str]
    versions: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """Images that the client could read: their keys, and digests of their bytes."""

    source: ImageSource
    keys: tuple[Any, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """What a worker is tried with.

    Attributes:
        weights: hash of the teacher's weights.
        samples: images of each source; those of the first one are embedded.
        sentences: are embedded too.
        token: a file that the client wrote into the cache, beside which the worker writes one.
        secret: what the token holds.
    """

    settings: TeacherSettings
    weights: str
    samples: tuple[Sample, ...]
    sentences: tuple[str, ...]
    token: Path
    secret: bytes


@dataclass(frozen=True)
class Tried:
    """What came out on a worker.

    Attributes:
        identity: of its teacher.
        embeddings: as `probe` returns them.
        answer: the file that it wrote into the cache, which holds the secret too.
    """

    identity: dict[str, Any]
    embeddings: NDArray[np.float32]
    answer: Attempt


def versions() -> dict[str, str]:
    """Versions that two processes must share, or should."""
    decoders = {
        "libjpeg": features.version_feature("libjpeg_turbo") or features.version_codec("jpg"),
        "libwebp": features.version_module("webp"),
    }
    try:
        own = importlib.metadata.version("dimefm")
    except importlib.metadata.PackageNotFoundError:  # on the path, and not installed
        own = "not installed"
    return {"dimefm": own} | library_versions() | {name: version or "none" for name, version in decoders.items()}


def introduce(setting: str) -> Introduction:
    """Who this worker is.

    Args:
        setting: `teacher.device`.

    Raises:
        InputError: if it has no such device.
    """
    device = devices_of(setting)[0]
    gpus = gpu_names() if setting in ("auto", "cuda") and device.type == "cuda" else []
    return Introduction(PROCESS, socket.gethostname(), str(device), gpus, versions())


def try_out(task: Task, device: str) -> Tried:
    """See whether this worker reads what the client reads, shares the cache's folder and loads the teacher.

    Raises:
        InputError: what is wrong, for a line that begins with the worker's name.
    """
    images = [_read(sample) for sample in task.samples]
    try:
        found = task.token.read_bytes()
    except OSError as error:
        raise InputError(f"it does not see the cache's folder {task.token.parent} ({error.strerror})") from error
    if found != task.secret:
        raise InputError(f"its folder {task.token.parent} is not the cache's")
    answer = attempt_bytes(task.token.with_name("trial"), task.secret)
    try:
        teacher, lock = TEACHERS.get(task.settings, torch.device(device), task.weights)
        with lock:
            embeddings = probe(teacher, images[0] if images else (), task.sentences)
    except BaseException:
        answer.discard()
        raise
    return Tried(teacher.identity(), embeddings, answer)


def _read(sample: Sample) -> list[bytes]:
    read, lacking, different = [], [], []
    for key, wanted in zip(sample.keys, sample.digests, strict=True):
        try:
            data = sample.source.read(key)
        except ImageError as error:
            lacking.append(f"{sample.source.locate(key)}: {error}")
            continue
        read.append(data)
        if digest(data) != wanted:
            different.append(sample.source.locate(key))
    if lacking:
        raise InputError(f"it cannot read {len(lacking)} of {len(sample.keys)} sampled images ({lacking[0]})")
    if different:
        raise InputError(f"{len(different)} of {len(sample.keys)} sampled images are others there ({different[0]})")
    return read


def probe(teacher: Teacher, images: Sequence[bytes], sentences: Sequence[str]) -> NDArray[np.float32]:
    """Embed a few images and sentences, each in a batch of its own: (n, D), as the teacher emits them.

    Raises:
        InputError: if one of the images cannot be decoded.
    """
    rows = [np.empty((0, teacher.embed_dim), np.float32)]
    if images:
        try:
            crops = np.stack([teacher.crop(decode_image(data)) for data in images])
        except ImageError as error:
            raise InputError(f"it cannot decode a sampled image ({error})") from error
        rows.append(teacher.encode_images(teacher.normalise(torch.from_numpy(crops))).numpy())
    if sentences:
        rows.append(teacher.encode_tokens(teacher.tokenize(sentences)).numpy())
    return np.concatenate(rows)


def embed(
    task: ShardTask, settings: TeacherSettings, weights: str, device: str, process: str | None, token: Path | None
) -> ShardDone:
    """Embed one shard; its files wait for the client to commit them.

    Args:
        device: which one this worker was dealt.
        process: the one that was tried; None where that is the client's own.
        token: the client's file in the cache while it may still commit something. Where it is gone, so is what was
            written here: nobody would sweep it. (It goes first, then the client sweeps.)

    Raises:
        NotTriedError: if this is another process.
        InputError: if the run is over.
    """
    if process not in (None, PROCESS):
        raise NotTriedError
    teacher, lock = TEACHERS.get(settings, torch.device(device), weights)
    done = embed_shard(task, teacher, settings, lock)
    if token:
        try:
            token.read_bytes()  # to open it asks a file server; to look whether it is there may not
        except FileNotFoundError as error:
            done.discard()
            raise InputError("the run that this shard was for is over") from error
    return done
