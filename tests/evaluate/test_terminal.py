"""The figures on a terminal: none is cut off or broken in two."""

import re

import pytest
from rich.cells import cell_len

from atomtune.console import Console
from atomtune.evaluate.account import Account
from atomtune.evaluate.intervals import Figure
from atomtune.evaluate.metrics import NATS, PROBE
from atomtune.evaluate.report import Report
from atomtune.evaluate.terminal import say_report
from atomtune.language import spoken


def report_of(*names: str) -> Report:
    """A report on these models, with their loss on the records and on the probe."""
    figures = {name: Figure(1.5, 1.0, 2.0) for name in (NATS.name, PROBE.name)}
    account = Account(6, (), {}, (), "alpaca", 64, held_out=False)
    return Report("base", [], 6, 6, dict.fromkeys(names, figures), {}, [], 8, False, {}, account, {})


def test_a_long_table_title_is_wrapped_and_not_truncated(tmp_path, capsys, monkeypatch):
    """Chinese has no spaces. Regression: with three models the probe's title was cut to “…”, and lost its meaning."""
    monkeypatch.setenv("COLUMNS", "80")
    with spoken("zh"):
        say_report(report_of("base", "out", "checkpoint-360"), Console())
    assert "…" not in capsys.readouterr().out


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("names", [("base",), ("base", "out"), ("base", "out", "checkpoint-360")])
def test_a_figure_stays_on_one_line_on_narrow_terminals(names, language, capsys, monkeypatch):
    """Regression: at 40 columns `(1.00–2.00)` was broken in two, and a row took three lines."""
    for columns in range(40, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        with spoken(language):
            say_report(report_of(*names), Console())
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.count("1.50 (1.00–2.00)") for line in lines) == 2 * len(names)
        assert all(cell_len(line) <= columns for line in lines)
        assert all(any(re.search(rf"\b{name}\b", line) for line in lines) for name in names)


def test_a_terminal_of_80_columns_gets_a_table(capsys, monkeypatch):
    for columns, is_table in ((40, False), (80, True), (200, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        say_report(report_of("base", "out", "checkpoint-360"), Console())
        assert ("┃" in capsys.readouterr().out) is is_table
