"""Stage two: trains students from the cache and the images. No part of the teacher is loaded; the text of sentences is
read only for a student that has a text tower of its own."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..inputs.image_source import FILES, ImageSource, require_at_hand
from ..load.batches import Batch, BatchLoader, normalise
from ..load.sentence_tokens import SentenceTokens
from ..load.to_device import on_device
from ..settings.distill import DistillSettings
from ..settings.loss_terms import wanting
from .dev_scores import DevScores
from .interrupt import Interrupted, StopSignals
from .processes import World
from .profile import StepProfile
from .schedule import Schedule
from .speed import Meter, Speed
from .student_run import Note, Run, StudentRun, TrainResult
from .targets import Targets

Progress = Callable[[int, int, str], None]
"""Called after every step with images done, images of the whole run, and a line of losses and scores."""


STEPS_TO_WARM_UP = 3
"""First steps of a call that its speed leaves out, if there are more: workers start, a student is compiled."""


def train(
    cache: FeatureCache,
    pixels: ImageSource,
    runs: Sequence[Run],
    settings: DistillSettings,
    world: World,
    *,
    dev: DevScores | None = None,
    stop_after: int | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> list[TrainResult]:
    """Train students from one stream of batches, each from its last checkpoint if it has one.

    On the CPU, a run that was stopped anywhere (killed included) and continued has the losses of one that was not, bit
    for bit, on one machine with the same versions, threads and number of processes; and a student that learns beside
    others ends with the weights that it gets alone.

    Args:
        pixels: where the images of the cache's rows come from.
        runs: students of different names; each folder gets `run.json`, `checkpoint.pt`, `metrics.jsonl`,
            `tensorboard/`, with `dev` also `scores.jsonl` and `best.pt`.
        world: this process and the others of the run, which all call this with the same arguments.
        dev: what is scored every `settings.evaluate_every` steps and after the last one; the best step's weights are
            kept. Training is the same, bit for bit, with it and without.
        stop_after: steps of this call at most; the learning rate still follows the whole run's schedule.

    Raises:
        InputError: for settings that the cache cannot serve, a run of other settings in a folder, an unreadable image
            or a loss that is not finite (the other students go on to their end first).
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    if settings.evaluate_every and dev is None:
        raise ValueError("evaluate_every without a set to score on: wanted dev")
    trains_text = any(run.student.own_text is not None for run in runs)
    schedule = Schedule(cache, settings, world, trains_text=trains_text)
    tell: Note = note if note is not None and world.is_first else lambda line: None
    training = [StudentRun(run, schedule, cache, pixels, settings, world, stop_after, tell) for run in runs]
    unfinished = [one for one in training if one.wants_more]
    loop = _Loop(unfinished, schedule, settings, world, dev, progress, tell)
    speed = loop.run(cache, pixels) if unfinished else None
    if failures := [one.failure for one in training if one.failure]:
        raise InputError("; ".join(failures))
    return [one.result(speed) for one in training]


