"""Encoding: RawRecord → Record → Exchanges → Examples, in batches; a ledger counts what happened to every record.

Laws (tests/data/encoding/test_encode.py):
1. A prompt has the ids of its whole text tokenized in one go, as a server tokenizes it. The answer is tokenized on its
   own, as the model generates it after the prompt.
2. Text from a record never becomes a control token.
3. Every answer ends with the token with which the template ends it, and this token is learned.
4. An answer and its stop token are never cut. Everything that is cut, skipped or refused is counted and named.
5. The answers of a conversation are joined into one Example as long as each prompt, as a server would send it, begins
   with the previous prompt and answer, token for token. Otherwise an Example ends and the next begins.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from atomtune.choices import Learn, Overlength
from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.exchanges import exchanges_of
from atomtune.data.encoding.fitting import Fitting
from atomtune.data.encoding.omissions import notes_on
from atomtune.data.encoding.thoughts import with_thoughts_apart
from atomtune.data.encoding.token_ids import CannotTokenize
from atomtune.data.encoding.tokenized import (
    PieceIds,
    TokenizedExchange,
    different_pieces,
    joined_examples,
    tokenized_exchanges,
)
from atomtune.data.formats.detect import to_record
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from atomtune.data.records import Example, Exchange, Piece, Record, Refusal, RefusalKind


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """The result for one record: its Examples, or why it is refused."""

    origin: str
    examples: tuple[Example, ...] = ()
    refusal: Refusal | None = None
    refused_target_tokens: int = 0
    prompt_tokens: int = 0  # tokens of its Examples that are not learned
    target_tokens: int = 0  # tokens of its Examples that are learned; one learned twice counts twice
    cut_tokens: int = 0  # removed from its prompts
    unknown_tokens: int = 0  # tokens of its answers that are the unknown token
    holds_control_strings: bool = False
    has_thoughts: bool = False
    notes: tuple[str, ...] = ()


@dataclass
class EncodedBatch:
    """The result for a batch of values: the Examples of each record that is used, in order, and a ledger of all."""

    records: list[tuple[Example, ...]] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    instructions: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Encoder:
    """Encodes a batch of values per call; the batches are independent.

    at_answer  called before an answer's prompt is shortened, which takes as long as encoding a short record
    """

    template: Template
    schema: Schema
    max_tokens: int
    overlength: Overlength = "shorten"
    learn: Learn = "all"
    at_answer: Callable[[], object] = lambda: None

    def __call__(self, raw_records: Sequence[RawRecord | Refusal]) -> EncodedBatch:
        batch = EncodedBatch(ledger=Ledger(format=self.schema.name))
        records: list[Record] = []
        all_notes: list[tuple[str, ...]] = []  # from reading each record
        for raw in raw_records:
            batch.ledger.records_read += 1
            if isinstance(raw, Refusal):
                batch.ledger.refuse(raw)
                continue
            record, notes = to_record(raw, self.schema)
            if isinstance(record, Refusal):
                batch.ledger.refuse(record)
                continue
            records.append(record if self.learn == "all" else _last_only(record))
            all_notes.append(notes)
            if (instruction := _instruction_of(record)) is not None:
                batch.instructions[instruction] += 1
        for encoded, notes in zip(self._encode(records), all_notes, strict=True):
            _enter(encoded, notes, batch)
        return batch

    def _encode(self, records: Sequence[Record]) -> Iterator[EncodedRecord]:
        """Encode the records, with all their texts tokenized in one call."""
        all_exchanges = [self._exchanges(record) for record in records]
        ids = PieceIds(self.template)
        with contextlib.suppress(CannotTokenize):  # raised again below, at the record that causes it
            expressed = [exchanges for exchanges in all_exchanges if isinstance(exchanges, tuple)]
            ids.learn(piece for exchanges in expressed for piece in different_pieces(exchanges))
        for record, exchanges in zip(records, all_exchanges, strict=True):
            try:
                encoded = self._encode_record(record, exchanges, ids)
            except (CannotExpress, CannotTokenize) as error:
                encoded = self._refused(record, str(error), ids)
            yield encoded

    def _exchanges(self, record: Record) -> tuple[Exchange, ...] | CannotExpress:
        try:
            return exchanges_of(self.template, record)
        except CannotExpress as error:
            return error

    def _encode_record(
        self, record: Record, exchanges: tuple[Exchange, ...] | CannotExpress, ids: PieceIds
    ) -> EncodedRecord:
        if isinstance(exchanges, CannotExpress):
            raise exchanges
        all_tokenized = tokenized_exchanges(exchanges, ids)
        fitted = self._fit(record, exchanges, all_tokenized, ids)
        if isinstance(fitted, Refusal):
            refused_tokens = sum(len(tokenized.answer) * tokenized.learn for tokenized in all_tokenized)
            return EncodedRecord(record.origin, refusal=fitted, refused_target_tokens=refused_tokens)
        if not all(tokenized.prompt_tokens for tokenized in fitted) and record.turns[-1].role != "text":
            return self._refused(record, "the template writes nothing before the answer", ids)

        examples = joined_examples(fitted, record.origin)
        all_tokens = sum(len(example.ids) for example in examples)
        learned_tokens = sum(tokenized.learned_tokens for tokenized in fitted)
        pieces = (*exchanges[-1].prompt.parts(), *(exchange.answer for exchange in exchanges))
        return EncodedRecord(
            record.origin,
            examples,
            prompt_tokens=all_tokens - learned_tokens,
            target_tokens=sum(tokenized.learned_tokens * tokenized.learn for tokenized in fitted),
            cut_tokens=_prompt_tokens(all_tokenized) - _prompt_tokens(fitted),
            unknown_tokens=self._unknown_tokens(fitted),
            holds_control_strings=any(piece.breaks for piece in pieces),
            has_thoughts=any(with_thoughts_apart(record.turns[exchange.at]).reasoning for exchange in exchanges),
            notes=notes_on(record, exchanges),
        )

    def _fit(
        self, record: Record, exchanges: Sequence[Exchange], all_tokenized: Sequence[TokenizedExchange], ids: PieceIds
    ) -> list[TokenizedExchange] | Refusal:
        """The exchanges of a record, shortened to max_tokens where needed; a Refusal if one must not or cannot be."""
        fitted: list[TokenizedExchange] = []
        fitting = Fitting(self.template, record, all_tokenized, ids, max_tokens=self.max_tokens)
        for exchange, tokenized in zip(exchanges, all_tokenized, strict=True):
            fits: TokenizedExchange | None = tokenized
            if tokenized.tokens > self.max_tokens:
                if self.overlength != "shorten" and len(tokenized.answer) < self.max_tokens:
                    return self._too_long(record, f"longer than max_seq_length {self.max_tokens}")
                self.at_answer()
                fits = fitting.shortened(tokenized, exchange.at)
            if fits is None:
                return self._too_long(record, self._no_room(record, exchange.at, tokenized))
            fitted.append(fits)
        return fitted

    def _too_long(self, record: Record, reason: str) -> Refusal:
        return Refusal(record.origin, reason, RefusalKind.TOO_LONG, broken=self.overlength == "error")

    def _no_room(self, record: Record, at: int, tokenized: TokenizedExchange) -> str:
        if record.turns[at].role == "text":
            return (
                f"the text has {tokenized.tokens} tokens, and max_seq_length is {self.max_tokens}: split it into "
                "several records"
            )
        which = f"answer {record.learned.index(at) + 1}" if len(record.learned) > 1 else "the answer"
        beside = "the template's markers and list of tools" if record.tools else "the template's markers"
        return (
            f"{which} leaves no room for its question within max_seq_length {self.max_tokens}: "
            f"with its stop token it is {len(tokenized.answer)} tokens long, plus {beside}"
        )

    def _unknown_tokens(self, all_tokenized: Sequence[TokenizedExchange]) -> int:
        """The number of unknown tokens in the answers: text that the tokenizer has no token for."""
        unknown = self.template.unknown_id
        if unknown is None:
            return 0
        return sum(tokenized.answer.count(unknown) for tokenized in all_tokenized)

    def _refused(self, record: Record, reason: str, ids: PieceIds) -> EncodedRecord:
        """Refuse a record that could not be encoded, but still count the tokens of its answers."""
        tokens = 0
        for turn in (record.turns[at] for at in record.learned):
            with contextlib.suppress(CannotTokenize):
                tokens += (len(ids[Piece(turn.text, learn=True)]) + 1) * turn.learn
        refusal = Refusal(record.origin, reason, RefusalKind.TEMPLATE)
        return EncodedRecord(record.origin, refusal=refusal, refused_target_tokens=tokens)


def _prompt_tokens(all_tokenized: Sequence[TokenizedExchange]) -> int:
    return sum(tokenized.prompt_tokens for tokenized in all_tokenized)


def _enter(encoded: EncodedRecord, notes: tuple[str, ...], batch: EncodedBatch) -> None:
    """Add the result for a record to its batch.

    notes  from reading the record; like those from encoding it, they count only if it is used
    """
    ledger = batch.ledger
    if encoded.refusal is not None:
        ledger.refuse(encoded.refusal, encoded.refused_target_tokens)
        return
    if encoded.cut_tokens:
        ledger.cut(encoded.origin, encoded.cut_tokens)
    if len(encoded.examples) > 1:
        ledger.split_origins.append(encoded.origin)
    if encoded.holds_control_strings:
        ledger.control_origins.append(encoded.origin)
    ledger.unknown_tokens += encoded.unknown_tokens
    ledger.records_with_thoughts += encoded.has_thoughts
    ledger.notices.update((*notes, *encoded.notes))
    ledger.use(encoded.examples, prompt_tokens=encoded.prompt_tokens, target_tokens=encoded.target_tokens)
    batch.records.append(encoded.examples)


def _instruction_of(record: Record) -> str | None:
    """The instruction of the last question, if that has both an instruction and an input; else None."""
    question = record.turns[-2] if len(record.turns) > 1 else None
    return question.text if question is not None and question.input and question.text else None


def _last_only(record: Record) -> Record:
    """The record with only its last learned answer still learned."""
    last = max(record.learned, default=-1)
    turns = tuple(turn if i == last else replace(turn, learn=0) for i, turn in enumerate(record.turns))
    return replace(record, turns=turns)
