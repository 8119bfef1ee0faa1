"""Terminal: prints the report of inspect, section by section.

It shows origins and numbers, but no texts of records; samples are printed after it.
"""

import math
from collections.abc import Iterator, Mapping

import numpy
from numpy.typing import NDArray
from rich.table import Table

from atomtune.analysis.unicode_scripts import SCRIPTS
from atomtune.console import Console
from atomtune.data.ledger import Ledger, one_of_each_reason_first
from atomtune.data.records import RefusalKind
from atomtune.inspect.checks import MEANINGS, Finding
from atomtune.inspect.histogram import Bar, Limit, histogram, percentiles
from atomtune.inspect.report import Report
from atomtune.language import listed, message, translated

#: Number of origins shown for a problem.
_SHOWN = 3
_BAR_WIDTH = 40


def say_report(report: Report, console: Console) -> None:
    """Print the whole report."""
    _say_head(report, console)
    _section(console, "Records and tokens")
    for line in ledger_lines(report.ledger):
        console.say(f"  {line}")
    for sentence in report.ledger.sentences():
        console.say("  " + translated("note: ") + translated(sentence), "yellow")
    if len(report.stored):  # else every record was refused, and there is nothing to count
        _say_lengths(report, console)
    if report.limits:  # also if all records were refused for their length
        _section(console, f"--max_seq_length {report.max_tokens:,}")
        for line in limits(report):
            console.say(f"  {translated(line)}")
    if len(report.stored):
        _say_savings(report, console)
    _section(console, message("Problems"))
    console.columns(list(check_rows(report)))
    without_finding = [check for check, finding in report.findings.items() if not finding.count]
    if without_finding:
        console.say(f"  nothing found by: {', '.join(without_finding)}")
    console.say("")


def _say_head(report: Report, console: Console) -> None:
    """Print the sources, their format, the template, and notes on how it writes the records."""
    ledger, template = report.ledger, report.template
    console.say(", ".join(report.sources), "bold")
    for note in report.notes:
        console.say(translated("note: ") + translated(note), "yellow")
    read_as = ledger.format or message("nothing")
    console.say(f"read as {read_as}; template {template.name}, answers stop at {template.stop}")
    thoughts = template.about_thoughts(ledger.records_used, ledger.records_with_thoughts)
    if thoughts:
        console.say(translated("note: ") + translated(thoughts), "" if ledger.records_with_thoughts else "yellow")
    if template.why:
        console.say(translated("note: ") + translated(template.why), "yellow")
    if template.unknown_controls:
        controls = ", ".join(template.unknown_controls)
        text = f"{controls} of this template are plain text to this tokenizer"
        console.say(translated("note: ") + translated(text), "yellow")


def _say_lengths(report: Report, console: Console) -> None:
    say = console.say
    columns = {"read only, per record": report.tokens.read, "learned, per answer": report.tokens.answers}
    _section(console, "Lengths, in tokens")
    console.print(_lengths(columns))
    for title, values in columns.items():
        say(f"  {title}", "bold")
        for bar in _bars(histogram(values)):
            say(f"  {bar}")


def _say_savings(report: Report, console: Console) -> None:
    """Print what the layouts save, and the writing systems."""
    _section(console, "Shared prefixes")
    for line in savings(report):
        console.say(f"  {translated(line)}")
    _section(console, message("Writing systems"))
    shares = listed(f"{translated(name)} {share:.1%}" for name, share in scripts(report))
    console.say(f"  {shares} of all letters" if shares else "  no letters")


def ledger_lines(ledger: Ledger) -> Iterator[str]:
    """The ledger's counts, written as sums: read = used + refused."""
    refused = len(ledger.records_refused)
    targets_used, targets_refused = ledger.target_tokens, ledger.target_tokens_refused
    yield (
        f"records        {ledger.records_read:,} read = {ledger.records_used:,} used + {refused:,} refused"
        f"; {ledger.records_cut:,} of those used are shortened"
    )
    yield (
        f"target tokens  {targets_used + targets_refused:,} read = {targets_used:,} used + {targets_refused:,} refused"
        "; none are cut"
    )
    yield f"prompt tokens  {ledger.prompt_tokens:,} used; {ledger.prompt_tokens_cut:,} cut"
    if ledger.records_split:
        split = f"{ledger.records_split:,} conversations are learned in several parts"
        yield f"examples       {ledger.examples:,}: {split}, as a server would send them"


