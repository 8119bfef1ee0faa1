"""Encoding: RawRecord → Record → Exchanges → Examples, in batches, with every record entered_in_ledger for.

Before: files.py and formats.py.  After: batch.row.
Laws (tests/data/test_encode.py):
1. The prompt is tokenized in one go, as a server tokenizes it; the answer on its own, as it is generated behind it.
2. Text from a record never becomes a control token: no token reaches across a Piece's breaks.
3. Every answer ends with the stop token, and the stop token is learned.
4. The answer and its stop token are never cut; what is cut, skipped or refused is counted and named.
5. The answers of a conversation are one Example where each stands, token for token, behind the one before as a server
   would send it; where a server would send other tokens, an Example ends and the next begins.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

from atomtune.choices import Learn, Overlength
from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.token_ids import ids_of
from atomtune.data.encoding.truncate import shorten
from atomtune.data.formats.detect import Schema, to_record
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Example, Exchange, ParsedRecord, Piece, Record, Refusal, RefusalKind, Turn

BATCH_RECORDS = 1000
# An instruction is "the" instruction of a data set when at least this share of its records carries it.
SHARED_SHARE = 0.9
INSTRUCTIONS_KEPT = 10_000


class Target(NamedTuple):
    """The ids of one exchange: what is asked, and the answer with its stop token."""

    prompt: list[int]
    answer: list[int]
    learn: int


class Counted(Protocol):
    """A part of a file with its ledger."""

    @property
    def ledger(self) -> Ledger: ...

    @property
    def instructions(self) -> Counter[str]: ...


P = TypeVar("P", bound=Counted)


@dataclass
class Encoded:
    """What a batch of values became: the Examples of each record that is used, in order, and the ledger of all."""

    records: list[tuple[Example, ...]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    instructions: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Encoder:
    """How values become Examples; one call encodes a batch and knows nothing of the others."""

    template: Template
    schema: Schema
    max_tokens: int
    overlength: Overlength = "shorten"
    learn: Learn = "all"

    @cached_property
    def _stop_id(self) -> int:
        return int(self.template.tokenizer.convert_tokens_to_ids(self.template.stop))

    @cached_property
    def _unknown_id(self) -> int | None:
        """None too where answers end with that very token, as in a tokenizer with one control token."""
        unknown = self.template.tokenizer.unk_token_id
        return None if unknown == self._stop_id else unknown

    def __call__(self, found: Sequence[RawRecord | Refusal]) -> Encoded:
        made = Encoded(ledger=Ledger(format=self.schema.name))
        records: list[Record] = []
        for one in found:
            made.ledger.records_read += 1
            record, notes = ParsedRecord(one) if isinstance(one, Refusal) else to_record(one, self.schema)
            made.ledger.notices.update(notes)
            if isinstance(record, Refusal):
                made.ledger.refuse(record)
                continue
            records.append(record if self.learn == "all" else _last_only(record))
            asked = record.turns[-2] if len(record.turns) > 1 else None
            if asked is not None and asked.input and asked.text:
                made.instructions[asked.text] += 1
        self._encode(records, made)
        return made

    def _encode(self, records: Sequence[Record], made: Encoded) -> None:
        expressed: list[tuple[Record, tuple[Exchange, ...]]] = []
        for record in records:
            try:
                expressed.append((record, self.template.exchanges(record)))
            except CannotExpress as error:
                self._refuse(record, str(error), made.ledger)
        every = [exchange for _, exchanges in expressed for exchange in exchanges]
        tokenizer = self.template.tokenizer
        prompts = iter(ids_of([exchange.prompt for exchange in every], tokenizer))
        answers = iter(ids_of([exchange.answer for exchange in every], tokenizer))
        for record, exchanges in expressed:
            targets = [Target(next(prompts), [*next(answers), self._stop_id], one.learn) for one in exchanges]
            self._settle(record, exchanges, targets, made)

    def _settle(self, record: Record, exchanges: Sequence[Exchange], targets: list[Target], made: Encoded) -> None:
        ledger, fitting, cut_tokens = made.ledger, [], 0
        for exchange, target in zip(exchanges, targets, strict=True):
            fits: Target | Refusal = target
            if len(target.prompt) + len(target.answer) > self.max_tokens:
                fits = self._made_to_fit(record, exchange.at, target)
            if isinstance(fits, Refusal):
                ledger.refuse(fits, sum(len(one.answer) * one.learn for one in targets))
                return
            cut_tokens += len(target.prompt) - len(fits.prompt)
            fitting.append(fits)
        if not all(target.prompt for target in fitting) and record.turns[-1].role != "text":
            self._refuse(record, "the template writes nothing before the answer", ledger)
            return
        examples = joined(fitting, record.origin)
        if cut_tokens:
            ledger.cut(record.origin, cut_tokens)
        if len(examples) > 1:
            ledger.records_split += 1
            ledger.split_origins.append(record.origin)
        if any(exchange.prompt.breaks or exchange.answer.breaks for exchange in exchanges):
            ledger.control_origins.append(record.origin)
        self._note(record, exchanges, fitting, ledger)
        ledger.use(examples)
        made.records.append(examples)

    def _note(self, record: Record, exchanges: Sequence[Exchange], targets: Sequence[Target], ledger: Ledger) -> None:
        """What is accepted but worth saying: targets without a token, texts that the template does not write."""
        if self._unknown_id is not None:
            ledger.unknown_tokens += sum(target.answer.count(self._unknown_id) for target in targets)
        for exchange in exchanges:
            reasoning = record.turns[exchange.at].reasoning.strip()
            if reasoning and reasoning not in exchange.answer.text:
                ledger.notices["the template does not write an answer's reasoning, which is not learned,"] += 1
        last = exchanges[-1]
        systems = [turn.text.strip() for turn in record.turns[: last.at] if turn.role == "system"]
        if not all(system in last.prompt.text for system in systems):
            ledger.notices["the template does not write a system text, which is not read,"] += 1

    def _refuse(self, record: Record, reason: str, ledger: Ledger) -> None:
        """Refuse a record before its answers have ids; their number is counted all the same."""
        answers = [Piece(record.turns[at].text, learn=True) for at in record.learned]
        counts = [len(ids) + 1 for ids in ids_of(answers, self.template.tokenizer)]
        learned = [record.turns[at].learn for at in record.learned]
        ledger.refuse(
            Refusal(record.origin, reason, RefusalKind.TEMPLATE),
            sum(n * learn for n, learn in zip(counts, learned, strict=True)),
        )

    def _made_to_fit(self, record: Record, at: int, target: Target) -> Target | Refusal:
        """An exchange that is too long, its prompt shortened; or the refusal of one that must not or cannot be."""
        room = self.max_tokens - len(target.answer)
        if self.overlength != "shorten" and room > 0:
            reason = f"longer than max_seq_length {self.max_tokens}"
            return Refusal(record.origin, reason, RefusalKind.TOO_LONG, broken=self.overlength == "error")

        def prompt_ids(shorter: Record) -> list[int]:
            return ids_of([self.template.pieces(shorter)[0]], self.template.tokenizer)[0]

        def fits(shorter: Record) -> bool:
            try:
                return len(prompt_ids(shorter)) <= room
            except CannotExpress:  # it says the whole prompt, but not with a turn or a text less
                return False

        until = replace(record, turns=record.turns[: at + 1])
        shorter = shorten(until, fits) if room > 0 else None
        if shorter is None:
            which = f"answer {record.learned.index(at) + 1}" if len(record.learned) > 1 else "the answer"
            written = "markers and list of tools" if record.tools else "markers"
            return Refusal(
                record.origin,
                f"{which} alone, with its stop token and the template's {written}, is longer than max_seq_length "
                f"{self.max_tokens} ({len(target.answer)} tokens)",
                RefusalKind.TOO_LONG,
                broken=self.overlength == "error",
            )
        return target._replace(prompt=prompt_ids(shorter))


def joined(targets: Sequence[Target], origin: str) -> tuple[Example, ...]:
    """The exchanges of one record as few Examples as law 5 allows."""
    if len(targets) == 1 and targets[0].prompt:
        prompt, answer, times = targets[0]
        return (Example((*prompt, *answer), (0,) * len(prompt) + (times,) * len(answer), origin),)
    examples: list[Example] = []
    ids: list[int] = []
    learn: list[int] = []
    for target in targets:
        if not ids or target.prompt[: len(ids)] != ids:
            if ids:
                examples.append(Example(tuple(ids), tuple(learn), origin))
            ids, learn = [], []
        learn += [0] * (len(target.prompt) - len(ids)) + [target.learn] * len(target.answer)
        ids = target.prompt + target.answer
        if not target.prompt:  # a text without a token before it: nothing predicts its first one
            learn[0] = 0
    return (*examples, Example(tuple(ids), tuple(learn), origin))


def encode(
    found: Iterable[RawRecord | Refusal],
    template: Template,
    ledger: Ledger,
    *,
    max_tokens: int,
    schema: Schema | None = None,
    overlength: Overlength = "shorten",
    learn: Learn = "all",
) -> Iterator[tuple[Example, ...]]:
    """Yield the Examples of each accepted record and write everything else into ledger."""
    encoder = Encoder(template, schema or Schema(), max_tokens, overlength, learn)
    for made in entered_in_ledger(map(encoder, batched(found)), ledger):
        yield from made.records


def entered_in_ledger(parts: Iterable[P], ledger: Ledger) -> Iterator[P]:
    """The parts as they come, each entered into ledger; at the end, the instruction that nearly all records share."""
    instructions: Counter[str] = Counter()  # of a large file's rare ones some are forgotten
    for made in parts:
        ledger.add(made.ledger)
        instructions.update(made.instructions)
        if len(instructions) > INSTRUCTIONS_KEPT:
            instructions = Counter(dict(instructions.most_common(INSTRUCTIONS_KEPT // 10)))
        yield made
    for text, count in instructions.most_common(1):
        if count >= max(2, SHARED_SHARE * ledger.records_read):
            ledger.shared_instruction = text


def batched(items: Iterable[Any], size: int = BATCH_RECORDS) -> Iterator[tuple[Any, ...]]:
    """itertools.batched, which Python 3.11 lacks."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _last_only(record: Record) -> Record:
    """The record with its last answer alone learned."""
    last = max(record.learned, default=-1)

    def read_only(i: int, turn: Turn) -> Turn:
        return turn if i == last else replace(turn, learn=0)

    return replace(record, turns=tuple(itertools.starmap(read_only, enumerate(record.turns))))
