"""Comparison: compares an engine's answers with those of our side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from atomtune.certify.prompts import CertPrompt
from atomtune.certify.reference import Expected
from atomtune.data.encoding.chat_template import Template
from atomtune.data.tokenizer import Tokenizer
from atomtune.engines.engine import OF_ANOTHER_BASE, Engine, EngineReply, UnknownTokens
from atomtune.shared_prefix import shared_length


@dataclass(frozen=True)
class Allowed:
    """Allowed differences from our log-probabilities, in nats: the mean over all tokens, and the gap that is a tie."""

    mean: float
    tie: float
    reason: str


#: By the dtype of what is served.
ALLOWED = {
    "float64": Allowed(1e-4, 1e-3, "float64 keeps 15 digits; the library computes some layers in float32"),
    "float32": Allowed(2e-3, 2e-2, "float32 keeps 7 digits; sums are taken in another order"),
    "bfloat16": Allowed(0.1, 0.5, "bfloat16 keeps 2 to 3 digits; every layer rounds"),
    "float16": Allowed(0.05, 0.2, "float16 keeps 3 to 4 digits; every layer rounds"),
    "q8_0": Allowed(0.15, 0.6, "q8_0 keeps 8 bits of a weight, scaled by blocks of 32"),
}
#: For formats not listed, of 4 to 6 bits. The engine must still be closer to the tuned model than to its base.
FEW_BITS = Allowed(0.6, 1.5, "this format keeps 6 bits of a weight or fewer")
#: What a decoder writes for bytes that are not a whole character.
_BROKEN = "\ufffd"
#: Largest ratio of the distance from the tuned model to the distance from the base. An engine that ignores the adapter
#: is at distance zero from the base, but not from the tuned model.
NEARER = 0.5
#: With a smaller mean difference from the base, in nats per token, the adapter changes nothing.
NOTHING = 1e-4


@dataclass(frozen=True)
class Difference:
    """A place where an engine differs, with both sides to show."""

    kind: str
    what: str
    ours: str
    engine: str


@dataclass
class EngineOutcome:
    """The results of one engine with all prompts, or up to the first with ids that the served model does not have."""

    engine: str
    version: str
    dtype: str
    allowed: Allowed
    prompts: int = 0
    prompt_ids_equal: int = 0
    greedy_equal: int = 0
    differs_from_base: int = 0
    stops: int = 0
    should_stop: int = 0
    of_another_base: bool = False
    from_tuned: list[float] = field(default_factory=list)  # per reference token, |engine - ours|
    from_base: list[float] = field(default_factory=list)
    tuned_from_base: list[float] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def mean_difference(self) -> float:
        return _mean(self.from_tuned)

    def problems(self) -> list[str]:
        """Everything that does not agree, as sentences; empty if the engine serves the tuned model."""
        if self.of_another_base:  # everything else follows from that
            return [OF_ANOTHER_BASE]
        problems: list[str] = []
        if _mean(self.tuned_from_base) < NOTHING:
            problems.append("the adapter changes nothing: tuned and base give the same log-probabilities")
        if self.prompt_ids_equal < self.prompts:
            others = self.prompts - self.prompt_ids_equal
            problems.append(f"{others} of {self.prompts} prompts got different token ids")
        if not self.mean_difference <= self.allowed.mean:  # written so that NaN is a problem too
            problems.append(
                f"log-probabilities of the reference answers differ by {self.mean_difference:.2g} nats per token on "
                f"average (allowed in {self.dtype}: {self.allowed.mean:g}; {self.allowed.reason})"
            )
        if not self.mean_difference <= NEARER * _mean(self.from_base):
            problems.append("the engine answers like the base: the adapter is not applied")
        if self.greedy_equal < self.prompts:
            others = self.prompts - self.greedy_equal
            problems.append(f"{others} of {self.prompts} greedy answers differ, and not just where two tokens tie")
        if self.stops < self.should_stop:
            missed = self.should_stop - self.stops
            problems.append(f"{missed} of {self.should_stop} answers do not end at the right place")
        return problems

    def to_json(self) -> dict[str, Any]:
        """An entry of certificate.json. The keys up to `holds` must not change, because other programs read them.

        checked  when the entry was made: entries of other engines are kept, and may be older
        """
        return {
            "engine": self.engine,
            "version": self.version,
            "prompts": self.prompts,
            "prompt_ids_equal": self.prompt_ids_equal,
            "max_logprob_difference": max(self.from_tuned, default=None),
            "greedy_equal": self.greedy_equal,
            "differs_from_base": self.differs_from_base,
            "stops": self.stops,
            "holds": not self.problems(),
            "mean_logprob_difference": self.mean_difference if self.from_tuned else None,
            "allowed_mean_logprob_difference": self.allowed.mean,
            "dtype": self.dtype,
            "should_stop": self.should_stop,
            "problems": self.problems(),
            "checked": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def coarser(*dtypes: str) -> str:
    """The dtype among these that rounds most."""
    return max(dtypes, key=lambda name: ALLOWED.get(name, FEW_BITS).mean)


def compare(
    engine: Engine, expected: Sequence[Expected], template: Template, *, dtype: str, max_new_tokens: int
) -> EngineOutcome:
    """Send every prompt to a running engine and compare its answers with ours.

    dtype  of our side, or of the stored weights; the coarsest dtype of all decides what is allowed
    """
    of_both = coarser(engine.dtype, dtype)
    outcome = EngineOutcome(engine.name, engine.version, of_both, ALLOWED.get(of_both, FEW_BITS))
    for ours in expected:
        prompt = ours.prompt
        outcome.prompts += 1
        # 1. The prompt: rendered and tokenized by the engine to the same ids, and as many as it reports.
        ids = engine.prompt_ids(prompt.request)
        reply = engine.chat(prompt.request, max_tokens=max_new_tokens)
        if ids == list(prompt.prompt_ids) and reply.prompt_tokens == len(ids):
            outcome.prompt_ids_equal += 1
        else:
            outcome.differences.append(_ids_difference(prompt, ids, reply, template.tokenizer))
        # 2. The reference answer: its log-probabilities, token by token.
        try:
            scores = engine.log_probabilities(prompt.prompt_ids, ours.reference_ids)
        except UnknownTokens:
            outcome.of_another_base = True
            return outcome
        _enter_scores(outcome, ours, scores)
        # 3. The engine's own greedy answer.
        difference = _text_difference(ours, reply, template, outcome.allowed)
        if difference is None:
            outcome.greedy_equal += 1
        else:
            outcome.differences.append(difference)
        # 4. Its end. An answer that differs from ours earlier need not stop where ours does. If the stop token is the
        # last one that the limit allows, some engines report that the limit ended the answer, and others that it
        # stopped.
        ends_by_itself = ours.stopped and len(ours.greedy_ids) + 1 < max_new_tokens
        if ends_by_itself and reply.text.strip().startswith(ours.greedy_text.strip()):
            outcome.should_stop += 1
            if reply.stopped and _same(reply.text, ours.greedy_text):
                outcome.stops += 1
    return outcome


def _enter_scores(outcome: EngineOutcome, ours: Expected, scores: Sequence[float]) -> None:
    from_tuned = _distances(scores, ours.tuned)
    from_base = _distances(scores, ours.base)
    outcome.from_tuned += from_tuned
    outcome.from_base += from_base
    outcome.tuned_from_base += _distances(ours.tuned, ours.base)
    if _mean(from_tuned) < _mean(from_base):
        outcome.differs_from_base += 1


def _distances(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    return [abs(score - other) for score, other in zip(scores, others, strict=True)]


def _ids_difference(prompt: CertPrompt, ids: Sequence[int], reply: EngineReply, tokenizer: Tokenizer) -> Difference:
    """The first different id, with some tokens around it."""
    expected = prompt.prompt_ids
    if list(expected) == list(ids):
        return Difference(
            prompt.kind,
            "the number of prompt tokens that the engine counts",
            str(len(ids)),
            str(reply.prompt_tokens),
        )
    place = shared_length(expected, ids)  # if one continues the other: the end of the shorter one

    def around(tokens: Sequence[int]) -> str:
        token = tokens[place] if place < len(tokens) else "nothing"
        neighbours = list(tokens[max(place - 4, 0) : place + 8])
        return f"id {token}, in the text {tokenizer.decode(neighbours, skip_special_tokens=False)!r}"

    return Difference(prompt.kind, f"prompt id {place}", around(expected), around(ids))


def _same(text: str, other: str) -> bool:
    """Whether two answers are equal; a character cut in two by the limit may be a replacement character or missing."""
    return text.rstrip(_BROKEN).strip() == other.rstrip(_BROKEN).strip()


def _text_difference(ours: Expected, reply: EngineReply, template: Template, allowed: Allowed) -> Difference | None:
    """The first token at which the engine's greedy answer differs from ours by more than a tie; None if none does.

    The engine returns text, and the same text may have other tokens, so the fork is searched in the text.
    """
    if _same(reply.text, ours.greedy_text):
        return None
    ids, theirs, tokenizer = ours.greedy_ids, reply.text.strip(), template.tokenizer
    written = [_written(tokenizer, ids[:count]) for count in range(len(ids) + 1)]
    together = 0  # how many of our first tokens are in the engine's text
    while together < len(ids) and theirs.startswith(written[together + 1]):
        together += 1
    # A token that ends inside a character adds no whole character, so the fork may be at any of these tokens.
    forks = [step for step in range(together + 1) if written[step] == written[together]]
    if any(_is_tie(tokenizer, ids[:step], theirs, ours.choices[step], allowed.tie) for step in forks):
        return None
    return Difference(
        ours.prompt.kind,
        f"answer token {together}",
        _around(written[-1], len(written[together])),
        _around(theirs, len(written[together])),
    )


def _written(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The whole characters of the text of an answer's first ids."""
    return _decoded(tokenizer, ids).rstrip(_BROKEN)


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True).lstrip()


def _is_tie(tokenizer: Tokenizer, before: Sequence[int], theirs: str, choices: Mapping[int, float], gap: float) -> bool:
    """Whether the engine's text continues with one of our most likely tokens, at most `gap` below the best."""
    text, best = _written(tokenizer, before), max(choices.values())
    for token, log_probability in choices.items():
        if best - log_probability <= gap and _goes_on(text, _decoded(tokenizer, [*before, token]), theirs):
            return True
    return False


def _goes_on(text: str, longer: str, theirs: str) -> bool:
    """Whether `theirs` begins with `longer`, which is `text` and one more token."""
    if longer.endswith(_BROKEN):  # the token ends inside a character, so the next one is not ASCII
        return theirs.startswith(text) and not theirs[len(text) : len(text) + 1].isascii()
    if longer == text:  # a stop token
        return theirs == text.rstrip()
    return theirs.startswith(longer) or theirs == longer.rstrip()  # white space at its end is removed from `theirs`


def _around(text: str, at: int) -> str:
    """A part of an answer around the place where two answers differ."""
    shown = text[max(at - 20, 0) : at + 30]
    return f"… {shown!r}" if len(text) > at else f"… {shown!r} and stops"
