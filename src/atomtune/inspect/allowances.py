"""Limits: how many records with a problem --fail_on allows; if there are more, the command ends with code 4."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atomtune.choices import CHECKS, Check
from atomtune.data.ledger import Ledger
from atomtune.errors import BadSettings, CheckFailed, listing
from atomtune.inspect.checks import Finding


@dataclass(frozen=True)
class Allowance:
    """The maximum number of records with a problem: a count, or a percentage of all records read."""

    name: Check
    limit: float = 0.0  # a count, or a percentage if `share`
    share: bool = False

    def __str__(self) -> str:
        return f"{self.limit:.6g} %" if self.share else f"{self.limit:,.0f}"

    def holds(self, count: int, read: int) -> bool:
        return count <= (self.limit * read / 100 if self.share else self.limit)


def allowances(words: Sequence[str]) -> list[Allowance]:
    """Parse `cut`, `duplicates=5%`, `refused=10`. Raises BadSettings with all words that are invalid."""
    allowed: list[Allowance] = []
    problems: list[str] = []
    for word in words:
        name, is_limited, limit = word.partition("=")
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(CHECKS)}."
            problems.append(f"--fail_on {word}: no check is named {name!r}; {hint}")
            continue
        number = _number(limit.removesuffix("%")) if is_limited else 0.0
        if number is None or (limit.endswith("%") and number > 100):
            problems.append(
                f"--fail_on {word}: {limit!r} is not a limit; expected a count or a share, for example {name}=5%."
            )
            continue
        allowed.append(Allowance(name, number, limit.endswith("%")))
    if problems:
        raise BadSettings(problems)
    return allowed


def _number(text: str) -> float | None:
    """A plain non-negative number; None for anything else, such as nan, 1e3 or 1_000."""
    whole, _, part = text.partition(".")
    return float(text) if whole.isascii() and whole.isdigit() and (not part or part.isdigit()) else None


def require(allowed: Sequence[Allowance], findings: Mapping[Check, Finding], ledger: Ledger) -> None:
    """Raise CheckFailed with all allowances that are exceeded."""
    read = ledger.records_read
    failed = []
    for allowance in allowed:
        count = findings[allowance.name].count
        if not allowance.holds(count, read):
            share = 100 * count / max(1, read)
            failed.append(
                f"{allowance.name}: {count:,} of {read:,} records ({share:.2f} %); at most {allowance} allowed."
            )
    if failed:
        raise CheckFailed(f"more was found than --fail_on allows:\n{listing(failed)}")
