"""Encoding: Pieces → Example, in batches, with every record accounted for.

Before: template.py.  After: batch.row.
Laws (tests/data/test_encode.py):
1. The prompt is tokenized in one go, as a server tokenizes it; the answer on its own, as it is generated behind it.
2. Text from a record never becomes a control token: no token reaches across a Piece's breaks.
3. Every answer ends with the stop token, and the stop token is learned.
4. The answer and its stop token are never cut; what is cut, skipped or refused is counted and named.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from atomtune.data.files import Found
from atomtune.data.formats import to_record
from atomtune.data.records import Account, Example, Piece, Record, Refusal
from atomtune.data.template import CannotExpress, Template

Overlength = Literal["shorten", "skip", "error"]
BATCH_RECORDS = 1000
# An instruction is "the" instruction of a data set when at least this share of its records carries it.
SHARED_SHARE = 0.9
INSTRUCTIONS_KEPT = 10_000
# Put before a continuing part so that the tokenizer does not take it for the beginning of a text (and write a space).
_ANCHORS = ("\n", "|", "1", "。")


def encode(
    found: Iterable[Found | Refusal],
    template: Template,
    account: Account,
    *,
    max_tokens: int,
    overlength: Overlength = "shorten",
) -> Iterator[Example]:
    """Yield one Example per accepted record and write everything else into account."""
    instructions: Counter[str] = Counter()  # of a large file's rare ones some are forgotten
    for batch in _batched(found):
        records: list[Record] = []
        for one in batch:
            account.records_read += 1
            record = one if isinstance(one, Refusal) else to_record(one, account)
            if isinstance(record, Refusal):
                account.refuse(record)
                continue
            records.append(record)
            user = record.prompt[-1]
            if user.input and user.text:
                instructions[user.text] += 1
        if len(instructions) > INSTRUCTIONS_KEPT:
            instructions = Counter(dict(instructions.most_common(INSTRUCTIONS_KEPT // 10)))
        yield from _encode_batch(records, template, account, max_tokens, overlength)
    for text, count in instructions.most_common(1):
        if count >= max(2, SHARED_SHARE * account.records_read):
            account.shared_instruction = text


def _batched(items: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """itertools.batched, which Python 3.11 lacks."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, BATCH_RECORDS)):
        yield batch


def _encode_batch(
    records: Sequence[Record], template: Template, account: Account, max_tokens: int, overlength: Overlength
) -> Iterator[Example]:
    pieces: list[tuple[Record, Piece, Piece]] = []
    for record in records:
        try:
            pieces.append((record, *template.pieces(record)))
        except CannotExpress as error:
            account.refuse(Refusal(record.origin, str(error)))
    tokenizer = template.tokenizer
    prompts = ids_of([prompt for _, prompt, _ in pieces], tokenizer)
    answers = ids_of([answer for _, _, answer in pieces], tokenizer)
    stop_id = tokenizer.convert_tokens_to_ids(template.stop)
    for (record, prompt, answer), whole_prompt, answer_ids in zip(pieces, prompts, answers, strict=True):
        target = [*answer_ids, stop_id]
        room = max_tokens - len(target)
        prompt_ids = whole_prompt
        if len(prompt_ids) > room:
            shorter = _make_room(record, template, room, max_tokens=max_tokens, overlength=overlength)
            if isinstance(shorter, Refusal):
                account.refuse(shorter)
                continue
            prompt_ids = shorter
            account.records_cut += 1
            account.cut_origins.append(record.origin)
        if not prompt_ids:
            account.refuse(Refusal(record.origin, "the template writes nothing before the answer"))
            continue
        if prompt.breaks or answer.breaks:
            account.control_origins.append(record.origin)
        account.unknown_tokens += answer_ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        learn = (0,) * len(prompt_ids) + (1,) * len(target)
        example = Example((*prompt_ids, *target), learn, record.origin)
        account.use(example, len(target))
        yield example


