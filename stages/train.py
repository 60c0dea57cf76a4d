"""Stage two: trains one student from the cache and the images. No teacher, no text tower, no sentence is read."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cache.errors import InputError
from ..cache.feature_cache import FeatureCache
from .augment import ViewMaker, resample_filter
from .batches import BatchLoader, normalise
from .checkpoint import load_checkpoint, load_weights, random_state, restore_random_state, save_checkpoint
from .counter_random import key_of
from .devices import resolve_device
from .interrupt import Interrupted, StopSignals
from .losses import effective_candidates, feature_loss, loss_terms
from .metrics_log import MetricsLog
from .optim import build_optimizer, lr_at, set_lr
from .order import Stream
from .pixel_source import ImageFiles
from .run_record import CHECKPOINT, check_same_training, describe_run, logit_scale_of, read_run_record, write_run_record
from .settings import DistillSettings, StudentSettings
from .students import build_student

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


Progress = Callable[[int, int, str], None]
"""Told after every step: images done, images of the whole run, how it goes."""


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train_student` did.

    Attributes:
        steps: steps that are done, those of earlier calls included.
        total_steps: steps of the whole run.
        steps_now: steps of this call; 0 if the run was finished already.
        loss: of the last step; NaN if there was none.
        images_per_s: over this call.
        data_wait: share of the time that the model waited for data.
        peak_bytes: most GPU memory in use, or None on the CPU.
        num_parameters: of the student.
    """

    run_dir: Path
    steps: int
    total_steps: int
    steps_now: int
    loss: float
    images_per_s: float
    data_wait: float
    peak_bytes: int | None
    num_parameters: int

    @property
    def finished(self) -> bool:
        return self.steps == self.total_steps

    def line(self) -> str:
        """One line for the person who started it."""
        if not self.steps_now:
            return f"{self.run_dir}: nothing to do, {self.steps:,} of {self.total_steps:,} steps are done"
        memory = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**30:.1f} GiB of GPU memory"
        return (
            f"{self.run_dir}: {self.steps:,} of {self.total_steps:,} steps, loss {self.loss:.4f}, "
            f"{self.num_parameters / 1e6:.1f} M parameters, {self.images_per_s:,.0f} images/s, "
            f"{self.data_wait:.0%} of the time waiting for data{memory}"
        )