def limits(report: Report) -> Iterator[str]:
    """What the run's --max_seq_length costs, and lengths that would cost nothing or little."""
    this_run, nothing_lost, little_lost = report.limits
    ledger, total = report.ledger, report.ledger.records_read
    if this_run.records:
        refused = len(ledger.refused_as(RefusalKind.TOO_LONG))
        yield _cost(this_run, total)
        shortened = f"{ledger.records_cut:,} shortened, by {ledger.prompt_tokens_cut:,} prompt tokens"
        yield f"so {shortened}, and {refused:,} refused"
    else:
        yield "no record is longer"
    if nothing_lost.records:
        yield f"{nothing_lost.tokens:,} is as long as the base and the memory allow"
    else:
        yield f"suggested: {nothing_lost.tokens:,}, {_cost(nothing_lost, total)}"
    if little_lost.tokens < nothing_lost.tokens:
        yield translated(f"       or: {little_lost.tokens:,}, {_cost(little_lost, total)}")


def _cost(limit: Limit, total: int) -> str:
    if not limit.records:
        return "shortens nothing"
    longer = f"{limit.records:,} records longer ({limit.records / max(1, total):.2%})"
    return f"{longer}, by {limit.lost:,} tokens in total"


def savings(report: Report) -> Iterator[str]:
    """The number of tokens that each layout computes for the sampled batches."""
    saving = report.saving
    if saving is None:
        return
    if saving.shared_prefix:
        yield f"all sampled records begin with the same {len(saving.shared_prefix):,} tokens"
    else:
        yield "no prefix is shared by all sampled records"
    yield (
        f"padded  {saving.tokens.padded:>12,} tokens computed for {saving.batches:,} batches of "
        f"{saving.records_per_batch}"
    )
    for name, tokens in (("packed", saving.tokens.packed), ("tree", saving.tokens.tree)):
        yield f"{name:<7} {tokens:>12,}  {_against(saving.tokens.padded, tokens)}"


def _against(padded: int, tokens: int) -> str:
    less = padded / tokens
    return translated(f"{less:.2f}× less") if less >= 1 else translated(f"{1 / less:.2f}× more")


def scripts(report: Report) -> list[tuple[str, float]]:
    """Each script's share of all letters, largest first."""
    letters = report.texts.letters  # [SCRIPTS]
    total = letters.sum()
    shares = []
    for name, count in zip(SCRIPTS, letters, strict=True):
        if count:
            shares.append((name, float(count / total)))
    return sorted(shares, key=lambda name_and_share: -name_and_share[1])


def _section(console: Console, title: str) -> None:
    console.say("\n" + translated(title), "bold cyan")


def _lengths(columns: Mapping[str, NDArray[numpy.int32]]) -> Table:
    table = Table(box=None, padding=(0, 2), show_edge=False)
    table.add_column("")
    for name in (translated("median"), "90 %", "99 %", translated("longest")):
        table.add_column(name, justify="right")
    for title, values in columns.items():
        table.add_row(translated(title), *(f"{value:,}" for value in percentiles(values).values()))
    return table


def _bars(bars: list[Bar]) -> Iterator[str]:
    """The bars as lines, without empty ones at the beginning."""
    filled = [number for number, bar in enumerate(bars) if bar.count]
    if not filled:
        return
    bars = bars[filled[0] :]
    most = max(bar.count for bar in bars)
    width = max(len(_range(bar)) for bar in bars)
    for bar in bars:
        yield f"  {_range(bar):>{width}}  {_blocks(bar.count, most)} {bar.count:,}"


def _blocks(count: int, most: int) -> str:
    """A bar of at most _BAR_WIDTH characters, rounded up to eighths of one: █████▍"""
    eighths = math.ceil(count * _BAR_WIDTH * 8 / most)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[rest]


def _range(bar: Bar) -> str:
    return f"{bar.low:,}" if bar.low == bar.high else f"{bar.low:,}–{bar.high:,}"


def check_rows(report: Report) -> Iterator[tuple[str, str, str]]:
    """Table rows for each check that found something: name, count and share, meaning; below it, the places."""
    read = max(1, report.ledger.records_read)
    for check, finding in report.findings.items():
        if not finding.count:
            continue
        meaning = translated(MEANINGS[check])
        if finding.groups:
            meaning += translated("; ") + translated(f"{finding.groups:,} groups")
        yield check, f"{finding.count:>8,}  {finding.count / read:>7.2%}", meaning
        for place in _places(report, finding):
            yield "", "", place


def _places(report: Report, finding: Finding) -> Iterator[str]:
    """The origins of a problem on one line; refused records with their reason, one line each."""
    if finding.check != "refused":
        origins = [report.origin(int(row)) for row in finding.rows[:_SHOWN]]
        more = " …" if len(finding.rows) > len(origins) else ""
        yield ", ".join(origins) + more
        return
    refused = report.ledger.records_refused
    for refusal in one_of_each_reason_first(refused)[:_SHOWN]:
        yield f"{refusal.origin}  {translated(refusal.reason)}"
    if len(refused) > _SHOWN:
        yield f"… and {len(refused) - _SHOWN:,} more (all with --json)"