def _make_room(
    record: Record, template: Template, room: int, *, max_tokens: int, overlength: Overlength
) -> list[int] | Refusal:
    """Prompt ids of the shortened record, or the refusal of one that must not or cannot be shortened."""
    answer_tokens = max_tokens - room
    if overlength != "shorten" and room > 0:
        reason = f"longer than max_seq_length {max_tokens}"
        return Refusal(record.origin, reason, broken=overlength == "error")

    def prompt_ids(shorter: Record) -> list[int]:
        return ids_of([template.pieces(shorter)[0]], template.tokenizer)[0]

    shorter = shorten(record, lambda candidate: len(prompt_ids(candidate)) <= room) if room > 0 else None
    if shorter is None:
        return Refusal(
            record.origin,
            f"the answer alone, with its stop token and the template's markers, is longer than max_seq_length "
            f"{max_tokens} ({answer_tokens} tokens)",
            broken=overlength == "error",
        )
    return prompt_ids(shorter)


def shorten(record: Record, fits: Callable[[Record], bool]) -> Record | None:
    """Drop the oldest turns, then the start of the longest prompt text, until the record fits; None if it cannot."""
    system = tuple(turn for turn in record.prompt if turn.role == "system")
    rest = [turn for turn in record.turns if turn.role != "system"]
    while len(rest) > 2:  # the last question and the answer stay
        later = next((i for i, turn in enumerate(rest[1:-1], start=1) if turn.role == "user"), len(rest))
        if later > len(rest) - 2:
            break
        rest = rest[later:]
        record = replace(record, turns=(*system, *rest))
        if fits(record):
            return record
    for _ in range(2 * len(record.prompt)):
        index, name, text = _longest_text(record)
        if not text:
            break
        if not fits(_with_text(record, index, name, "")):
            record = _with_text(record, index, name, "")
            continue
        low, high = 0, 8  # keeping `low` characters fits, keeping `high` is not known to
        while high < len(text) and fits(_with_text(record, index, name, text[-high:])):
            low, high = high, high * 2
        high = min(high, len(text))
        while high - low > 1:
            middle = (low + high) // 2
            if fits(_with_text(record, index, name, text[-middle:])):
                low = middle
            else:
                high = middle
        return _with_text(record, index, name, text[-low:] if low else "")
    return record if fits(record) else None


def _longest_text(record: Record) -> tuple[int, str, str]:
    texts = [(i, name, getattr(turn, name)) for i, turn in enumerate(record.prompt) for name in ("text", "input")]
    return max(texts, key=lambda entry: len(entry[2]))


def _with_text(record: Record, index: int, name: str, text: str) -> Record:
    turns = list(record.turns)
    turn = turns[index]
    turns[index] = replace(turn, text=text) if name == "text" else replace(turn, input=text)
    return replace(record, turns=tuple(turns))


def ids_of(pieces: Sequence[Piece], tokenizer: Any) -> list[list[int]]:
    """Token ids of each piece; control strings are tokens only where no break says otherwise."""
    ids = _tokenize([piece.text for piece in pieces if not piece.breaks], tokenizer)
    whole = iter(ids)
    return [_broken_ids(piece, tokenizer) if piece.breaks else next(whole) for piece in pieces]


def _tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _broken_ids(piece: Piece, tokenizer: Any) -> list[int]:
    bounds = [0, *piece.breaks, len(piece.text)]
    first, *rest = [piece.text[a:b] for a, b in itertools.pairwise(bounds)]
    ids = _tokenize([first], tokenizer)[0]
    for part in rest:
        ids += _continuation(part, tokenizer)
    return ids


def _continuation(part: str, tokenizer: Any) -> list[int]:
    """Ids of a text that goes on from another, without the space some tokenizers write at a beginning."""
    for anchor in _ANCHORS:
        alone, together = _tokenize([anchor, anchor + part], tokenizer)
        if alone and together[: len(alone)] == alone:
            return together[len(alone) :]
    return _tokenize([part], tokenizer)[0]
