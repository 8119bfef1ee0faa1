"""Terminal: what inspect found, printed section by section.

No text of a record stands here, only origins and numbers; the samples come after it.
"""

from collections.abc import Iterator, Mapping

import numpy
from numpy.typing import NDArray
from rich.table import Table

from atomtune.analysis.unicode_scripts import SCRIPTS
from atomtune.console import Console
from atomtune.data.ledger import Ledger
from atomtune.data.records import RefusalKind
from atomtune.inspect.checks import MEANINGS, Finding
from atomtune.inspect.histogram import Bar, Limit, histogram, percentiles
from atomtune.inspect.report import Report

#: Origins that stand beside a problem.
_SHOWN = 3
_BAR_WIDTH = 40


def say_report(report: Report, console: Console) -> None:
    """Print all of it, section by section."""

    say = console.say
    ledger = report.ledger
    say(f"{', '.join(report.sources)}", "bold")
    template = report.template
    for note in report.notes:
        say(f"note: {note}", "yellow")
    say(f"read as {ledger.format or 'nothing'}; template {template.name}, an answer stops at {template.stop}")
    thoughts = template.about_thoughts(ledger.records_used, ledger.records_with_thoughts)
    if thoughts:
        say(f"note: {thoughts}", "" if ledger.records_with_thoughts else "yellow")
    if template.why:
        say(f"note: {template.why}", "yellow")
    if template.unknown_controls:
        say(f"note: {', '.join(template.unknown_controls)} of this template are text to this tokenizer", "yellow")
    _section(console, "Ledger")
    for line in ledger_lines(ledger):
        say(f"  {line}")
    for notice, count in ledger.notices.items():
        say(f"  note: {notice} in {counted(count, 'record')}", "yellow")
    if len(report.stored):  # else every record was refused, and there is nothing to count
        _say_numbers(report, console)
    _section(console, "Problems")
    for line in check_lines(report):
        say(f"  {line}")
    say("")


def _say_numbers(report: Report, console: Console) -> None:
    """Lengths, what shortening would cost, what the layouts save, and the scripts."""
    say = console.say
    _section(console, "Lengths, in tokens")
    console.print(_lengths({"read only, a record": report.tokens.read, "learned, an answer": report.tokens.answers}))
    for title, values in (("read only, a record", report.tokens.read), ("learned, an answer", report.tokens.answers)):
        say(f"  {title}", "bold")
        for bar in _bars(histogram(values)):
            say(f"  {bar}")
    _section(console, f"--max_seq_length {report.max_tokens:,}")
    for line in limits(report):
        say(f"  {line}")
    _section(console, "Shared beginnings")
    for line in savings(report):
        say(f"  {line}")
    _section(console, "Writing")
    shares = ", ".join(f"{name} {share:.1%}" for name, share in scripts(report))
    say(f"  {shares} of all letters" if shares else "  no letters")


def ledger_lines(ledger: Ledger) -> Iterator[str]:
    """The sums that must hold, as sums."""
    refused, tokens = len(ledger.records_refused), ledger.target_tokens + ledger.target_tokens_refused
    yield (
        f"records        {ledger.records_read:,} read = {ledger.records_used:,} used + {refused:,} refused"
        f"; {ledger.records_cut:,} of the used are shortened"
    )
    yield (
        f"target tokens  {tokens:,} read = {ledger.target_tokens:,} used + {ledger.target_tokens_refused:,} refused"
        "; none is cut"
    )
    yield f"prompt tokens  {ledger.prompt_tokens:,} used; {ledger.prompt_tokens_cut:,} cut away"
    if ledger.records_split:
        split = _learned_in_parts(ledger.records_split)
        yield f"examples       {ledger.examples:,}: {split}, as a server would send them"


def _learned_in_parts(conversations: int) -> str:
    verb = "is" if conversations == 1 else "are"
    return f"{counted(conversations, 'conversation')} {verb} learned in several parts"


def limits(report: Report) -> Iterator[str]:
    """What the asked length costs, and which ones to ask for instead."""
    if not report.limits:
        return
    asked, nothing, little = report.limits
    ledger, total = report.ledger, report.ledger.records_read
    if asked.records:
        refused = len(ledger.refused_as(RefusalKind.TOO_LONG))
        yield _cost(asked, total)
        cut = f"{ledger.records_cut:,} shortened, by {ledger.prompt_tokens_cut:,} prompt tokens"
        yield f"so {cut}, and {refused:,} refused"
    else:
        yield "no record is longer"
    yield f"suggested: {nothing.tokens:,}, {_cost(nothing, total)}"
    if little.tokens < nothing.tokens:
        yield f"       or: {little.tokens:,}, {_cost(little, total)}"


