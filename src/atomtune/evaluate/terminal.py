"""Terminal: the figures of an evaluation as a table, or as lines where a table has no room."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table

from atomtune.console import Console
from atomtune.evaluate.report import Report, metric_text, score_text, used_metrics
from atomtune.language import translated

#: A terminal of this many columns or more always gets a table.
NARROWEST_FOR_TABLES = 80


def say_report(report: Report, console: Console) -> None:
    """The figures, and what they say."""
    title = f"{report.records:,} records; the 95 % interval in brackets"
    if report.records == 1:
        title = "1 record: no interval can be given"
    names = list(report.models)
    rows = _rows(report)
    if _has_room(names, rows, console.width):
        console.print(_table(translated(title), names, rows))
    else:
        console.say(title)
        for heading, figures in rows:
            console.say(heading)
            console.columns(list(zip(names, figures, strict=True)))
    for sentence in report.sentences(translated):
        console.say(sentence)


def _rows(report: Report) -> list[tuple[str, list[str]]]:
    """What was measured, in the language that is spoken, and the figure of each model; a dash where it has none."""
    rows: list[tuple[str, list[str]]] = []
    for metric in used_metrics(report):
        rows.append((translated(metric.title), [metric_text(report, model, metric) for model in report.models]))
    for name in report.lm_eval_names:
        heading = translated(f"lm-eval {name} (± standard error)")
        rows.append((heading, [score_text(report, model, name) for model in report.models]))
    return rows


def _has_room(names: Sequence[str], rows: Sequence[tuple[str, list[str]]], width: int) -> bool:
    """Whether a terminal has room for a table whose figures are on one line each; one of 80 columns always gets one.

    rich makes the column of headings as narrow as the widest column of figures before it breaks a figure in two.
    """
    if width >= NARROWEST_FOR_TABLES:
        return True
    headings = max(cell_len(heading) for heading, _ in rows)
    figures = [max(map(cell_len, column)) for column in zip(names, *(cells for _, cells in rows), strict=True)]
    lines = 3 * (1 + len(names)) + 1  # between the columns, with a space on both sides
    return min(headings, max(figures)) + sum(figures) + lines <= width


def _table(title: str, names: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")  # Chinese has no spaces, and rich cuts what is longer than its column
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for heading, figures in rows:
        table.add_row(heading, *figures)
    return table
