"""Tokenized exchanges: Exchanges → token ids, and those of a record joined into as few Examples as possible."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from atomtune.data.encoding.chat_template import Template
from atomtune.data.records import Example, Exchange, Piece, Prompt, shared_parts, with_each_part


class TokenizedExchange(NamedTuple):
    """The ids of one exchange: the prompt, and the answer with its stop token."""

    prompt: Prompt[list[int]]
    answer: list[int]
    learn: int
    prompt_tokens: int  # length of the whole prompt

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + len(self.answer)

    @property
    def learned_tokens(self) -> int:
        """Tokens of the answer that are learned: all, except the first one if there is no token before it."""
        return len(self.answer) if self.prompt_tokens else len(self.answer) - 1


class PieceIds:
    """The ids of pieces, each tokenized only once: the prompts of a conversation share most of their pieces."""

    def __init__(self, template: Template) -> None:
        self._tokens, self._tokenizer = template.tokens, template.tokenizer
        self._known: dict[Piece, list[int]] = {}

    def learn(self, pieces: Iterable[Piece]) -> None:
        """Tokenize many pieces at once, which takes a fraction of the time. Raises CannotTokenize."""
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
    """The pieces of a record's exchanges, without those that a prompt shares with the previous one."""
    for exchange, shared in zip(exchanges, shared_parts(exchange.prompt for exchange in exchanges), strict=True):
        yield from exchange.prompt.parts(shared)
        yield exchange.answer


def tokenized_exchanges(exchanges: Sequence[Exchange], ids: PieceIds) -> list[TokenizedExchange]:
    """The exchanges of one record as ids; parts that a prompt shares with the previous one are looked up once."""
    tokenized: list[TokenizedExchange] = []
    prompts = [exchange.prompt for exchange in exchanges]
    prompts_in_ids = with_each_part(prompts, ids.__getitem__)
    tokens = 0  # length of the prompt's history
    for exchange, prompt, shared in zip(exchanges, prompts_in_ids, shared_parts(prompts), strict=True):
        tokens = (tokens if shared else 0) + sum(map(len, prompt.history[shared:]))
        answer = [*ids[exchange.answer], ids.of_token(exchange.stop)]
        tokenized.append(TokenizedExchange(prompt, answer, exchange.learn, prompt_tokens=tokens + len(prompt.asks)))
    return tokenized


def joined_examples(exchanges: Sequence[TokenizedExchange], origin: str) -> tuple[Example, ...]:
    """Join the exchanges of a record into as few Examples as law 5 of encode.py allows.

    exchange 1   p1             a1
    exchange 2   p1 a1 u2       a2      its prompt begins with p1 a1: the same Example
    exchange 3   p1 A1 u2 A2 u3 a3      A1 differs from a1 (without its thoughts, for example): a new Example

    ids          p1 a1 u2 a2        p1 A1 u2 A2 u3 a3
    learned         ^^    ^^                       ^^
    """
    examples: list[Example] = []
    ids: list[int] = []
    learn: list[int] = []
    before: TokenizedExchange | None = None
    for exchange in exchanges:
        new = None if before is None else _continued(before, exchange)
        if new is None:
            if ids:
                examples.append(Example(tuple(ids), tuple(learn), origin))
            ids, learn = list(itertools.chain.from_iterable(exchange.prompt.parts())), [0] * exchange.prompt_tokens
        else:
            ids += new
            learn += [0] * len(new)
        ids += exchange.answer
        learn += [exchange.learn] * len(exchange.answer)
        if not exchange.prompt_tokens:  # a text without a token before it: nothing predicts its first token
            learn[0] = 0
        before = exchange
    return (*examples, Example(tuple(ids), tuple(learn), origin))


def _continued(before: TokenizedExchange, exchange: TokenizedExchange) -> list[int] | None:
    """The ids that the prompt adds to the previous prompt and answer; None if it does not begin with both."""
    if not exchange.prompt.goes_on_from(before.prompt):
        return None
    new = list(itertools.chain.from_iterable(exchange.prompt.parts(before.prompt.length)))
    known = [*before.prompt.asks, *before.answer]
    return new[len(known) :] if new[: len(known)] == known else None
