"""`dimefm distill`: stage two, from the cache alone, one student after the other."""

from ..cache.durable import write_json
from ..cache.errors import CacheError, InputError
from ..cache.feature_cache import FeatureCache
from ..cache.plan import first_difference
from ..stages.devices import memory_errors_as
from ..stages.run_record import CHECKPOINT
from ..stages.settings import StudentSettings
from ..stages.teacher_identity import configured_identity
from ..stages.train import train_student
from .config import Config
from .progress import RESUMED, bar, say

SOURCE = "source.json"
"""In a run's folder: where its cache and the labelled images are, for `evaluate`."""


def distill(config: Config, names: list[str], stop_after: int | None = None) -> None:
    """Train students from a finished cache; neither the teacher nor the sentences are opened.

    Args:
        names: students to train; none means all of the config.
        stop_after: steps after which each student stops, its checkpoint saved.

    Raises:
        CacheError: if the cache is unfinished or of another teacher than the config's.
        InputError: if a name is not in the config, a mask not in the cache, or an image is gone.
    """
    students = _chosen(config, names)
    cache = FeatureCache.open(config.cache.dir).masked(config.images.mask, config.sentences.mask)
    _require_configured_teacher(config, cache)
    for name, student in students.items():
        run_dir = config.distill.output / name
        say(f"student {name}: {student.model} at {student.image_size} px -> {run_dir}")
        if not (run_dir / CHECKPOINT).exists():  # a run that is refused keeps what it had
            write_json(run_dir / SOURCE, source_document(config))
        too_large = (
            f"student.{name}: a step of distill.batch_images = {config.distill.batch_images} and "
            f"distill.batch_sentences = {config.distill.batch_sentences} does not fit into memory; lower one of them, "
            "or image_size, or choose a smaller model"
        )
        with bar(f"stage two, {name}", 1, "images", RESUMED) as shown, memory_errors_as(too_large):
            result = train_student(
                cache, config.images.source, name, student, config.distill, run_dir, stop_after, shown.update
            )
        write_json(run_dir / SOURCE, source_document(config))
        say(result.line())


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
    difference = first_difference({key: cache.teacher.get(key) for key in wanted}, wanted)
    if difference:
        key, found, asked = difference
        raise CacheError(
            f"{config.cache.dir}: made with teacher.{key} = {found}, but the config asks for {asked}; "
            "choose the cache.dir of that teacher"
        )


def source_document(config: Config) -> dict[str, object]:
    """What `source.json` says."""
    return {
        "cache": str(config.cache.dir),
        "evaluate": {name: str(settings.images) for name, settings in config.evaluate.items()},
    }
