"""What `dimefm evaluate` prints: a screenful; `--json` has all of it."""

from pathlib import Path
from typing import Any

Scores = dict[str, dict[str, Any]]
"""For each run's folder, for each set, the scores."""
Item = dict[str, Any]
Table = list[list[str]]

COLUMNS = (
    ("student top-1", "student_top1"),
    ("top-5", "student_top5"),
    ("teacher top-1", "teacher_top1"),
    ("top-5", "teacher_top5"),
    ("agreement", "agreement"),
)


def score_table(scores: Scores) -> str:
    """The scores as plain tables, one line for each run and set; shares in per cent."""
    items = [(Path(run).name, name, item) for run, sets in scores.items() for name, item in sets.items()]
    if not items:
        return "no [evaluate.*] set in the config of these runs: nothing to score"
    tables = [_zero_shot(items), _beyond(items), _retrieval(items)]
    shown = [_laid_out(table) for table in tables if len(table) > 1]
    return "\n\n".join(shown + _notes(items))


def _zero_shot(items: list[tuple[str, str, Item]]) -> Table:
    header = ["run", "set", "images", "unreadable", *(title for title, _ in COLUMNS), "cosine"]
    rows = [
        [
            run,
            name,
            f"{item['n']:,}",
            f"{item['unreadable']:,}",
            *(_percent(item[key]) for _, key in COLUMNS),
            "-" if item["cosine"] is None else f"{item['cosine']:.3f}",
        ]
        for run, name, item in items
    ]
    return [header, *rows]


def _beyond(items: list[tuple[str, str, Item]]) -> Table:
    """How sure the first table is, what neighbours and probes find, and how runs differ; only columns with numbers."""
    level = f"{100 * items[0][2]['bootstrap']['level']:.0f} %"
    header = ["run", "set", f"top-1, {level}", f"retention, {level}"]
    own_text = any("student_top1_teacher_text" in item for _, _, item in items)
    if own_text:
        header += ["top-1 by teacher's text"]
    probes = any("probe" in item for _, _, item in items)
    others = any("versus" in item for _, _, item in items)
    if probes:
        header += ["probe learns", "k-NN", "teacher", "linear", "teacher"]
    if others:
        header += [f"minus the first, {level}"]
    rows = []
    for run, name, item in items:
        row = [run, name, _range(item["student_top1_interval"]), _with_range(item, "retention")]
        if own_text:
            row += [_percent(item.get("student_top1_teacher_text"))]
        probe = item.get("probe")
        if probe:
            row += [probe["fitted_on"]]
            row += [
                _percent(probe[kind][f"{who}_top1"]) for kind in ("knn", "linear") for who in ("student", "teacher")
            ]
        elif probes:
            row += ["-"] * 5
        if others:
            row += [_with_range(item["versus"], "student_top1", "+.1f") if "versus" in item else "-"]
        rows.append(row)
    return [header, *rows]


def _retrieval(items: list[tuple[str, str, Item]]) -> Table:
    """A line for each direction, where sets have captions."""
    recalls = [f"{who}_r{k}" for who in ("student", "teacher") for k in (1, 5, 10)]
    titles = [key.replace("_r", " R@") if key.endswith("_r1") else f"R@{key.rpartition('_r')[2]}" for key in recalls]
    rows = [["run", "set", "retrieval", "captions", *titles]]
    for run, name, item in items:
        found = item.get("retrieval", {})
        rows += [
            [run, name, title, f"{found['captions']:,}", *(_percent(found[direction][key]) for key in recalls)]
            for direction, title in (("image_to_text", "image to text"), ("text_to_image", "text to image"))
            if found
        ]
    return rows


def _notes(items: list[tuple[str, str, Item]]) -> list[str]:
    """What a reader must know to take the tables for what they are."""
    chosen = [f"{run} on {name} (step {item['step']:,})" for run, name, item in items if item.get("chosen_on")]
    if not chosen:
        return []
    return [f"Optimistic, since the step that is scored was chosen on this very set: {', '.join(chosen)}."]


def _percent(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(100 * value, form)  # no image could be read, the teacher is never right


def _range(bounds: list[float] | None, form: str = ".1f") -> str:
    return "-" if bounds is None else f"{_percent(bounds[0], form)} to {_percent(bounds[1], form)}"


def _with_range(item: Item, key: str, form: str = ".1f") -> str:
    value, bounds = item[key], item[f"{key}_interval"]
    return _percent(value, form) if bounds is None else f"{_percent(value, form)} ({_range(bounds, form)})"


def _laid_out(rows: Table) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
