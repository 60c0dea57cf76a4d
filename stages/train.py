"""Stage two: trains students from the cache and the images. No teacher, no text tower, no sentence is read."""

from collections.abc import Callable, Sequence

from ..cache.errors import InputError
from ..cache.feature_cache import FeatureCache
from .augment import ViewMaker
from .batches import BatchLoader, normalise
from .counter_random import key_of
from .device_feed import on_device
from .interrupt import Interrupted, StopSignals
from .kept_pixels import FILES
from .learner import Targets
from .meter import Meter, Speed
from .pixel_source import PixelSource
from .schedule import Schedule
from .settings import DistillSettings
from .student_run import Note, Run, StudentRun, TrainResult
from .world import World

Progress = Callable[[int, int, str], None]
"""Told after every step: images done, images of the whole run, how it goes."""


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
    first, end = min(one.learner.step for one in training), max(one.end_step for one in training)
    whole, meter, ballot = Meter(), Meter(), world.ballot()
    text, advised, stopped = "", False, False
    for one in training:
        one.open_log()
    try:
        with StopSignals(patient=world.size > 1) as stop, loader:
            for batch in on_device(loader.batches(first, end), world.device):
                targets = Targets(batch.targets, batch.sentences, batch.bank, world)
                inputs = {size: normalise(view, schedule.mean, schedule.std) for size, view in zip(sizes, batch.images)}
                # One that is ahead of the others waits for them.
                here = [one for one in training if one.wants_more and one.learner.step == batch.step]
                for one in here:
                    one.learner.learn(inputs[one.run.student.image_size], targets, schedule.lr(batch.step))
                    one.first_bad.look(batch.step, one.learner.loss)

                # Nothing above waits for a GPU; what follows does, now and then.
                step = batch.step + 1
                for counted in (meter, whole):
                    counted.add(settings.batch_images, batch.wait_s)
                if step % settings.log_every == 0 or step == schedule.total_steps:
                    for one in here:
                        one.write_metrics(targets, meter.read())
                    text = "loss " + ", ".join(f"{one.loss:.4f}" for one in here)
                    advice = meter.read().advice(loader.num_workers, pixels.name == FILES)
                    if advice and not advised and step > first + 10:  # the first steps wait for the workers to start
                        tell(advice)
                        advised = True
                    meter = Meter()
                stopped = ballot.stops(stop.asked)
                if progress is not None:
                    progress(step * settings.batch_images, schedule.total_steps * settings.batch_images, text)
                for one in here:
                    if step % settings.checkpoint_every == 0 or step == one.end_step or stopped:
                        one.save()
                if stopped or not any(one.wants_more for one in training):
                    break
            if stopped or stop.asked:
                raise Interrupted(f"interrupted: state saved at step {step} of {schedule.total_steps}")
    finally:
        for one in training:
            one.close_log()
    return whole.read()
