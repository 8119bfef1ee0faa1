"""Exchanges: Record → Exchanges, each learned answer with the prompt before it, both as the template writes them.

    prompt of the first     <user>q1<end> | <assistant>
    prompt of the second    <user>q1<end> | <assistant>a1<end><user>q2<end> | <assistant>
    its answer                                                                           a2, and the stop token <end>

Prompts are cut at |, and parts that they share are stored once (`cuts.py`).
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

from atomtune.data.encoding.answers import answer_at, answers_of
from atomtune.data.encoding.chat_template import Template, WrittenAnswer
from atomtune.data.encoding.cuts import cuts_of, whole
from atomtune.data.encoding.omissions import Omissions
from atomtune.data.encoding.prompts import prompts_of
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.records import Exchange, Piece, Prompt, Record, with_each_part


def exchanges_of(template: Template, record: Record) -> tuple[Exchange, ...]:
    """Every learned answer of a record with the prompt before it. Raises CannotExpress."""
    learned = record.learned
    templated = TemplatedRecord(template, record)
    cuts = cuts_of(templated)
    omissions = Omissions(templated)
    prompts = prompts_of(cuts, learned)
    in_pieces, answers = _in_pieces(templated, prompts), answers_of(cuts, learned, prompts)
    exchanges = [
        _exchange(templated, omissions, at, prompt, answer)
        for at, prompt, answer in zip(learned, in_pieces, answers, strict=True)
    ]
    if exchanges and record.turns[-1].role != "text":
        # The last prompt contains all earlier ones, so checking it alone is enough.
        notes = omissions.in_prompt(learned[-1], whole(prompts[-1]))
        if notes:
            exchanges[-1] = exchanges[-1]._replace(lost=(*exchanges[-1].lost, *notes))
    return tuple(exchanges)


def exchange_at(template: Template, record: Record, at: int) -> Exchange:
    """The answer at `at` with the prompt before it. Raises CannotExpress."""
    templated = TemplatedRecord(template, record)
    prompt = cuts_of(templated).prompt(at)
    (in_pieces,) = _in_pieces(templated, [prompt])
    return _exchange(templated, Omissions(templated), at, in_pieces, answer_at(templated, at, prompt))


def prompt_at(template: Template, record: Record, at: int) -> Prompt[Piece]:
    """The prompt before the turn at `at`, in pieces that tokenize to the ids of the whole. Raises CannotExpress."""
    templated = TemplatedRecord(template, record)
    (in_pieces,) = _in_pieces(templated, [cuts_of(templated).prompt(at)])
    return in_pieces


def as_one_piece(prompt: Prompt[Piece]) -> Piece:
    """A prompt as one piece."""
    breaks: list[int] = []
    pieces = list(prompt.parts())
    for start, piece in zip(accumulate((len(piece.text) for piece in pieces), initial=0), pieces, strict=False):
        breaks += [start + at for at in piece.breaks]
    return Piece("".join(piece.text for piece in pieces), learn=False, breaks=tuple(breaks))


def _in_pieces(templated: TemplatedRecord, prompts: Sequence[Prompt[str]]) -> Iterator[Prompt[Piece]]:
    """The prompts with the record's control strings restored, as text."""
    return with_each_part(prompts, partial(templated.escaper.piece, learn=False))


def _exchange(
    templated: TemplatedRecord, omissions: Omissions, at: int, prompt: Prompt[Piece], answer: WrittenAnswer
) -> Exchange:
    piece = templated.escaper.piece(answer.text, learn=True)
    notes = omissions.in_answer(at, piece.text)
    return Exchange(prompt, piece, templated.record.turns[at].learn, at, answer.stop, notes)
