"""What all students of one call to train have in common: the order of rows, the number of steps, the learning rate."""

from collections.abc import Sequence

import torch

from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..counter_random import key_of
from ..images.crops import resample_filter
from ..images.views import ViewMaker
from ..run_folder.run_record import logit_scale_of
from ..sample.order import BankStream, Beginning, Drawn, Share, Stream, WholeDrawn
from ..sample.replay import OWN, Replayed, choose_replay
from ..sample.retrieved import PairStream
from ..sample.weighted_sources import row_stream
from ..settings.distill import DistillSettings
from ..settings.loss_terms import LOSS_TERMS, wanting
from .optim import lr_at
from .processes import World


class Schedule:
    """What each step of a run is made of; a function of the settings, the cache and the step alone.

    Attributes:
        images, sentences, texts, bank: the order in which rows are drawn, whole; None where no loss wants any. `texts`
            are the sentences that text towers are trained on, the first of each step's.
        total_steps: of the whole run.
        precision: `fp32`, `fp16` or `bf16`.
        logit_scale: number that multiplies cosines.
        resample: filter that makes views.
        replay: which of the cache's crops are replayed; None for crops of the student's own.
        mean, std: (3,) float32 on the device, of pixels between 0 and 1.
    """

    def __init__(
        self, cache: FeatureCache, settings: DistillSettings, world: World, *, trains_text: bool = False
    ) -> None:
        """A schedule of one call to train.

        Args:
            trains_text: whether a student has a text tower of its own.

        Raises:
            InputError: for settings that the cache cannot serve.
        """
        self._settings, self._world = settings, world
        self.precision = _resolve_precision(settings.precision, world.device)
        self.logit_scale = logit_scale_of(cache, settings)
        self.replay = choose_replay(settings, cache)
        self.images = row_stream(cache.images, settings.batch_images, settings.seed, "images")
        losses = settings.losses
        wants_sentences = trains_text or wanting(losses, "others")
        self.sentences = self._sentence_stream(cache) if wants_sentences else None
        if settings.pairs.per_image and not wants_sentences:
            able = " or ".join(term.name for term in LOSS_TERMS if "others" in term.wants)
            raise InputError(
                f"distill.pairs.per_image = {settings.pairs.per_image}, but nothing looks at sentences: "
                f"distill.loss.{able} is off and no text tower is trained; set it to 0 or give {able} a weight"
            )
        self.texts = _texts(self.sentences, settings) if trains_text and self.sentences is not None else None
        wants_bank = settings.bank_images and (wanting(losses, "bank") or (trains_text and wanting(losses, "others")))
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
        drawn = {"images": self.images, "sentences": self.sentences, "texts": self.texts, "bank": self.bank}
        return {name: stream.describe() for name, stream in drawn.items() if stream is not None}

    @property
    def views(self) -> dict[str, object]:
        """Which views of the images are used, for the run's record."""
        return self.replay.document() if self.replay else {"policy": OWN}

    def view_makers(self, sizes: Sequence[int]) -> list[ViewMaker]:
        """What makes the views of students with inputs of these sizes."""
        crops = self.replay.crops.settings if self.replay else self._settings.augment
        return [ViewMaker(crops, size, self.resample, replays=self.replay is not None) for size in sizes]

    @property
    def view_key(self) -> int:
        """The key of their random numbers."""
        return self.replay.crops.key if self.replay else key_of(self._settings.seed, "views")

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        settings = self._settings
        return lr_at(step, self.total_steps, self._warmup_steps, settings.lr, settings.lr_min)

    def epoch(self, steps: int) -> float:
        """Passes over the images that so many steps make."""
        return steps * self._settings.batch_images / len(self.images)

    def share(self, name: str) -> Drawn | None:
        """This process's part of every draw of `images`, `sentences`, `texts` or `bank`.

        Raises:
            InputError: if it cannot be divided equally.
        """
        stream: WholeDrawn | None = getattr(self, name)
        if stream is None:
            return None
        drawn: Drawn = stream if self._world.size == 1 else Share(stream, self._world.rank, self._world.size)
        return Replayed(drawn, self.replay) if self.replay and name == "images" else drawn

    def _sentence_stream(self, cache: FeatureCache) -> Stream | PairStream:
        """Random sentences, or retrieved ones among them."""
        settings = self._settings
        random = _random_sentences(cache, settings)
        if not settings.pairs.per_image:
            return random
        return PairStream(cache, self.images, random, settings.pairs, settings.seed, self.logit_scale)


def _random_sentences(cache: FeatureCache, settings: DistillSettings) -> Stream:
    if not settings.batch_sentences:
        losses = wanting(settings.losses, "others")
        raise InputError(
            f"distill.batch_sentences = 0, but distill.loss.{losses[0]} is on; raise the one or set the other to 0"
            if losses
            else "distill.batch_sentences = 0, but a student's text tower is trained on sentences; raise it"
        )
    return row_stream(cache.sentences, settings.batch_sentences, settings.seed, "sentences")


def _texts(sentences: WholeDrawn, settings: DistillSettings) -> Beginning:
    if settings.batch_texts > settings.batch_sentences:
        raise InputError(
            f"distill.batch_texts = {settings.batch_texts}: more than distill.batch_sentences = "
            f"{settings.batch_sentences}, which they are taken from; lower the one or raise the other"
        )
    return Beginning(sentences, settings.batch_texts, "distill.batch_texts")


def _resolve_precision(setting: str, device: torch.device) -> str:
    """What `auto` means: bf16 on a GPU, full precision on the CPU."""
    if setting == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return setting
