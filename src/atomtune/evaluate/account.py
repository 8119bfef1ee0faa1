"""Account: what became of the records that were to be evaluated: used, refused or shortened."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from atomtune.data.ledger import Ledger, first_few, listed_refusals
from atomtune.data.records import Refusal, RefusalKind
from atomtune.language import singular

#: Why a record is refused that another model's template may be able to write.
_BY_A_TEMPLATE = (RefusalKind.TEMPLATE, RefusalKind.TOO_LONG)


@dataclass(frozen=True)
class Account:
    """The records that were to be evaluated = used + refused.

    used      every model's template can write them
    cut       origin of a record with shortened prompts → how many of their tokens are left out
    notices   what a user may not expect, with the number of records that it applies to
    held_out  whether they are those that a run held out, not all of the files
    chosen    how many of those used --records chose to evaluate; None: all
    """

    used: int
    refused: tuple[Refusal, ...]
    cut: Mapping[str, int]
    notices: tuple[str, ...]
    format: str
    max_tokens: int
    held_out: bool
    chosen: int | None = None

    @property
    def prompt_tokens_cut(self) -> int:
        return sum(self.cut.values())

    def summary(self) -> str:
        """All counts in one sentence."""
        read, refused = self.used + len(self.refused), len(self.refused)
        counts = (
            f"{self.used:,} used, {refused:,} refused, {len(self.cut):,} shortened; "
            f"{self.prompt_tokens_cut:,} prompt tokens cut"
        )
        if self.held_out:
            return f"{read:,} records held out ({self.format}), {counts}."
        return f"{read:,} records read ({self.format}), {counts}."

    def notes(self) -> Iterator[str]:
        """What is not as in the files: records left out by chance, refused or shortened, with places and reasons."""
        if self.chosen is not None:
            yield f"of these {self.used:,} records, {self.chosen:,} are evaluated, chosen at random (--records)."
        if self.refused:
            yield f"not evaluated:\n{listed_refusals(self.refused)}"
        if self.cut:
            shortened = first_few(list(self.cut), all_in="report.json")
            yield f"shortened to fit --max_seq_length {self.max_tokens:,}: {shortened}."
        yield from self.notices

    def to_json(self) -> dict[str, Any]:
        """Keys of report.json, named as in run.json."""
        return {
            "records_read": self.used + len(self.refused),
            "records_used": self.used,
            "records_refused": [{"origin": refusal.origin, "reason": refusal.reason} for refusal in self.refused],
            "records_cut": len(self.cut),
            "prompt_tokens_cut": self.prompt_tokens_cut,
            "records_cut_origins": list(self.cut),
            "max_seq_length": self.max_tokens,
            "notices": list(map(singular, self.notices)),
        }


def account_of(
    ledgers: Mapping[str, Ledger],
    used: Collection[str],
    *,
    wanted: Collection[str] | None,
    max_tokens: int,
    sources: Collection[str],
) -> Account:
    """The account of several passes over the same files, each with another template.

    ledgers  names of the models that share a template → its ledger
    used     origins of the records that every template can write
    wanted   origins of the records that a run held out; None: all records are evaluated
    """
    refused: dict[str, Refusal] = {}
    cut: Counter[str] = Counter()
    notices: Counter[str] = Counter()
    for models, ledger in ledgers.items():
        for refusal in ledger.records_refused:
            if wanted is None or refusal.origin in wanted:
                refused.setdefault(refusal.origin, refusal if len(ledgers) == 1 else _of_models(refusal, models))
        cut |= Counter(dict(zip(ledger.cut_origins, ledger.cut_tokens, strict=True)))  # the larger number of tokens
        notices |= ledger.notices
    return Account(
        used=len(used),
        refused=tuple(refused.values()),
        cut={origin: cut[origin] for origin in used if origin in cut},
        notices=tuple(f"{text} in {count:,} records of {', '.join(sources)}." for text, count in notices.items()),
        format=next(iter(ledgers.values())).format,
        max_tokens=max_tokens,
        held_out=wanted is not None,
    )


def _of_models(refusal: Refusal, models: str) -> Refusal:
    """The refusal with the names of the models whose template refuses the record."""
    if refusal.kind not in _BY_A_TEMPLATE:
        return refusal
    return replace(refusal, reason=f"{refusal.reason} (template of {models})")
