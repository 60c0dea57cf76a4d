"""One run in training: where it stands, its checkpoint, its metrics, and when it must stop."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...cache.disk.durable import write_json
from ...cache.errors import InputError
from ...cache.reader.feature_cache import FeatureCache
from ..inputs.image_source import ImageSource
from ..run_folder.best_weights import BestWeights
from ..run_folder.checkpoint import load_checkpoint
from ..run_folder.metrics_log import MetricsLog
from ..run_folder.run_record import CHECKPOINT, check_same_training, describe_run, read_run_record, write_run_record
from ..score.embed_set import Stopped
from ..settings.distill import DistillSettings
from ..settings.models import StudentSettings
from .dev_scores import DevScores
from .flops import flop_metrics, step_flops
from .processes import World
from .schedule import Schedule
from .speed import Speed
from .step_metrics import FirstNotFinite, read_metrics
from .student import Student
from .targets import Targets

BAD_STEP = "not_finite.json"
"""In a run's folder: the step whose loss was not a finite number, and its rows; of a text tower its texts' too."""

Note = Callable[[str], None]
"""Called with each line that the user should read."""


@dataclass(frozen=True)
class Run:
    """One student to train, and the folder that its run is kept in."""

    name: str
    student: StudentSettings
    folder: Path


@dataclass(frozen=True)
class TrainResult:
    """What one call of `train` did for one student.

    Attributes:
        steps: steps that are done, those of earlier calls included.
        total_steps: steps of the whole run.
        steps_now: steps of this call; 0 if the run was finished already.
        loss: of the last step; NaN if there was none.
        speed: over this call; None if there was no step.
        peak_bytes: most GPU memory in use, or None on the CPU.
        num_parameters: of the student's image tower.
        num_text_parameters: of its text tower, if it has its own.
        best: scores of the best step so far, where this call looked for it.
    """

    run_dir: Path
    steps: int
    total_steps: int
    steps_now: int
    loss: float
    speed: Speed | None
    peak_bytes: int | None
    num_parameters: int
    num_text_parameters: int | None
    best: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        return self.steps == self.total_steps

    def line(self) -> str:
        """One line for the person who started it."""
        if not self.steps_now or self.speed is None:
            return f"{self.run_dir}: nothing to do, {self.steps:,} of {self.total_steps:,} steps are done"
        memory = "" if self.peak_bytes is None else f", {self.peak_bytes / 2**30:.1f} GiB of GPU memory"
        text = "" if self.num_text_parameters is None else f" and {self.num_text_parameters / 1e6:.1f} M (text tower)"
        return (
            f"{self.run_dir}: {self.steps:,} of {self.total_steps:,} steps, loss {self.loss:.4f}, "
            f"{self.num_parameters / 1e6:.1f} M parameters{text}, {self.speed.images_per_s:,.0f} images/s, "
            f"{self.speed.data_wait:.0%} of the time waiting for data{memory}{self._best()}"
        )

    def _best(self) -> str:
        if self.best is None:
            return ""
        return f"; best on {self.best['set']} at step {self.best['step']:,}, {100 * self.best['student_top1']:.1f} %"


class StudentRun:
    """A student in training with the files of its run.

    Attributes:
        student: what learns.
        first_step: steps that were done before.
        end_step: steps after which it stops.
        first_not_finite: watches its losses.
        failure: why it learns no more, or None.
        loss: last known.
    """

    def __init__(
        self,
        run: Run,
        schedule: Schedule,
        cache: FeatureCache,
        pixels: ImageSource,
        settings: DistillSettings,
        world: World,
        stop_after: int | None,
        tell: Note,
    ) -> None:
        """Build the student and bring it to where its run stands."""
        self.run, self._schedule, self._settings, self._world = run, schedule, settings, world
        self.path, self.loss = run.folder / CHECKPOINT, math.nan
        self._log: MetricsLog | None = None
        self._step_flops = 0
        self._best: BestWeights | None = None
        goes_on = _checkpoint_exists(self.path, world)
        width = cache.images.embeddings.shape[-1]
        self.student = Student(
            run.student, settings, width, world, schedule.precision, schedule.logit_scale, fresh=not goes_on
        )
        self._record = record = describe_run(
            cache,
            run.name,
            run.student,
            settings,
            total_steps=schedule.total_steps,
            precision=schedule.precision,
            device=world.device,
            num_processes=world.size,
            pixels=pixels.name,
            order=schedule.order,
            views=schedule.views,
            warm_start=None if self.student.warm is None else self.student.warm.record,
            parameters=self._num_parameters(),
        )
        if goes_on:
            check_same_training(run.folder, read_run_record(run.folder), record)
            self.student.restore(self.path)
        elif world.is_first:
            write_run_record(run.folder, record)
        for line in self.student.notes():
            tell(f"{run.name}: {line}")
        if self.student.warm is not None and (remark := self.student.warm.remark(record["preprocess"])):
            tell(f"{run.name}: {remark}")
        self.failure: str | None = None
        self.first_step = self.student.step
        end = schedule.total_steps if stop_after is None else self.first_step + stop_after
        self.end_step = max(self.first_step, min(schedule.total_steps, end))
        self.first_not_finite = FirstNotFinite(schedule.total_steps, world)

    @property
    def wants_more(self) -> bool:
        return self.failure is None and self.student.step < self.end_step

    def open_log(self) -> None:
        """Go on with the run's files after the steps that are done; the first process writes them."""
        if self._world.is_first:
            self._best = BestWeights(self.run.folder, self.student.step)
            self._log = MetricsLog(self.run.folder, self.student.step)
            self._step_flops = step_flops(self.student, self.run.student.image_size, self._settings)

    def close_log(self) -> None:
        if self._log is not None:
            self._log.close()

    def write_metrics(self, targets: Targets, speed: Speed) -> None:
        """Log the last step; all processes take part."""
        if not self._is_sound():
            return
        step = self.student.step
        values = read_metrics(
            self.student, targets, self._schedule.logit_scale, self._settings.batch_texts, self._world
        )
        self.loss = values["loss"]
        if self._log is not None:
            facts = {"step": step, "epoch": self._schedule.epoch(step), "lr": self._schedule.lr(step - 1)}
            flops = flop_metrics(self._step_flops, speed.step_s, self._schedule.precision, self._world)
            self._log.write({**facts, **values, **asdict(speed), **flops})

    @property
    def last_score(self) -> dict[str, Any] | None:
        """The last line of `scores.jsonl`; None in all processes but the first."""
        return None if self._log is None else self._log.scores

    def score(self, dev: DevScores, stopped: Callable[[], bool] | None = None) -> bool:
        """Score the student after its last step, and keep its weights if they are the best so far.

        All processes take part: the first one scores, the others wait.

        Args:
            stopped: asked between batches, whether to leave this to the run that goes on (`score_if_due`).

        Returns:
            Whether it was left, the same in every process.
        """
        if not self._is_sound(weights_too=True):
            return False
        left = False
        if self._log is not None and self._best is not None:
            try:
                scores = dev.score(self.student, self._record, stopped)
            except Stopped:
                left = True
            else:
                is_best = self._best.offer(scores, *self.student.chosen_weights())
                self._log.write_scores({**scores, "best": is_best})  # after the weights that it is about
        return self._world.as_first(left)

    def score_if_due(self, dev: DevScores) -> None:
        """Score the step that the run goes on from, if it was stopped while that was scored."""
        step, last = self.student.step, self.last_score
        due = self._settings.is_scored(step, self._schedule.total_steps) and (last is None or last["step"] < step)
        if step and self._world.gather_objects(due)[0]:
            self.score(dev)

    def save(self) -> None:
        """Write the checkpoint; all processes take part."""
        if self._is_sound(weights_too=True):
            self.loss = float(self._world.sum(self.student.loss))
            if self._log is not None:
                self._log.sync()
            self.student.save(self.path)
            if self._best is not None:
                self._best.settle()
            if self._world.is_first:
                (self.run.folder / BAD_STEP).unlink(missing_ok=True)  # of an attempt that got no further

    def _is_sound(self, *, weights_too: bool = False) -> bool:
        """Whether loss and weights are numbers; if not, the student learns no more, and nothing of it is written."""
        there = f"the last good checkpoint is {self.path}" if self.path.exists() else "there is no checkpoint before it"
        advice = (
            f"{there}; in another distill.output, lower distill.lr, set distill.clip_grad_norm or take another "
            f'precision (a student with init = "run:{self.run.folder}" begins with what was learned so far)'
        )
        bad = self.first_not_finite.read()
        if bad is not None:
            rows = self._schedule.images.draw(bad).rows.tolist()
            if self._world.is_first:
                of_text = self._schedule.texts if self.student.text is not None else None
                texts = {} if of_text is None else {"sentences": of_text.draw(bad).rows.tolist()}
                write_json(self.run.folder / BAD_STEP, {"step": bad + 1, "rows": rows, **texts})
            shown = ", ".join(map(str, rows[:4])) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
            where = f"rows {shown}, all in {BAD_STEP}"
            self.failure = f"{self.run.folder}: the loss of step {bad + 1} is not finite ({where}); {advice}"
        elif weights_too and not self.student.is_finite():
            step = self.student.step
            self.failure = f"{self.run.folder}: the student's weights are no longer finite at step {step}; {advice}"
        return self.failure is None

    def result(self, speed: Speed | None) -> TrainResult:
        device, step = self._world.device, self.student.step
        return TrainResult(
            self.run.folder,
            steps=step,
            total_steps=self._schedule.total_steps,
            steps_now=step - self.first_step,
            loss=self.loss,
            speed=speed,
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            num_parameters=self.student.image.num_parameters,
            num_text_parameters=self._num_parameters().get("text_tower"),
            best=None if self._best is None else self._best.scores,
        )

    def _num_parameters(self) -> dict[str, int]:
        text = self.student.text
        of_text = {} if text is None else {"text_tower": text.num_parameters}
        return {"image_tower": self.student.image.num_parameters, **of_text}


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run that has all its steps behind it; looked up without building its student."""
    path = folder / CHECKPOINT
    return path.exists() and load_checkpoint(path)["step"] >= read_run_record(folder)["total_steps"]


def _checkpoint_exists(path: Path, world: World) -> bool:
    """Whether a run goes on: what the first process sees counts, and the others must see the same.

    Raises:
        InputError: in every process, if one sees another folder.
    """
    exists = world.gather_objects(path.exists())
    if len(set(exists)) > 1:
        odd = next(rank for rank, one in enumerate(exists) if one != exists[0])
        raise InputError(
            f"{path.parent}: process {odd} does not see what process 0 sees there; distill.output must be the same "
            "folder for all of them"
        )
    return bool(exists[0])
