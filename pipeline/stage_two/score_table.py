"""What `dimefm evaluate` prints: a screenful; `--json` has all of it. The columns are those of the table of scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...stages.run_folder.run_record import flat
from ...stages.score.scores import FROM_OUTSIDE, SCORES, Column

Scores = dict[str, dict[str, Any]]
"""For each run's folder, for each set, the scores."""
Line = tuple[list[str], dict[str, Any]]
"""The first cells of a line, and what the others show: the scores of its set by their keys, joined by dots."""
_NO_FOLDING = 10_000
"""Characters of a line: a table is as wide as it must be, so that its lines can be searched and cut."""


def score_table(scores: Scores) -> str:
    """The scores as plain tables, one line for each run and set; shares in per cent."""
    items = [(Path(run).name, name, item) for run, sets in scores.items() for name, item in sets.items()]
    if not items:
        return "no [evaluate.*] set in the config of these runs: nothing to score"
    lines: list[Line] = [([run, name], dict(flat(item))) for run, name, item in items]
    shared = [column for score in SCORES for column in score.columns]
    tables = [_table([], columns, lines) for columns in (*(s.table for s in SCORES if not s.lines), shared)]
    for score in SCORES:
        begin = f"{score.name}."
        several = [
            ([*cells, title], {name.replace(f"{begin}{key}.", f"{begin}*."): value for name, value in values.items()})
            for cells, values in lines
            for title, key in score.lines.items()
            if any(name.startswith(begin) for name in values)
        ]
        tables.append(_table([score.name], score.table, several))
    tables.append(_from_outside(items))
    shown = [_printed(table) for table in tables if table.row_count and len(table.columns) > 2]
    return "\n\n".join(shown + _notes(items))


def _table(titles: list[str], columns: Sequence[Column], lines: list[Line]) -> Table:
    """A column that has no value in any line is left out."""
    shown = [column for column in columns if any(column.key in values for _, values in lines)]
    rows = [[*cells, *(_cell(values, column) for column in shown)] for cells, values in lines]
    return _laid_out([*titles, *(column.title for column in shown)], rows)


def _from_outside(items: list[tuple[str, str, dict[str, Any]]]) -> Table:
    """One line for each number or text of a score that is not of this package."""
    rows = [
        [run, name, spec, key, _text(value, ".4g")]
        for run, name, item in items
        for spec, found in item.get(FROM_OUTSIDE, {}).items()
        for key, value in flat(found)
        if isinstance(value, int | float | str)
    ]
    return _laid_out(["score", "key", "value"], rows)


def _laid_out(titles: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("run", "set", *titles):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _printed(table: Table) -> str:
    console = Console(color_system=None, width=_NO_FOLDING, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def _cell(values: dict[str, Any], column: Column) -> str:
    text = _text(values.get(column.key), column.form)
    bounds = values.get(f"{column.key}_interval") if column.interval else None
    return text if bounds is None else f"{text} ({_text(bounds, column.form)})"


def _text(value: Any, form: str) -> str:
    if value is None:
        return "-"  # no image could be read, the teacher is never right
    if isinstance(value, list):
        return " to ".join(_text(bound, form) for bound in value)
    return value if isinstance(value, str) else format(value, form).rstrip("%")


def _notes(items: list[tuple[str, str, dict[str, Any]]]) -> list[str]:
    """What a reader must know to take the tables for what they are."""
    chosen = [f"{run} on {name} (step {item['step']:,})" for run, name, item in items if item.get("chosen_on")]
    if not chosen:
        return []
    return [f"Optimistic, since the step that is scored was chosen on this very set: {', '.join(chosen)}."]