def _cost(limit: Limit, total: int) -> str:
    if not limit.records:
        return "shortens nothing"
    longer = f"{counted(limit.records, 'record')} longer ({limit.records / max(1, total):.2%})"
    return f"{longer}, by {counted(limit.lost, 'token')} together"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def savings(report: Report) -> Iterator[str]:
    """What each layout computes, as the run will choose among them."""
    saving = report.saving
    if saving is None:
        return
    what = f"{saving.batches:,} batch{'es' * (saving.batches != 1)} of {saving.records_per_batch}"
    if saving.shared_prefix:
        yield f"all records sampled begin with the same {len(saving.shared_prefix):,} tokens"
    else:
        yield "there is none that all records sampled have"
    yield f"padded  {saving.tokens.padded:>12,} tokens computed for {what}"
    for name, tokens in (("packed", saving.tokens.packed), ("tree", saving.tokens.tree)):
        less = saving.tokens.padded / tokens
        yield f"{name:<7} {tokens:>12,}  {f'{less:.2f}× less' if less >= 1 else f'{1 / less:.2f}× more'}"


def scripts(report: Report) -> list[tuple[str, float]]:
    """Each script's share of all letters, the largest first."""
    letters = report.texts.letters
    total = letters.sum()
    shares = [(name, float(count / total)) for name, count in zip(SCRIPTS, letters, strict=True) if count]
    return sorted(shares, key=lambda name_and_share: -name_and_share[1])


def _section(console: Console, title: str) -> None:
    console.say(f"\n{title}", "bold cyan")


def _lengths(columns: Mapping[str, NDArray[numpy.int32]]) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("")
    for name in ("median", "90 %", "99 %", "longest"):
        table.add_column(name, justify="right")
    for title, values in columns.items():
        table.add_row(title, *(f"{value:,}" for value in percentiles(values).values()))
    return table


def _bars(bars: list[Bar]) -> Iterator[str]:
    """The bars as lines, from the first that holds something on."""
    bars = bars[next((number for number, bar in enumerate(bars) if bar.count), 0) :]
    most = max((bar.count for bar in bars), default=0)
    width = max((len(_range(bar)) for bar in bars), default=0)
    for bar in bars:
        eighths = -(-bar.count * _BAR_WIDTH * 8 // max(1, most))
        blocks = "█" * (eighths // 8) + "▏▎▍▌▋▊▉"[eighths % 8 - 1 : eighths % 8]
        yield f"  {_range(bar):>{width}}  {blocks} {bar.count:,}"


def _range(bar: Bar) -> str:
    return f"{bar.low:,}" if bar.low == bar.high else f"{bar.low:,}–{bar.high:,}"


def check_lines(report: Report) -> Iterator[str]:
    """A line for each check that found something, and one for all that found nothing."""
    read = max(1, report.ledger.records_read)
    for check, finding in report.findings.items():
        if finding.count:
            groups = f"; {counted(finding.groups, 'group')}" if finding.groups else ""
            yield f"{check:<16}{finding.count:>8,}  {finding.count / read:>7.2%}  {MEANINGS[check]}{groups}"
            for place in _places(report, finding):
                yield f"{'':<35}{place}"
    nothing = [check for check, finding in report.findings.items() if not finding.count]
    if nothing:
        yield f"nothing found by: {', '.join(nothing)}"


def _places(report: Report, finding: Finding) -> Iterator[str]:
    """Where a problem is, on one line; a refused record with its reason, on a line of its own."""
    if finding.check != "refused":
        origins = [report.origin(int(row)) for row in finding.rows[:_SHOWN]]
        yield ", ".join(origins) + (" …" if finding.count > len(origins) > 0 else "")
        return
    refused = report.ledger.records_refused
    for refusal in refused[:_SHOWN]:
        yield f"{refusal.origin}  {refusal.reason}"
    if len(refused) > _SHOWN:
        yield f"… and {len(refused) - _SHOWN:,} more (all with --json)"