def train_student(
    cache: FeatureCache,
    images_root: Path,
    name: str,
    student: StudentSettings,
    settings: DistillSettings,
    run_dir: Path,
    stop_after: int | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a student, from its last checkpoint if there is one.

    On the CPU, a run that was stopped anywhere (killed included) and continued has the losses of one that was not, bit
    for bit, on one machine with the same versions and threads.

    Args:
        images_root: folder that the cache's image rows are relative to.
        name: the student's name in the config.
        run_dir: gets `run.json`, `checkpoint.pt`, `metrics.jsonl` and `tensorboard/`.
        stop_after: steps of this call at most; the learning rate still follows the whole run's schedule.

    Raises:
        InputError: for settings that the cache cannot serve, a run of other settings in `run_dir`, an unreadable image
            or a loss that is not finite.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    device = resolve_device(settings.device)
    precision = _resolve_precision(settings.precision, device)

    # Seed: weights and dropout; orders and views have keys of their own.
    torch.manual_seed(key_of(settings.seed, "student"))

    # Data
    image_stream = Stream(cache.images.usable, settings.batch_images, settings.seed, "images")
    sentences = (cache.sentences, _sentence_stream(cache, settings)) if settings.loss.vl else None
    preprocess = cache.teacher["preprocess"]
    views = ViewMaker(settings.augment, student.image_size, resample_filter(preprocess["interpolation"]))
    mean, std = (torch.tensor(preprocess[key], dtype=torch.float32, device=device) for key in ("mean", "std"))
    total_steps = max(1, int(settings.epochs * len(image_stream) / settings.batch_images + 1e-9))
    warmup_steps = round(settings.warmup * total_steps)
    logit_scale = logit_scale_of(cache, settings)

    # Model and optimiser
    model = build_student(student.model, cache.images.embeddings.shape[-1], student.image_size).to(device).train()
    model.to(memory_format=torch.channels_last)  # as the images are: convolutions gain up to twofold
    optimizer = build_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    # Record and checkpoint
    record = describe_run(cache, name, student, settings, total_steps=total_steps, precision=precision, device=device)
    path = run_dir / CHECKPOINT
    first_step = 0
    if path.exists():
        check_same_training(run_dir, read_run_record(run_dir), record)
        first_step = _restore(path, model, optimizer, scaler, device)
    else:
        write_run_record(run_dir, record)
    end_step = total_steps if stop_after is None else min(total_steps, first_step + stop_after)
    meter, whole = Meter(), Meter()
    text = ""
    loss, first_bad = torch.tensor(math.nan), torch.tensor(total_steps, device=device)
    if first_step < end_step:
        loader = BatchLoader(
            cache.images,
            image_stream,
            ImageFiles(images_root, cache.images),
            [views],
            view_key=key_of(settings.seed, "views"),
            sentences=sentences,
            workers=settings.workers,
            pin_memory=device.type == "cuda",
        )
        with StopSignals() as stop, MetricsLog(run_dir, first_step) as log, loader:
            # Loop
            for batch in loader.batches(first_step, end_step):
                lr = lr_at(batch.step, total_steps, warmup_steps, settings.lr, settings.lr_min)
                set_lr(optimizer, lr)
                images = normalise(batch.images[0].to(device, non_blocking=True), mean, std)
                targets = batch.targets.to(device, non_blocking=True)
                texts = None if batch.sentences is None else batch.sentences.to(device, non_blocking=True)

                with torch.autocast(device.type, _AUTOCAST.get(precision), enabled=precision in _AUTOCAST):
                    embeddings = model(images)
                terms = loss_terms(embeddings, targets, texts, settings.loss, settings.temperature, logit_scale)
                loss = torch.stack([getattr(settings.loss, key) * term for key, term in terms.items()]).sum()
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

                # Nothing above waits for a GPU; what follows does, now and then.
                step = batch.step + 1
                first_bad = torch.where(loss.isfinite(), first_bad, first_bad.clamp(max=batch.step))
                meter.add(len(batch.rows), batch.wait_s)
                whole.add(len(batch.rows), batch.wait_s)
                if step % settings.log_every == 0 or step == total_steps:
                    _check_finite(run_dir, first_bad, total_steps)
                    log.write(
                        {
                            "step": step,
                            "epoch": step * len(batch.rows) / len(image_stream),
                            "loss": loss.item(),
                            **{key: term.item() for key, term in terms.items()},
                            "lr": lr,
                            **_signs(embeddings, targets, texts, settings, logit_scale),
                            **meter.read(),
                        }
                    )
                    text = f"loss {loss.item():.4f}"
                    meter = Meter()
                stopping = stop.asked  # once: a signal after this line is for the next step
                if step % settings.checkpoint_every == 0 or step == end_step or stopping:
                    _check_finite(run_dir, first_bad, total_steps, model)
                    _save(path, step, model, optimizer, scaler, device)
                if progress is not None:
                    progress(step * len(batch.rows), total_steps * len(batch.rows), text)
                if stopping:
                    break
            if stop.asked:
                raise Interrupted(f"interrupted: state saved at step {step} of {total_steps}")

    return TrainResult(
        run_dir,
        steps=max(first_step, end_step),
        total_steps=total_steps,
        steps_now=max(0, end_step - first_step),
        loss=loss.item(),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        **whole.read(),
    )


class Meter:
    """Images and waiting since it was made."""

    def __init__(self) -> None:
        self._began, self._images, self._wait_s = time.perf_counter(), 0, 0.0

    def add(self, num_images: int, wait_s: float) -> None:
        self._images += num_images
        self._wait_s += wait_s

    def read(self) -> dict[str, float]:
        """Images a second, and the share of the time that training waited for data."""
        seconds = time.perf_counter() - self._began
        return {"images_per_s": self._images / seconds, "data_wait": self._wait_s / seconds}


def _signs(
    embeddings: Tensor, targets: Tensor, sentences: Tensor | None, settings: DistillSettings, logit_scale: float
) -> dict[str, float]:
    """Signs of health of one step: how near the student is, and how many candidates each target spreads over."""
    weights, temperature = settings.loss, settings.temperature
    signs = {"cosine": 1 - feature_loss(embeddings.detach(), targets).item()}
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    if sentences is not None:
        pairs["vl_candidates"] = targets, sentences, temperature.vl
        pairs["vl_candidates_sentences"] = sentences, targets, temperature.vl
    if weights.pvl:
        pairs["pvl_candidates"] = targets, targets, temperature.pvl
    if weights.udist:
        pairs["udist_candidates"] = targets, targets, temperature.udist
    for key, (rows, columns, of) in pairs.items():
        signs[key] = effective_candidates(rows, columns, of, logit_scale).item()
    return signs


def _save(
    path: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> None:
    save_checkpoint(
        path,
        {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random": random_state(device),
        },
    )


def _restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> int:
    """Take up a saved state; returns how many steps it has behind it."""
    state = load_checkpoint(path)
    load_weights(model, state, path)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    restore_random_state(state["random"], device)
    return int(state["step"])


def _check_finite(run_dir: Path, first_bad: Tensor, total_steps: int, model: nn.Module | None = None) -> None:
    """Stop at a loss, or weights, that are not finite, before they are written anywhere."""
    advice = f"{run_dir} keeps the last good checkpoint, if there was one; lower distill.lr or use another precision"
    if (step := int(first_bad)) < total_steps:
        raise InputError(f"the loss of step {step + 1} is not finite; {advice}")
    if model is not None and not all(value.isfinite().all() for value in model.state_dict().values()):
        raise InputError(f"the student's weights are no longer finite; {advice}")


def _sentence_stream(cache: FeatureCache, settings: DistillSettings) -> Stream:
    if not settings.batch_sentences:
        raise InputError("distill.batch_sentences = 0, but distill.loss.vl is on; raise the one or set the other to 0")
    return Stream(cache.sentences.usable, settings.batch_sentences, settings.seed, "sentences")


def _resolve_precision(setting: str, device: torch.device) -> str:
    """What `auto` means: bf16 on a GPU, full precision on the CPU."""
    if setting == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return setting
