"""What all students of one call to train have in common: the order of rows, the number of steps, the learning rate."""

import torch

from ..cache.errors import InputError
from ..cache.feature_cache import FeatureCache
from .augment import resample_filter
from .distill_settings import DistillSettings
from .optim import lr_at
from .order import BankStream, Drawn, Share, Stream, WholeDrawn
from .pair_stream import PairStream
from .run_record import logit_scale_of
from .world import World


class Schedule:
    """What each step of a run is made of; a function of the settings, the cache and the step alone.

    Attributes:
        images, sentences, bank: the order in which rows are drawn, whole; None where no loss wants any.
        total_steps: of the whole run.
        precision: `fp32`, `fp16` or `bf16`.
        logit_scale: number that multiplies cosines.
        resample: filter that makes views.
        mean, std: (3,) float32 on the device, of pixels between 0 and 1.
    """

    def __init__(self, cache: FeatureCache, settings: DistillSettings, world: World) -> None:
        """Raises InputError for settings that the cache cannot serve."""
        self._settings, self._world = settings, world
        self.precision = _resolve_precision(settings.precision, world.device)
        self.logit_scale = logit_scale_of(cache, settings)
        self.images = Stream(cache.images.usable, settings.batch_images, settings.seed, "images")
        self.sentences: Stream | PairStream | None = None
        if settings.loss.vl:
            random = _sentence_stream(cache, settings)
            paired = settings.pairs.per_image > 0
            self.sentences = (
                PairStream(cache, self.images, random, settings.pairs, settings.seed, self.logit_scale)
                if paired
                else random
            )
        wants_bank = settings.bank_images and (settings.loss.pvl or settings.loss.icl)
        self.bank = BankStream(self.images, settings.bank_images, settings.seed) if wants_bank else None
        self.total_steps = max(1, int(settings.epochs * len(self.images) / settings.batch_images + 1e-9))
        self._warmup_steps = round(settings.warmup * self.total_steps)
        preprocess = cache.teacher["preprocess"]
        self.resample = resample_filter(preprocess["interpolation"])
        self.mean, self.std = (
            torch.tensor(preprocess[key], dtype=torch.float32, device=world.device) for key in ("mean", "std")
        )

    @property
    def order(self) -> dict[str, dict[str, object]]:
        """How rows are drawn, for the run's record: enough to draw them again anywhere."""
        drawn = {"images": self.images, "sentences": self.sentences, "bank": self.bank}
        return {name: stream.describe() for name, stream in drawn.items() if stream is not None}

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        settings = self._settings
        return lr_at(step, self.total_steps, self._warmup_steps, settings.lr, settings.lr_min)

    def epoch(self, steps: int) -> float:
        """Passes over the images that so many steps make."""
        return steps * self._settings.batch_images / len(self.images)

    def share(self, name: str) -> Drawn | None:
        """This process's part of every draw of `images`, `sentences` or `bank`.

        Raises:
            InputError: if it cannot be divided equally.
        """
        stream: WholeDrawn | None = getattr(self, name)
        if stream is None or self._world.size == 1:
            return stream
        return Share(stream, self._world.rank, self._world.size)


def _sentence_stream(cache: FeatureCache, settings: DistillSettings) -> Stream:
    if not settings.batch_sentences:
        raise InputError("distill.batch_sentences = 0, but distill.loss.vl is on; raise the one or set the other to 0")
    return Stream(cache.sentences.usable, settings.batch_sentences, settings.seed, "sentences")


def _resolve_precision(setting: str, device: torch.device) -> str:
    """What `auto` means: bf16 on a GPU, full precision on the CPU."""
    if setting == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return setting
