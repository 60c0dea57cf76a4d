"""The table of scores: what `dimefm evaluate` computes and prints.

A new score is a file of this room with one function, and an entry here; docs/scores.md has the recipe. Functions are
imported when they are called: reading the table loads neither torch nor scikit-learn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..settings.plugins import load_function
from .bootstrap import LEVEL

_HERE = __package__


@dataclass(frozen=True)
class Column:
    """A column of a printed table.

    Attributes:
        title: its heading.
        key: where the value stands among the scores of a set, `.` between the keys of nested tables.
        form: of a number, for `format`; a share (`.1%`) is printed in per cent without the sign.
        interval: whether the bounds of `KEY_interval` follow in parentheses.
    """

    title: str
    key: str
    form: str = ".1%"
    interval: bool = False


@dataclass(frozen=True)
class Score:
    """One score of a run on one labelled set.

    Attributes:
        name: key of its result among the scores of a set.
        function: `module:function`, called as `function(inputs=ScoreInputs)`; returns JSON values, or None where there
            is nothing to say.
        setting: key of `[evaluate.NAME]` that turns it on and is its argument; None: every set has this score.
        recorded_as: what `source.json` calls that setting.
        require: `module:function`, called likewise before anything is embedded: raises InputError where the score
            could not be computed later.
        merged: whether its values stand beside those of all scores, rather than in a table of its own name.
        from_outside: whether it was named in `[evaluate.NAME] scores`; its name is then its function.
        columns: what it adds to the table that all scores share; a column without a value in any run is left out.
        table: columns of a table of its own.
        lines: of that table, title -> key: several lines for each set, `*` in the columns' keys standing for the key.
    """

    name: str
    function: str
    setting: str | None = None
    recorded_as: str = ""
    require: str | None = None
    merged: bool = False
    from_outside: bool = False
    columns: tuple[Column, ...] = ()
    table: tuple[Column, ...] = ()
    lines: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Callable[..., dict[str, Any] | None]:
        """Import its function.

        Raises:
            InputError: if it cannot be imported, or takes other arguments.
        """
        return load_function(self.function, ["inputs"])


SCORES = (
    Score(
        "zero_shot",
        f"{_HERE}.zero_shot:zero_shot",
        merged=True,
        table=(
            Column("images", "n", ","),
            Column("unreadable", "unreadable", ","),
            Column("student top-1", "student_top1"),
            Column("top-5", "student_top5"),
            Column("teacher top-1", "teacher_top1"),
            Column("top-5", "teacher_top5"),
            Column("agreement", "agreement"),
            Column("cosine", "cosine", ".3f"),
        ),
        columns=(
            Column(f"top-1, {100 * LEVEL:.0f} %", "student_top1_interval"),
            Column(f"retention, {100 * LEVEL:.0f} %", "retention", interval=True),
            Column("top-1 by teacher's text", "student_top1_teacher_text"),
        ),
    ),
    Score(
        "probe",
        f"{_HERE}.probe:probe",
        setting="probe",
        recorded_as="probes",
        require=f"{_HERE}.probe:require_same_classes",
        columns=(
            Column("probe learns", "probe.fitted_on"),
            Column("k-NN", "probe.knn.student_top1"),
            Column("teacher", "probe.knn.teacher_top1"),
            Column("linear", "probe.linear.student_top1"),
            Column("teacher", "probe.linear.teacher_top1"),
        ),
    ),
    Score(
        "retrieval",
        f"{_HERE}.recall:retrieval",
        setting="captions",
        recorded_as="captions",
        require=f"{_HERE}.recall:require_captions",
        table=(
            Column("captions", "retrieval.captions", ","),
            *(
                Column(f"{who} R@{k}" if k == 1 else f"R@{k}", f"retrieval.*.{who}_r{k}")
                for who in ("student", "teacher")
                for k in (1, 5, 10)
            ),
        ),
        lines={"image to text": "image_to_text", "text to image": "text_to_image"},
    ),
    Score(
        "versus",
        f"{_HERE}.predictions:versus_first_run",
        columns=(Column(f"minus the first, {100 * LEVEL:.0f} %", "versus.student_top1", "+.1%", interval=True),),
    ),
)

FROM_OUTSIDE = "scores"
"""Key of `[evaluate.NAME]`, `source.json` and a set's scores: functions named as `package.module:function`."""


def scores_of(settings: Mapping[str, Any]) -> list[Score]:
    """The scores of a set, those from outside last.

    Args:
        settings: those of `[evaluate.NAME]` that are set.
    """
    own = [score for score in SCORES if score.setting is None or settings.get(score.setting)]
    return own + [Score(spec, spec, from_outside=True) for spec in settings.get(FROM_OUTSIDE, ())]
