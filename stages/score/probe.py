"""What frozen embeddings know of classes when labelled images may be asked: nearest neighbours and a linear probe.

Both fit on one labelled set and are scored on another. Embeddings are compared by direction, as everywhere here: rows
are brought to length one first, so that no number depends on a student's norms.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ...cache.disk.durable import digest, to_json
from ...cache.errors import InputError
from .bootstrap import compared
from .embedded_set import EmbeddedSet
from .metrics import Hits, Labels, Matrix, top_k_hits, unit_rows
from .score_inputs import Memo, ScoreInputs

NEIGHBOURS = 20
NEIGHBOUR_TEMPERATURE = 0.07
HELD_OUT = 0.2
"""Share of each class's fitting images that the regularisation is chosen on."""
MAX_ITERATIONS = 1000
TOLERANCE = 1e-5
"""Largest gradient at which the solver is done."""
_DECADES = (-6.0, 6.0)
_FIRST_STEP, _LAST_STEP = 2.0, 0.125
_COSINES_AT_ONCE = 1 << 23


def knn_scores(
    fitting: Matrix,
    labels: Labels,
    queries: Matrix,
    num_classes: int,
    k: int = NEIGHBOURS,
    temperature: float = NEIGHBOUR_TEMPERATURE,
) -> NDArray[np.float64]:
    """Votes of the k nearest labelled images, each weighted by exp(cosine / temperature).

    Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination (2018), section 3.4; with k = 20
    and temperature 0.07 as in DINO (Caron et al., 2021).

    Args:
        fitting: (F, D) embeddings of any norm, all finite.
        labels: (F,) their classes.
        queries: (N, D) embeddings; a row of NaN gets NaN.
        k: neighbours; all of the fitting images where there are fewer.

    Returns:
        (N, num_classes) shares of the votes, each row's sum 1.

    >>> knn_scores(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 0]), np.array([[2.0, 0.0]]), 2, k=1).tolist()
    [[0.0, 1.0]]
    """
    bank = unit_rows(fitting, np.float64)
    k = min(k, len(bank))
    scores = np.full((len(queries), num_classes), np.nan)
    rows = unit_rows(queries, np.float64)
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1))
    step = max(1, _COSINES_AT_ONCE // len(bank))
    for first in range(0, len(usable), step):
        asked = usable[first : first + step]
        cosines = rows[asked] @ bank.T
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(cosines, nearest, axis=1)
        votes = np.exp((near - near.max(axis=1, keepdims=True)) / temperature)  # the nearest has weight 1: no overflow
        block = np.zeros((len(asked), num_classes))
        np.add.at(block, (np.arange(len(asked))[:, None], labels[nearest]), votes)
        scores[asked] = block / block.sum(axis=1, keepdims=True)
    return scores


@dataclass(frozen=True)
class LinearProbe:
    """A fitted multinomial logistic regression on unit rows.

    Attributes:
        weight: (num_classes, D) float64; zeros for a class that had no image.
        bias: (num_classes,) float64; -inf for a class that had no image.
        c: inverse strength of the L2 penalty that was chosen: scikit-learn's `C`, for rows of length sqrt(D).
        converged: whether the solver reached its tolerance within `MAX_ITERATIONS`.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    c: float
    converged: bool

    def scores(self, queries: Matrix) -> NDArray[np.float64]:
        """(N, num_classes) logits; a row of NaN gets NaN."""
        logits: NDArray[np.float64] = unit_rows(queries, np.float64) @ self.weight.T + self.bias
        return logits


def fit_linear_probe(fitting: Matrix, labels: Labels, num_classes: int, seed: int = 0) -> LinearProbe:
    """Logistic regression on frozen embeddings by L-BFGS, as CLIP's linear probe (Radford et al., 2021, appendix A.3).

    The solver is given the rows less their mean and at length sqrt(D), numbers of about 1, as it likes them: with a
    free bias the first changes nothing of the optimum, and the second only what `C` counts in.

    The L2 strength is chosen on a fifth of each class's fitting images, held out of the fit while it is: from 1e-6 to
    1e6 in steps of two decades, then by halving the step around the best down to an eighth of a decade. Of equal ones
    the stronger penalty wins. Then all fitting images are fitted with it.

    Args:
        fitting: (F, D) embeddings of any norm, all finite.
        labels: (F,) their classes, at least two different ones and one of them with two images.
        seed: of the split.

    Raises:
        ValueError: if there are fewer classes or images than that.
    """
    held = held_out(labels, seed)
    if not held.any() or len(np.unique(labels)) < 2:
        raise ValueError("wanted images of two classes or more, and at least two of one class")
    unit = unit_rows(fitting, np.float64)
    mean, scale = unit.mean(axis=0), np.sqrt(unit.shape[1])
    rows = (unit - mean) * scale
    tried: dict[float, float] = {}
    step, asked = _FIRST_STEP, np.arange(_DECADES[0], _DECADES[1] + _FIRST_STEP, _FIRST_STEP).tolist()
    while True:
        for decade in asked:
            if decade not in tried and _DECADES[0] <= decade <= _DECADES[1]:
                model = _fit(rows[~held], labels[~held], 10.0**decade)[0]
                tried[decade] = float(np.mean(model.predict(rows[held]) == labels[held]))
        decade = max(sorted(tried), key=tried.__getitem__)
        if step <= _LAST_STEP:
            break
        step /= 2
        asked = [decade - step, decade + step]
    model, converged = _fit(rows, labels, 10.0**decade)
    weight, bias = np.zeros((num_classes, rows.shape[1])), np.full(num_classes, -np.inf)
    two = len(model.classes_) == 2  # scikit-learn folds two classes into one row
    weight[model.classes_] = scale * (np.stack([0 * model.coef_[0], model.coef_[0]]) if two else model.coef_)
    bias[model.classes_] = np.array([0.0, model.intercept_[0]]) if two else model.intercept_
    bias -= weight @ mean
    return LinearProbe(weight, bias, 10.0**decade, converged)


def fitted_once(memo: Memo, fitting: Matrix, labels: Labels, num_classes: int) -> LinearProbe:
    """As `fit_linear_probe`, once: several runs share a teacher, and several sets the one whose labels are learned."""
    key = digest(to_json([num_classes, *fitting.shape]), fitting.tobytes(), labels.tobytes())
    probe: LinearProbe = memo.once(("linear probe", key), lambda: fit_linear_probe(fitting, labels, num_classes))
    return probe


def held_out(labels: Labels, seed: int = 0) -> NDArray[np.bool_]:
    """(F,) which fitting images the strength is chosen on: a fifth of each class, rounded up; none of a class of one.

    >>> held_out(np.array([0, 0, 0, 0, 0, 1])).sum()
    np.int64(1)
    """
    numbers = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = int(np.ceil(HELD_OUT * len(members))) if len(members) > 1 else 0
        held[numbers.permutation(members)[:count]] = True
    return held


def _fit(rows: NDArray[np.float64], labels: Labels, c: float) -> tuple[Any, bool]:
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=MAX_ITERATIONS, tol=TOLERANCE)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model.fit(rows, labels)
    return model, not any(issubclass(item.category, ConvergenceWarning) for item in raised)


NEAR_DUPLICATE = 0.999
"""Cosine between the teacher's embeddings above which two images are taken for the same one."""


def probe(inputs: ScoreInputs) -> dict[str, Any]:
    """The score of the table: `probe_scores` on the set, fitted on the one that its setting names."""
    name, fit_name = inputs.name, inputs.settings["probe"]
    inputs.note(f"fitting probes on {fit_name}, for {name}")
    scores = probe_scores(inputs.set, inputs.embedded[fit_name], name, fit_name, inputs.memo)
    if scores["near_duplicates"]:
        inputs.note(
            f"evaluate.{name}.probe: {scores['near_duplicates']:,} of its images are nearly in {fit_name} too "
            "(teacher's cosine of 0.999 or more): neighbours and probe know their answers"
        )
    return scores


def require_same_classes(inputs: ScoreInputs) -> None:
    """Refuse to fit a probe on other classes than it is scored on.

    Raises:
        InputError: naming a class that one set has and the other has not.
    """
    name, fit_name = inputs.name, inputs.settings["probe"]
    scored, fitted_on = (set(inputs.cache.evaluate[one].class_ids) for one in (name, fit_name))
    if scored != fitted_on:
        odd = min(scored ^ fitted_on)
        raise InputError(
            f"evaluate.{name}.probe = {fit_name!r}: class {odd!r} is in {name if odd in scored else fit_name} alone; "
            "wanted a set of the same classes"
        )


def probe_scores(scored: EmbeddedSet, fitted_on: EmbeddedSet, name: str, fit_name: str, memo: Memo) -> dict[str, Any]:
    """Scores on one labelled set of nearest neighbours and of a linear probe that know another one, as JSON values.

    Args:
        scored: the set whose images are classified; nothing is chosen on it.
        fitted_on: a set of the same classes, whose labels are used, unreadable images left out.
        name, fit_name: what the two are called, for errors.
        memo: has the probes that were fitted before.

    Returns:
        `fitted_on`, `fit_images`; `near_duplicates`, scored images that are nearly among them; `knn` and `linear`,
        each with the top-1 accuracy of student and teacher, intervals and retention, and how it was made.

    Raises:
        InputError: if the labelled images are too few to fit on.
    """
    usable, num_classes = fitted_on.readable, len(scored.class_ids)
    labels = fitted_on.labels[usable]
    knn: list[Hits] = []
    linear: list[Hits] = []
    made: dict[str, float | bool] = {}
    try:
        for side in ("student", "teacher"):
            fitting, queries = getattr(fitted_on, side)[usable], getattr(scored, side)
            fitted = fitted_once(memo, fitting, labels, num_classes)
            made |= {f"{side}_c": fitted.c, f"{side}_converged": fitted.converged}
            linear.append(top_k_hits(fitted.scores(queries), scored.labels, 1))
            knn.append(top_k_hits(knn_scores(fitting, labels, queries, num_classes), scored.labels, 1))
    except ValueError as error:
        raise InputError(f"evaluate.{name}.probe: {fit_name} has {len(labels)} readable images: {error}") from error
    rows, others = unit_rows(scored.teacher[scored.readable]), unit_rows(fitted_on.teacher[usable])
    blocks = (rows[first : first + 1024] @ others.T for first in range(0, len(rows), 1024))
    made_knn = {"k": min(NEIGHBOURS, len(labels)), "temperature": NEIGHBOUR_TEMPERATURE}
    return {
        "fitted_on": fit_name,
        "fit_images": len(labels),
        "near_duplicates": sum(int((block.max(axis=1) >= NEAR_DUPLICATE).sum()) for block in blocks),
        "knn": {**compared("top1", *knn), **made_knn},
        "linear": {**compared("top1", *linear), **made},
    }
