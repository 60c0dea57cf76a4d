"""`dimefm distill`: stage two, from the cache alone, one student after the other."""

from ..cache.durable import write_json
from ..cache.errors import CacheError, InputError
from ..cache.feature_cache import FeatureCache
from ..cache.plan import first_difference
from ..stages.settings import StudentSettings
from ..stages.teacher_identity import configured_identity
from ..stages.train import TrainResult, train_student
from .config import Config
from .progress import bar, say

SOURCE = "source.json"
"""In a run's folder: where its cache and the labelled images are, for `evaluate`."""


def distill(config: Config, names: list[str], stop_after: int | None = None) -> None:
    """Train students from a finished cache; neither the teacher nor the sentences are opened.

    Args:
        names: students to train; none means all of the config.
        stop_after: steps after which each student stops, its checkpoint saved.

    Raises:
        CacheError: if the cache is unfinished or of another teacher than the config's.
        InputError: if a name is not in the config, or an image is gone.
    """
    students = _chosen(config, names)
    cache = FeatureCache.open(config.cache.dir)
    _require_configured_teacher(config, cache)
    for name, student in students.items():
        run_dir = config.distill.output / name
        say(f"student {name}: {student.model} at {student.image_size} px -> {run_dir}")
        write_json(run_dir / SOURCE, _source(config))
        with bar(f"stage two, {name}", 1, "steps") as shown:
            result = train_student(
                cache, config.images.source, name, student, config.distill, run_dir, stop_after, shown
            )
        say(_line(name, result))


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


def _line(name: str, result: TrainResult) -> str:
    if not result.steps_now:
        return f"student {name}: finished at step {result.steps:,}; nothing to do"
    line = (
        f"student {name}: {result.num_parameters:,} parameters, step {result.steps:,} of {result.total_steps:,}, "
        f"loss {result.loss:.4f}, {result.images_per_s:,.0f} images/s, {100 * result.data_wait:.0f} % waiting for data"
    )
    return line if result.peak_bytes is None else f"{line}, {result.peak_bytes / 1e9:.1f} GB of GPU memory"


def _source(config: Config) -> dict[str, object]:
    return {
        "cache": str(config.cache.dir),
        "evaluate": {name: str(settings.images) for name, settings in config.evaluate.items()},
    }