@dataclass
class _Loop:
    """The loop over steps: each batch goes to every student that stands at its step; and what is measured meanwhile."""

    training: list[StudentRun]
    schedule: Schedule
    settings: DistillSettings
    world: World
    dev: DevScores | None
    progress: Progress | None
    tell: Note

    def __post_init__(self) -> None:
        self._sizes = sorted({one.run.student.image_size for one in self.training})
        self._vote, self._losses, self._num_steps, self._advised = self.world.stop_vote(), "", 0, False
        self._meter, self._after_warm_up, self._whole, self._stopped = Meter(), Meter(), Meter(), False

    def run(self, cache: FeatureCache, pixels: ImageSource) -> Speed:
        """Train to the end, or until it is told to stop."""
        training, world = self.training, self.world
        require_at_hand(pixels, "stage two needs the images that stage one embedded")
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)  # students before these had a peak of their own
        if self.dev is not None:
            self.dev.require()
        loader = self._loader(cache, pixels)
        num_steps = max(one.end_step for one in training) - min(one.student.step for one in training)
        profiled = [one.run.folder for one in training] if self.settings.profile and world.is_first else []
        profile = StepProfile(profiled, num_steps, world.device, self.tell)
        for one in training:
            one.open_log()
            if self.dev is not None:
                one.score_if_due(self.dev)
        try:
            with StopSignals(patient=world.size > 1) as stop, loader, closing(profile):
                while not self._stopped and (behind := [one for one in training if one.wants_more]):
                    self._catch_up(behind, loader, profile, stop)
                # Several processes go by the vote alone: a signal that only one of them has had would part them.
                stopped = self._stopped or (stop.asked and world.size == 1)
                if stopped and not any(one.failure for one in training):
                    at = min(one.student.step for one in training)
                    raise Interrupted(f"interrupted: state saved at step {at} of {self.schedule.total_steps}")
        finally:
            for one in training:
                one.close_log()
        return self._whole.read()

    def _loader(self, cache: FeatureCache, pixels: ImageSource) -> BatchLoader:
        schedule, world, settings = self.schedule, self.world, self.settings
        images, sentences, texts = (schedule.share(name) for name in ("images", "sentences", "texts"))
        own_texts = [one.run.student.own_text for one in self.training if one.run.student.own_text is not None]
        assert images is not None
        loader = BatchLoader(
            cache.images,
            images,
            pixels,
            schedule.view_makers(self._sizes),
            view_key=schedule.view_key,
            sentences=None if sentences is None else (cache.sentences, sentences),
            bank=schedule.share("bank"),
            other_views=schedule.replay if wanting(settings.losses, "views") else None,
            texts=(SentenceTokens(cache.sentences, own_texts), texts) if texts is not None and own_texts else None,
            workers=world.share_of_cores(settings.workers),
            pin_memory=world.device.type == "cuda",
        )
        self._num_workers, self._reads_files = loader.num_workers, pixels.name == FILES
        return loader

    def _catch_up(self, behind: list[StudentRun], loader: BatchLoader, profile: StepProfile, stop: StopSignals) -> None:
        """Train those that are furthest behind, to the next that waits ahead of them or to their own end."""
        first = min(one.student.step for one in behind)
        # To the next that waits ahead: should all others break, nobody needs the batches before it.
        until = [one.student.step for one in behind if one.student.step > first]
        until += [one.end_step for one in behind if one.student.step == first]
        coming = on_device(loader.batches(first, min(until)), self.world.device)
        with closing(profile.watch(coming)) as batches:
            for batch in batches:
                self.step(batch, stop)
                if self._stopped or not any(one.wants_more and one.student.step > batch.step for one in behind):
                    break

    def step(self, batch: Batch, stop: StopSignals) -> None:
        """One batch, to every student that stands at its step; one that is ahead of the others waits for them."""
        schedule, settings = self.schedule, self.settings
        targets = Targets.of(batch, self.world)
        inputs = {size: normalise(view, schedule.mean, schedule.std) for size, view in zip(self._sizes, batch.images)}
        here = [one for one in self.training if one.wants_more and one.student.step == batch.step]
        for one in here:
            tokens = None if one.run.student.own_text is None else batch.tokens[one.run.student.own_text]
            one.student.learn(inputs[one.run.student.image_size], targets, schedule.lr(batch.step), tokens)
            one.first_not_finite.update(batch.step, one.student.loss)

        # Nothing above waits for a GPU; what follows does, now and then.
        step = batch.step + 1
        self._count(batch.wait_s)
        if step % settings.log_every == 0 or step == schedule.total_steps:
            self.world.wait_for_device()  # what is still on its way belongs to the steps that are counted
            speed, self._meter = self._meter.read(), Meter()
            for one in here:
                one.write_metrics(targets, speed)
            self._losses = "loss " + ", ".join(self._of(one, f"{one.loss:.4f}") for one in here)
            if not self._advised and self._num_steps > 2 * STEPS_TO_WARM_UP:
                self._advise(speed)
        left = False
        if self.dev is not None and settings.is_scored(step, schedule.total_steps):
            # Nobody goes on after the last step: it is scored to the end.
            can_stop = step < schedule.total_steps
            left = self._score(here, self.dev, (lambda: stop.asked) if can_stop else None)
        # Scores that were left are made when the run goes on from this step; a vote takes one step more.
        self._stopped = self._vote.cast(stop.asked) or left
        if self.progress is not None:
            total = schedule.total_steps * settings.batch_images
            self.progress(step * settings.batch_images, total, self._status())
        for one in here:
            if step % settings.checkpoint_every == 0 or step == one.end_step or self._stopped:
                one.save()

    def _score(self, here: list[StudentRun], dev: DevScores, stopped: Callable[[], bool] | None) -> bool:
        """Between two steps; the time that it takes is no step's. Returns whether it was left before its end."""
        self.world.wait_for_device()
        began = time.perf_counter()
        left = [one.score(dev, stopped) for one in here]
        self.world.wait_for_device()
        for meter in {self._meter, self._after_warm_up, self._whole}:
            meter.leave_out(time.perf_counter() - began)
        return any(left)

    def _status(self) -> str:
        scores = [(one, one.last_score) for one in self.training if one.last_score is not None]
        shown = ", ".join(self._of(one, f"{100 * of['student_top1']:.1f} %") for one, of in scores)
        scored = f"{scores[0][1]['set']} {shown}" if scores else ""
        return ", ".join(text for text in (self._losses, scored) if text)

    def _of(self, one: StudentRun, number: str) -> str:
        """A number, and whose it is where there are several students."""
        return number if len(self.training) == 1 else f"{one.run.name} {number}"

    def _advise(self, speed: Speed) -> None:
        advice = speed.advice(self._num_workers, self._reads_files)
        if advice is not None:
            self._advised = True
            self.tell(advice)

    def _count(self, wait_s: float) -> None:
        self._num_steps += 1
        if self._num_steps == STEPS_TO_WARM_UP + 1:
            self._whole = self._after_warm_up
        for meter in (self._meter, self._whole):
            meter.add(self.settings.batch_images, wait_s)
        if self._num_steps == STEPS_TO_WARM_UP:
            self.world.wait_for_device()
            self._after_warm_up = Meter()
