"""What a user sets about stage two. No heavy import here: a config is refused before anything else loads."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Device, FilePath, Fraction, RandomCrop, Settings
from .loss_terms import ActiveLoss, LossSettings, TemperatureSettings, active_losses, default_losses

__all__ = ["AugmentSettings", "DistillSettings", "LossSettings", "PairSampling", "TemperatureSettings"]


class AugmentSettings(RandomCrop):
    """`[distill.augment]`: crops of the student's own. A flipped photo is another view than the one that was cached."""

    preset: Literal["light", "paper"] | None = None
    """`paper` is scale 0.08-1 with flips; `light` is the default. Keys beside it win over it."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, keys: object) -> object:
        if isinstance(keys, dict) and keys.get("preset") == "paper":
            keys = {"scale": (0.08, 1.0), "flip": True, **keys}
        return keys


class PairSampling(Settings):
    """`[distill.pairs]`: which of a step's sentences are retrieved for its images; the rest are drawn at random."""

    per_image: int = Field(default=0, ge=0)
    """Retrieved sentences that each image of the step brings along; fewer where it has fewer."""
    min_score: float | None = Field(default=None, ge=-1.0, le=1.0)
    """Least cosine of a retrieved sentence to its image."""
    sampling: Literal["score", "uniform"] = "score"
    """How an image chooses among its candidates: by the softmax of their scores, or each alike."""
    rank: Literal["cosine", "csls", "inverted_softmax"] = "cosine"
    """The score that candidates are judged by: the cosine, or one that takes account of hubs."""
    cap: int | None = Field(default=None, ge=1)
    """At most so many images keep one sentence as their candidate."""
    correct: bool = False
    """Weigh images and sentences in `vl` by how seldom steps hold them together, as if all had been drawn at random."""


class DistillSettings(Settings):
    """`[distill]`: stage two."""

    output: FilePath = Path("runs")
    """Folder of the runs: one folder per student in it."""
    epochs: float = Field(default=10, gt=0.0, strict=False)
    """Passes over the images."""
    batch_images: int = Field(default=256, ge=1)
    batch_sentences: int = Field(default=4096, ge=0)
    """Sentences of a step; its own number, since their embeddings come from the cache."""
    batch_texts: int = Field(default=256, ge=1)
    """How many of them, the first, go through the text tower of a student that has one."""
    bank_images: int = Field(default=0, ge=0)
    """More images of each step whose teacher embeddings alone are columns of the losses that want a bank."""
    accumulate: int = Field(default=1, ge=1)
    """Pieces in which a step's images go through the student, one after the other; the losses still see all of them."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    lr: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate of AdamW. The default suits small students at batches of some hundred images."""
    lr_min: float = Field(default=1e-5, ge=0.0)
    """Learning rate that the cosine ends at."""
    warmup: Fraction = 0.05
    """Share of all steps over which the learning rate rises linearly."""
    weight_decay: float = Field(default=0.05, ge=0.0)
    """On matrices and filters only; norms, biases and positional embeddings have none."""
    clip_grad_norm: float | None = Field(default=None, gt=0.0)
    """Largest norm of a step's gradient; a longer one is scaled down to it."""
    ema: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay of a running average of the weights, which is then what is scored; lower in the first steps."""
    compile: bool = False
    """Let torch compile the student: minutes at the start, faster steps after."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Autocast format of the student; losses are in float32 whatever it is. `auto`: bf16 on a GPU, else fp32."""
    device: Device = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    workers: int = Field(default=0, ge=0)
    """How many read, decode and augment images: up to two are threads, more are processes; 0 takes one for each
    core, divided among the processes of a run."""
    pixels: Literal["auto", "files", "kept"] = "auto"
    """Where the pictures come from: `files`, the originals; `kept`, those that stage one has kept (`cache.pixels`);
    `auto`: kept ones where the cache has them. A run stays with what it began with."""
    views: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """What a student sees: 0, crops of its own (`augment`) against the embedding of the centre; n, the first n crops
    that the cache holds (`cache.views`), each against its own embedding; `auto`: all that it holds, or else 0."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between zero-shot scores on `evaluate_on`, the last step always among them; the best step's weights are
    kept. 0: never."""
    evaluate_on: str = "dev"
    """The `[evaluate.*]` set that chooses the best step."""
    profile: bool = False
    """Profile some early steps of each call into `profile/` of the run's folder: a trace, a GPU's memory, and a table
    of where their time went."""
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = Field(default_factory=default_losses)
    temperature: TemperatureSettings = TemperatureSettings()
    pairs: PairSampling = PairSampling()

    @model_validator(mode="after")
    def _retrieved_sentences_fit(self) -> "DistillSettings":
        most = self.pairs.per_image * self.batch_images
        if most > self.batch_sentences:
            raise ValueError(
                f"pairs.per_image = {self.pairs.per_image} for {self.batch_images} images may retrieve {most} "
                f"sentences, but batch_sentences = {self.batch_sentences}; lower the one or raise the other"
            )
        return self

    @property
    def losses(self) -> list[ActiveLoss]:
        """The losses that are on."""
        return active_losses(self.loss, self.temperature)

    def is_scored(self, step: int, total_steps: int) -> bool:
        """Whether the student is scored after so many steps: each `evaluate_every`, and after the last."""
        return self.evaluate_every > 0 and (step % self.evaluate_every == 0 or step == total_steps)
