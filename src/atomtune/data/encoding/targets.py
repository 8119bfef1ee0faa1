"""Targets: Exchanges → ids, and the ids of one record joined into as few Examples as a server's prompts allow."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from atomtune.data.encoding.chat_template import Template
from atomtune.data.records import Example, Exchange, Piece, Prompt, shared_parts, with_each_part


class Target(NamedTuple):
    """The ids of one exchange: what is asked, and the answer with its stop token."""

    prompt: Prompt[list[int]]
    answer: list[int]
    learn: int
    prompt_tokens: int  # of all parts together

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + len(self.answer)

    @property
    def learned_tokens(self) -> int:
        """Of the answer; where nothing stands before a text, nothing predicts its first token."""
        return len(self.answer) if self.prompt_tokens else len(self.answer) - 1


class PieceIds:
    """Ids of pieces, each tokenized once: the prompts of a conversation have most of theirs in common."""

    def __init__(self, template: Template) -> None:
        self._tokens, self._tokenizer = template.tokens, template.tokenizer
        self._known: dict[Piece, list[int]] = {}

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Tokenize many at once, which takes a fraction of the time."""
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self._known]
        self._known.update(zip(new, self._tokens.ids_of(new), strict=True))

    def __getitem__(self, piece: Piece) -> list[int]:
        if piece not in self._known:
            self.learn([piece])
        return self._known[piece]

    def of_token(self, token: str) -> int:
        """The id of a control token."""
        return int(self._tokenizer.convert_tokens_to_ids(token))


def different_pieces(exchanges: Sequence[Exchange]) -> Iterator[Piece]:
    """The pieces of a record; those that a prompt shares with the one before are left out."""
    for exchange, shared in zip(exchanges, shared_parts(exchange.prompt for exchange in exchanges), strict=True):
        yield from exchange.prompt.parts(shared)
        yield exchange.answer


def targets_of(exchanges: Sequence[Exchange], ids: PieceIds) -> list[Target]:
    """The exchanges of one record in ids; what a prompt shares with the one before is looked up once."""
    targets: list[Target] = []
    prompts = [exchange.prompt for exchange in exchanges]
    prompts_in_ids = with_each_part(prompts, ids.__getitem__)
    tokens = 0  # of what a prompt shares with the one before
    for exchange, prompt, shared in zip(exchanges, prompts_in_ids, shared_parts(prompts), strict=True):
        tokens = (tokens if shared else 0) + sum(map(len, prompt.history[shared:]))
        answer = [*ids[exchange.answer], ids.of_token(exchange.stop)]
        targets.append(Target(prompt, answer, exchange.learn, prompt_tokens=tokens + len(prompt.asks)))
    return targets


def joined(targets: Sequence[Target], origin: str) -> tuple[Example, ...]:
    """The exchanges of one record as few Examples as law 5 allows."""
    examples: list[Example] = []
    ids: list[int] = []
    learn: list[int] = []
    before: Target | None = None
    for target in targets:
        new = None if before is None else _continued(before, target)
        if new is None:
            if ids:
                examples.append(Example(tuple(ids), tuple(learn), origin))
            ids, learn = list(itertools.chain.from_iterable(target.prompt.parts())), [0] * target.prompt_tokens
        else:
            ids += new
            learn += [0] * len(new)
        ids += target.answer
        learn += [target.learn] * len(target.answer)
        if not target.prompt_tokens:  # a text without a token before it: nothing predicts its first one
            learn[0] = 0
        before = target
    return (*examples, Example(tuple(ids), tuple(learn), origin))


def _continued(before: Target, target: Target) -> list[int] | None:
    """What a prompt adds to the exchange before it; None where it does not begin with all of that."""
    if not target.prompt.goes_on_from(before.prompt):
        return None
    new = list(itertools.chain.from_iterable(target.prompt.parts(before.prompt.length)))
    known = [*before.prompt.asks, *before.answer]
    return new[len(known) :] if new[: len(known)] == known else None
