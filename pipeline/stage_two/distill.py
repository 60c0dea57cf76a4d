"""`dimefm distill`: stage two, from the cache alone: one student after the other, or all from one stream of batches."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from ...cache.disk.durable import write_json
from ...cache.errors import CacheError, InputError
from ...cache.reader.feature_cache import FeatureCache, draws_from_rounded_sizes
from ...cache.version.lock import held
from ...cache.version.plan_file import first_difference
from ...stages.devices import memory_errors_as
from ...stages.inputs.image_source import FILES, ImageSource
from ...stages.inputs.kept_pixels import choose_pixels
from ...stages.inputs.open_source import open_source
from ...stages.models.teacher_identity import configured_identity, recorded_identity
from ...stages.run_folder.run_record import CHECKPOINT, read_run_record
from ...stages.score.embed_set import labelled_set
from ...stages.settings.models import StudentSettings
from ...stages.train.dev_scores import DevScores
from ...stages.train.loop import train
from ...stages.train.processes import World, is_lost_peer, open_world
from ...stages.train.student_run import Run, is_finished
from ..config.load import Config
from ..progress import RESUMED, bar, say
from .class_prompts import cached_set_prompts
from .run_source import SOURCE, source_document

LOCK = "run.lock"
"""In a run's folder: held by the one process that may write there."""


def distill(config: Config, names: list[str], stop_after: int | None = None, *, together: bool = False) -> None:
    """Train students from a finished cache; neither the teacher nor files of sentences are opened.

    Under torchrun every process calls this; the first one talks and writes.

    Args:
        names: students to train; none means all of the config.
        stop_after: steps after which each student stops, its checkpoint saved.
        together: train them from one stream of batches instead of one after the other.

    Raises:
        CacheError: if the cache is unfinished or of another teacher than the config's.
        InputError: if a name is not in the config, a mask or a source of weights not in the cache, or an image is gone.
    """
    students = _chosen(config, names)
    cache = FeatureCache.open(config.cache.dir).masked(config.images.mask, config.sentences.mask)
    cache = cache.weighted(config.images.weights, config.sentences.weights)
    _require_configured_teacher(config, cache)
    runs = [Run(name, student, config.distill.output / name) for name, student in students.items()]
    with open_world(config.distill.device) as world:
        dev = _dev_scores(config, cache, runs, world)
        for group in _groups(runs, together):
            _train(config, cache, _pixels(config, cache, group), dev, group, world, stop_after)


def _groups(runs: list[Run], together: bool) -> list[list[Run]]:
    """Runs that go in one: those that are finished only say so, each for itself."""
    left = [run for run in runs if not is_finished(run.folder)] if together else []
    return [[run] for run in runs if run not in left] + ([left] if left else [])


def _pixels(config: Config, cache: FeatureCache, runs: Sequence[Run]) -> ImageSource:
    """The images that these runs began with, or begin with now."""
    begun = [run.folder for run in runs if (run.folder / CHECKPOINT).exists()]
    began_with = {str(read_run_record(folder).get("pixels", FILES)) for folder in begun}
    if len(began_with) > 1:
        found = " and ".join(sorted(began_with))
        raise InputError(f"--together: these runs began with {found} for pixels; train them one after the other")
    kept = choose_pixels(config.distill.pixels, cache, began_with.pop() if began_with else None)
    return kept or open_source(config.images.source)


def _dev_scores(config: Config, cache: FeatureCache, runs: list[Run], world: World) -> DevScores | None:
    settings = config.distill
    if not settings.evaluate_every:
        return None
    name = settings.evaluate_on
    chosen, workers = config.evaluate[name], world.share_of_cores(settings.workers)
    labelled_set(cache, name)  # refuses a set that is not there
    own_text = any(run.student.own_text is not None for run in runs)
    prompts = cached_set_prompts(cache, name, chosen.templates) if own_text else None
    return DevScores(cache, name, chosen.images, world.device, workers=workers, prompts=prompts)


def _train(
    config: Config,
    cache: FeatureCache,
    pixels: ImageSource,
    dev: DevScores | None,
    runs: Sequence[Run],
    world: World,
    stop_after: int | None,
) -> None:
    tell = say if world.is_first else _keep_quiet
    settings = config.distill
    for run in runs:
        text = "" if run.student.own_text is None else f", text tower of {run.student.own_text}"
        tell(f"student {run.name}: {run.student.model} at {run.student.image_size} px{text} -> {run.folder}")
        if world.is_first and not (run.folder / CHECKPOINT).exists():  # a run that is refused keeps what it had
            write_json(run.folder / SOURCE, source_document(config))
    names = ", ".join(run.name for run in runs)
    too_large = (
        f"{', '.join(f'student.{run.name}' for run in runs)}: a step of distill.batch_images = {settings.batch_images} "
        f"and distill.batch_sentences = {settings.batch_sentences} does not fit into memory; raise distill.accumulate "
        f"(now {settings.accumulate}), lower one of the two, or image_size, or choose a smaller model"
    )
    if settings.views != 0 and pixels.name != FILES and draws_from_rounded_sizes(cache):
        tell(
            f"{config.cache.dir}: its kept pictures are another cache's and do not say what size the originals had: "
            "now and then a replayed crop is not the one that was embedded; distill.pixels = 'files' is exact"
        )
    with ExitStack() as stack:
        if world.is_first:
            for run in runs:
                if not is_finished(run.folder):
                    stack.enter_context(held(run.folder / LOCK, run.folder, "choose another distill.output"))
        shown = stack.enter_context(bar(f"stage two, {names}", 1, "images", RESUMED, shown=world.is_first))
        stack.enter_context(memory_errors_as(too_large))
        stack.enter_context(_lost_peers_as_one_line(world))
        results = train(
            cache, pixels, runs, settings, world, dev=dev, stop_after=stop_after, progress=shown.update, note=tell
        )
    for run, result in zip(runs, results):
        if world.is_first:
            write_json(run.folder / SOURCE, source_document(config))
        tell(result.line())


@contextmanager
def _lost_peers_as_one_line(world: World) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if world.size > 1 and "Expected to have finished reduction" in str(error):
            raise InputError(
                "the student has weights that its output does not depend on, which several processes cannot train; "
                "train it in one, or remove them"
            ) from error
        if world.size > 1 and is_lost_peer(error):
            raise InputError(f"process {world.rank}: another process of this run has ended; it says why") from error
        raise


def _keep_quiet(line: str) -> None:
    """For all processes but the first: each of them would say the same."""


def _chosen(config: Config, names: list[str]) -> dict[str, StudentSettings]:
    known = ", ".join(config.student) or "none"
    for name in names:
        if name not in config.student:
            raise InputError(f"--student {name}: not in the config; it has: {known}")
    if not config.student:
        raise InputError("student: the config names no student; add a table [student.NAME] with model = ...")
    return {name: config.student[name] for name in names or config.student}


def _require_configured_teacher(config: Config, cache: FeatureCache) -> None:
    wanted = configured_identity(config.teacher)
    difference = first_difference(recorded_identity(cache.teacher, wanted), wanted)
    if difference:
        key, found, asked = difference
        raise CacheError(
            f"{config.cache.dir}: made with teacher.{key} = {found}, but the config asks for {asked}; "
            "choose the cache.dir of that teacher"
        )
