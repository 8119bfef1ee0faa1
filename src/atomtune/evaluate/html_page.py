"""Page: the report as one HTML file that opens from disk, loads nothing and runs no script.

Texts of records are escaped, and the page's policy allows no scripts, so a script in a record is shown as text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from atomtune.evaluate.intervals import Figure
from atomtune.evaluate.metrics import Metric, judged
from atomtune.evaluate.report import Report, interval, score_text, shown, used_metrics
from atomtune.pages import rendered

#: Width of a drawing of intervals, in its own units.
WIDTH = 240


@dataclass(frozen=True)
class Cell:
    """One model's figure: its text, its place in the drawing, and whether it is better than the base's."""

    text: str
    interval: str
    left: float
    right: float
    at: float
    verdict: str


def page(report: Report) -> str:
    """The report as HTML."""
    metrics = used_metrics(report)
    return rendered(
        "evaluate",
        "page.html.jinja",
        report=report,
        names=list(report.models),
        rows=[(metric, list(zip(report.models, cells_of(report, metric), strict=True))) for metric in metrics],
        score_text=score_text,
        width=WIDTH,
    )


def cells_of(report: Report, metric: Metric) -> list[Cell | None]:
    """A metric of every model, drawn on one scale; None for a model without this figure."""
    figures = [own.get(metric.name) for own in report.models.values()]
    ends = [end for figure in figures if figure is not None for end in _ends(figure)]
    # The perplexity of a model that has diverged may be infinite; it is drawn at the end of the others' scale.
    finite = [end for end in ends if math.isfinite(end)] or [0.0]
    low, high = min(finite), max(finite)
    span = high - low or 1.0

    def place(value: float) -> float:
        return 6 + (WIDTH - 12) * min(max((value - low) / span, 0.0), 1.0)

    cells: list[Cell | None] = []
    for name, figure in zip(report.models, figures, strict=True):
        cells.append(None if figure is None else _cell(metric, figure, report.changes.get(name, {}), place))
    return cells


def _ends(figure: Figure) -> tuple[float, float]:
    """Where its line begins and ends; a single record has no line, only a point."""
    return (figure.low, figure.high) if figure.has_interval else (figure.value, figure.value)


def _cell(metric: Metric, figure: Figure, changes: dict[str, Figure], place: Callable[[float], float]) -> Cell:
    change = changes.get(metric.name)
    left, right = _ends(figure)
    return Cell(
        text=shown(metric, figure.value),
        interval=interval(metric, figure),
        left=place(left),
        right=place(right),
        at=place(figure.value),
        verdict="" if change is None else judged(metric, change),
    )
