"""Stage two: trains students from the cache and the images. No teacher, no text tower, no sentence is read."""

from collections.abc import Callable, Sequence
from contextlib import closing

from ..cache.errors import InputError
from ..cache.feature_cache import FeatureCache
from .augment import ViewMaker
from .batches import Batch, BatchLoader, normalise
from .counter_random import key_of
from .device_feed import on_device
from .distill_settings import DistillSettings
from .interrupt import Interrupted, StopSignals
from .kept_pixels import FILES
from .meter import Meter, Speed
from .pixel_source import PixelSource
from .schedule import Schedule
from .student_run import Note, Run, StudentRun, TrainResult
from .targets import Targets
from .world import World

Progress = Callable[[int, int, str], None]
"""Told after every step: images done, images of the whole run, how it goes."""


STEPS_TO_WARM_UP = 3
"""First steps of a call that its speed leaves out, if there are more: workers start, a student is compiled."""


def train(
    cache: FeatureCache,
    pixels: PixelSource,
    runs: Sequence[Run],
    settings: DistillSettings,
    world: World,
    *,
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
            `tensorboard/`.
        world: this process and the others of the run, which all call this with the same arguments.
        stop_after: steps of this call at most; the learning rate still follows the whole run's schedule.

    Raises:
        InputError: for settings that the cache cannot serve, a run of other settings in a folder, an unreadable image
            or a loss that is not finite (the other students go on to their end first).
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    schedule = Schedule(cache, settings, world)
    tell: Note = note if note is not None and world.is_first else lambda line: None
    training = [StudentRun(run, schedule, cache, pixels, settings, world, stop_after, tell) for run in runs]
    unfinished = [one for one in training if one.wants_more]
    speed = _learn(unfinished, schedule, cache, pixels, settings, world, progress, tell) if unfinished else None
    if failures := [one.failure for one in training if one.failure]:
        raise InputError("; ".join(failures))
    return [one.result(speed) for one in training]


def _learn(
    training: list[StudentRun],
    schedule: Schedule,
    cache: FeatureCache,
    pixels: PixelSource,
    settings: DistillSettings,
    world: World,
    progress: Progress | None,
    tell: Note,
) -> Speed:
    """The loop over steps: each batch goes to every student that stands at its step."""
    pixels.require()
    sizes = sorted({one.run.student.image_size for one in training})
    images, sentences = schedule.share("images"), schedule.share("sentences")
    assert images is not None
    loader = BatchLoader(
        cache.images,
        images,
        pixels,
        [ViewMaker(settings.augment, size, schedule.resample) for size in sizes],
        view_key=key_of(settings.seed, "views"),
        sentences=None if sentences is None else (cache.sentences, sentences),
        bank=schedule.share("bank"),
        workers=world.share_of_cores(settings.workers),
        pin_memory=world.device.type == "cuda",
    )

    def advise(speed: Speed) -> bool:
        advice = speed.advice(loader.num_workers, pixels.name == FILES)
        if advice is not None:
            tell(advice)
        return advice is not None

    loop = _Loop(training, sizes, schedule, settings, world, progress, advise)
    for one in training:
        one.open_log()
    try:
        with StopSignals(patient=world.size > 1) as stop, loader:
            while behind := [one for one in training if one.wants_more]:
                first = min(one.learner.step for one in behind)
                # To the next that waits ahead: should all others break, nobody needs the batches before it.
                until = [one.learner.step for one in behind if one.learner.step > first]
                until += [one.end_step for one in behind if one.learner.step == first]
                with closing(on_device(loader.batches(first, min(until)), world.device)) as batches:
                    for batch in batches:
                        loop.step(batch, stop)
                        if loop.stopped or not any(one.wants_more and one.learner.step > batch.step for one in behind):
                            break
                if loop.stopped:
                    break
            if (loop.stopped or stop.asked) and not any(one.failure for one in training):
                at = min(one.learner.step for one in training)
                raise Interrupted(f"interrupted: state saved at step {at} of {schedule.total_steps}")
    finally:
        for one in training:
            one.close_log()
    return loop.whole.read()


class _Loop:
    """What a step does, and what is counted over steps."""

    def __init__(
        self,
        training: list[StudentRun],
        sizes: list[int],
        schedule: Schedule,
        settings: DistillSettings,
        world: World,
        progress: Progress | None,
        advise: Callable[[Speed], bool],
    ) -> None:
        self._training, self._sizes, self._schedule, self._settings = training, sizes, schedule, settings
        self._world, self._progress, self._advise = world, progress, advise
        self._ballot, self._text, self._num_steps, self._advised = world.ballot(), "", 0, False
        self._meter, self._after_warm_up, self.whole, self.stopped = Meter(), Meter(), Meter(), False

    def step(self, batch: Batch, stop: StopSignals) -> None:
        """One batch, to every student that stands at its step; one that is ahead of the others waits for them."""
        schedule, settings = self._schedule, self._settings
        targets = Targets(
            batch.targets, batch.sentences, batch.bank, self._world, batch.sentence_cosines, batch.sampling
        )
        inputs = {size: normalise(view, schedule.mean, schedule.std) for size, view in zip(self._sizes, batch.images)}
        here = [one for one in self._training if one.wants_more and one.learner.step == batch.step]
        for one in here:
            one.learner.learn(inputs[one.run.student.image_size], targets, schedule.lr(batch.step))
            one.first_bad.look(batch.step, one.learner.loss)

        # Nothing above waits for a GPU; what follows does, now and then.
        step = batch.step + 1
        self._count(batch.wait_s)
        if step % settings.log_every == 0 or step == schedule.total_steps:
            self._world.wait_for_device()  # what is still on its way belongs to the steps that are counted
            speed, self._meter = self._meter.read(), Meter()
            for one in here:
                one.write_metrics(targets, speed)
            self._text = "loss " + ", ".join(f"{one.loss:.4f}" for one in here)
            if not self._advised and self._num_steps > 2 * STEPS_TO_WARM_UP:
                self._advised = self._advise(speed)
        self.stopped = self._ballot.stops(stop.asked)
        if self._progress is not None:
            self._progress(step * settings.batch_images, schedule.total_steps * settings.batch_images, self._text)
        for one in here:
            if step % settings.checkpoint_every == 0 or step == one.end_step or self.stopped:
                one.save()

    def _count(self, wait_s: float) -> None:
        self._num_steps += 1
        if self._num_steps == STEPS_TO_WARM_UP + 1:
            self.whole = self._after_warm_up
        for meter in (self._meter, self.whole):
            meter.add(self._settings.batch_images, wait_s)
        if self._num_steps == STEPS_TO_WARM_UP:
            self._world.wait_for_device()
            self._after_warm_up = Meter()
