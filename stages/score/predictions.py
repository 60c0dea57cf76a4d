"""Which class was chosen for each image, `RUN/predictions/<set>.parquet`: what holds runs against each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ...cache.disk.durable import make_folder, replacing
from .bootstrap import paired_interval
from .embedded_set import EmbeddedSet
from .score_inputs import ScoreInputs


def versus_first_run(inputs: ScoreInputs) -> dict[str, Any] | None:
    """The score of the table: the run against the first one of the call; None of that one, or of other images."""
    first, baselines = inputs.memo.once("predictions of the first run", lambda: (inputs.run, {}))
    mine = zero_shot_predictions(inputs.set)
    if inputs.run == first:
        baselines[inputs.name] = mine
        return None
    difference = versus(mine, baselines[inputs.name]) if inputs.name in baselines else None
    return difference and {"run": str(first), **difference}


COLUMNS = pa.schema([(name, pa.string()) for name in ("source", "class_id", "student", "teacher")])


def zero_shot_predictions(embedded: EmbeddedSet) -> pa.Table:
    """One row for each image: `source`, its true `class_id`, and the class that `student` and `teacher` chose.

    The last two are null for an image that could not be read.
    """
    ids = np.array(embedded.class_ids, dtype=object)
    chosen = [pa.array(ids[logits.argmax(axis=1)], mask=~embedded.readable) for logits in embedded.logits()]
    return pa.table([list(embedded.sources), ids[embedded.labels], *chosen], schema=COLUMNS)


def write_predictions(path: Path, predictions: pa.Table) -> None:
    """Write a table of predictions durably."""
    make_folder(path.parent)
    with replacing(path) as partial:
        pq.write_table(predictions, partial)


def hits(predictions: pa.Table, model: str = "student") -> NDArray[np.bool_]:
    """(N,) for which images `student`, or `teacher`, chose the true class.

    >>> table = pa.table({"class_id": ["a", "b", "a"], "student": ["a", "a", None]})
    >>> hits(table).tolist()
    [True, False, False]
    """
    right = pc.equal(predictions.column(model), predictions.column("class_id"))
    return np.asarray(pc.fill_null(right, False), dtype=np.bool_)


def versus(run: pa.Table, baseline: pa.Table) -> dict[str, Any] | None:
    """Zero-shot top-1 of one student less that of another, with an interval that is paired over the images.

    Args:
        run, baseline: predictions of the two.

    Returns:
        `student_top1` and `student_top1_interval`, as JSON values; None if these are not the same images and classes.

    >>> one = pa.table({"source": ["x", "y"], "class_id": ["a", "b"], "student": ["a", "b"]})
    >>> versus(one, one)
    {'student_top1': 0.0, 'student_top1_interval': [0.0, 0.0]}
    """
    if not all(run.column(name).equals(baseline.column(name)) for name in ("source", "class_id")):
        return None
    mine, others = hits(run), hits(baseline)
    difference = float(mine.mean() - others.mean())
    return {"student_top1": difference, "student_top1_interval": list(paired_interval(mine, others))}
