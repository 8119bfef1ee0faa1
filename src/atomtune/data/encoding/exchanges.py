"""Exchanges: Record → Exchanges, each learned answer behind what is asked before it, as a template writes both.

An answer is asked for as a server asks for it: everything before it, rendered up to where the answer starts, as if the
conversation ended there. The answer is what the template writes behind that, thoughts, calls and channels included.
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, groupby, pairwise

from atomtune.data.encoding.chat_template import AnswerForm, CannotExpress, Message, Template, tool_name
from atomtune.data.encoding.thoughts import (
    behind_thoughts,
    closed,
    closing_of_no_thoughts,
    is_no_thought,
    mentions_thoughts,
    opened,
    with_thoughts_apart,
    without_opening,
)
from atomtune.data.encoding.token_ids import Escaper
from atomtune.data.records import Exchange, Piece, Prompt, Record, Turn, with_each_part
from atomtune.shared_prefix import shared_characters

#: Stands for a text where only the text around it matters; a noncharacter, so that no template has it.
_OTHER = "\ufdd4"
#: Conversations of up to so many answers are rendered once for each; longer ones once, where that is the same.
RENDERED_EACH = 4
NOT_WRITTEN = {
    "thoughts": "the template leaves out an answer's reasoning, so it is not learned,",
    "text": "the template leaves out the text next to a tool call, so it is not learned,",
    "white space": "the template trims whitespace around an answer, so it is not learned,",
    "system": "the template leaves out a system prompt, so the model does not read it,",
    "documents": "the template leaves out a record's documents, so the model does not read them,",
}


class TemplatedRecord:
    """A record on its way through a template: its messages, control strings hidden."""

    def __init__(self, template: Template, record: Record) -> None:
        self.template = template
        self.record = record
        # Behind a tool's answer Mistral's templates begin no turn of the assistant; each ends with its stop token.
        uses_tools = record.tools or any(turn.calls or turn.role == "tool" for turn in record.turns)
        self.cut = template.cut_at_stops if uses_tools and not template.header_behind_tools else template.cut
        self.escaper = Escaper(template.tokens)
        # Hidden once: a control string has the same mark in the prompt and in the whole, which begins with it.
        self.tools = self.escaper.hide(record.tools)
        self.variables = self.escaper.hide(record.variables)
        self._piece_of: dict[str, Piece] = {}
        self._all_written: set[int] = set()  # so many calls of a turn are all written
        self.messages: list[Message] = []
        self.starts: list[int] = []  # where the messages of each turn begin
        for turn in record.turns:
            self.starts.append(len(self.messages))
            if turn.role != "text":
                self.messages += [self.escaper.hide_message(message) for message in template.messages([turn])]

    def exchanges(self) -> tuple[Exchange, ...]:
        """Every learned answer with what is asked before it. Raises CannotExpress."""
        learned = self.record.learned
        prompts = self._prompts(learned)
        in_pieces = with_each_part(prompts, self._piece)
        known = self._written_in_prompts(learned, prompts)
        exchanges = [
            self._exchange(prompt, pieces, at, known.get(at))
            for prompt, pieces, at in zip(prompts, in_pieces, learned, strict=True)
        ]
        if exchanges and self.record.turns[-1].role != "text":
            last = _whole(prompts[-1])
            self._look_for_lost_turns(learned[-1], last)
            if self.variables.get("documents") and self._writes_no_documents(learned[-1], last):
                lost = (*exchanges[-1].lost, NOT_WRITTEN["documents"])
                exchanges[-1] = exchanges[-1]._replace(lost=lost)
        return tuple(exchanges)

    def exchange(self, at: int) -> Exchange:
        """The answer at `at` with what is asked before it."""
        prompt = self._prompt(at)
        (in_pieces,) = with_each_part([prompt], self._piece)
        return self._exchange(prompt, in_pieces, at)

    def prompt(self, at: int) -> Prompt[Piece]:
        """What is asked before the turn at `at`, in pieces whose ids are those of the whole."""
        (in_pieces,) = with_each_part([self._prompt(at)], self._piece)
        return in_pieces

    def _prompts(self, learned: Sequence[int]) -> list[Prompt[str]]:
        """What is asked before each learned answer, control strings hidden."""
        if len(learned) <= RENDERED_EACH:
            return list(map(self._prompt, learned))
        if (cut := self._cut_prompts(learned)) is not None:
            return cut
        by_question = self._by_question(learned)
        if len(by_question) == 1:
            return list(map(self._prompt, learned))
        # A template that puts the tools before the last question (Mistral's) writes earlier prompts otherwise.
        return list(chain.from_iterable(map(self._prompts, by_question)))

    def _by_question(self, learned: Sequence[int]) -> list[list[int]]:
        """The learned answers, those between two questions together."""
        questions = [at for at, turn in enumerate(self.record.turns) if turn.role == "user"]
        return [list(answers) for _, answers in groupby(learned, lambda at: bisect_left(questions, at))]

    def _prompt(self, at: int) -> Prompt[str]:
        *history, asks = self._parts(self._render_prompt(at))
        return Prompt(history, len(history), asks)

    def _render_prompt(self, at: int) -> str:
        if self.record.turns[at].role == "text":
            return self.template.tokenizer.bos_token or ""
        prompt = self._render(self.messages[: self.starts[at]], prompt=True)
        if self.tools and not all(tool_name(tool) in prompt for tool in self.tools):
            raise CannotExpress(f"{self.template.title} has no place for tools; --template qwen2.5 has one")
        return prompt

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        return self.template.render(messages, tools=self.tools, prompt=prompt, variables=self.variables)

    def _cut_prompts(self, learned: Sequence[int]) -> list[Prompt[str]] | None:
        """All prompts from one rendering: the last, cut where each answer starts; None where they are not its parts.

        A long conversation would be rendered once for every answer, which takes as long as its length squared. That
        the parts are the prompts is tried on the 1st, 2nd, 4th, 8th, … answer, together not much longer than the last.
        """
        turns = self.record.turns
        thinks = any(map(self._thinks, range(len(turns))))
        texts = [str(message["content"]) for message in self.messages]
        if not self.cut or any(map(mentions_thoughts, texts)) or thinks > self.template.forgets_thoughts:
            return None
        last = self._prompt(learned[-1])
        prompts = self._at_headers(learned, last) if self.cut == self.template.header else self._at_stops(learned, last)
        if prompts is None:
            return None
        behind_tools: list[int] = []  # numbers of answers
        if self.template.knows_thoughts:
            # Between a question and its answer it keeps those of each call, empty ones too.
            behind_tools = [number for number, at in enumerate(learned) if turns[at - 1].role != "user"]
            question = self._last_question(learned[-1])
            alike = [number for number in behind_tools if not thinks or learned[number] > question]
            if not self._are_prompts(learned, prompts, alike):
                alike = []
            for number in sorted({*behind_tools}.difference(alike)):
                prompts[number] = self._prompt(learned[number])
        others = sorted({*range(len(learned) - 1)}.difference(behind_tools))
        return prompts if self._are_prompts(learned, prompts, others) else None

    def _are_prompts(self, learned: Sequence[int], prompts: Sequence[Prompt[str]], numbers: Sequence[int]) -> bool:
        """Whether the first, second, fourth, … of these answers are asked for with the text of their prompt."""
        return all(self._render_prompt(learned[number]) == _whole(prompts[number]) for number in _at_doublings(numbers))

    def _thinks(self, at: int) -> bool:
        return bool(self.record.turns[at].reasoning) or "reasoning_content" in self._message_of(at)

    def _last_question(self, until: int) -> int:
        return next((at for at in range(until - 1, -1, -1) if self.record.turns[at].role == "user"), 0)

    def _message_of(self, at: int) -> Message:
        return self.messages[self.starts[at]] if self.starts[at] < len(self.messages) else {}

    def _at_headers(self, learned: Sequence[int], last: Prompt[str]) -> list[Prompt[str]] | None:
        """The prompts, where each part but the first begins with a turn of the assistant; None where it does not."""
        assistants = [i for i, turn in enumerate(self.record.turns[: learned[-1]]) if turn.role == "assistant"]
        if last.length != len(assistants) + 1 or (last.asks != self.template.asks and not self.variables):
            return None
        parts_before = dict(zip([*assistants, learned[-1]], range(1, last.length + 1), strict=True))
        return [last._replace(length=parts_before[at]) for at in learned]

    def _at_stops(self, learned: Sequence[int], last: Prompt[str]) -> list[Prompt[str]] | None:
        """The prompts, where each part but the last ends with an answer, and the next begins with its stop token.

        <s> [INST] q1 [/INST] a1 | </s> [INST] q2 [/INST] a2 | </s> [INST] q3 [/INST]
        """
        assistants = [i for i, turn in enumerate(self.record.turns[: learned[-1]]) if turn.role == "assistant"]
        if last.length != len(assistants):
            return None
        number_of = {at: number for number, at in enumerate(assistants)}
        leads: dict[tuple[bool, bool], str] = {}  # what a turn with text, with calls begins with
        prompts: list[Prompt[str]] = []
        for at in learned[:-1]:
            part = last.history[number_of[at]]
            text, calls = str(self._message_of(at)["content"]).strip(), self.record.turns[at].calls
            shape = bool(text), bool(calls)
            if shape not in leads:
                lead = self._lead(at, text)
                if lead is None:
                    return None
                leads[shape] = lead
            start = part.find(leads[shape]) if calls and not text else part.rfind(leads[shape] + text)
            if start < 0:
                return None
            prompts.append(Prompt(last.history, number_of[at], part[:start]))
        return [*prompts, last]

    def _lead(self, at: int, text: str) -> str | None:
        """What the template writes for a turn before its text; for calls alone, the control token before them.

        None where calls begin with no control token: where one begins cannot be seen.
        """
        written = self.written_at(at)
        if text:
            return written.partition(text)[0]
        control = self.template.tokens.controls.match(written)
        return control.group() if control else None

    def _parts(self, prompt: str) -> Iterator[str]:
        """A rendered prompt cut where the assistant's turns begin, or else where they end.

        Prompts of one conversation have most parts in common, so that each is tokenized once.
        """
        spots = _all_places(prompt, self.cut) if self.cut else []
        places = [0, *(spot for spot in spots if spot), len(prompt)]
        return (prompt[start:end] for start, end in pairwise(places))

    def _piece(self, part: str) -> Piece:
        if part not in self._piece_of:
            self._piece_of[part] = self.escaper.piece(part, learn=False)
        return self._piece_of[part]

    def _exchange(
        self, prompt: Prompt[str], in_pieces: Prompt[Piece], at: int, known: tuple[str, str] | None = None
    ) -> Exchange:
        """known: the answer's text and its stop token, where they are known without rendering it."""
        turn, template = self.record.turns[at], self.template
        if turn.role == "text":
            return Exchange(in_pieces, self.escaper.whole(turn.text, learn=True), turn.learn, at, template.stop)
        form = self._form(at, prompt)
        if form is not None:
            text, stop = form.written(str(self.messages[self.starts[at]]["content"])), template.stop
            has_space = form.lead == " "
        else:
            text, stop = known or template.ended(self.written(at, _whole(prompt)))
            has_space = text.startswith("  ") or not turn.text.startswith(" ")
        if has_space:
            text = template.tokens.without_written_space(text)
        answer = self.escaper.piece(text, learn=True)
        if turn.calls:
            self._look_for_lost_calls(at, answer.text)
        return Exchange(in_pieces, answer, turn.learn, at, stop, self._lost_of(turn, answer.text))

    def _written_in_prompts(self, learned: Sequence[int], prompts: Sequence[Prompt[str]]) -> dict[int, tuple[str, str]]:
        """What prompts have of the answers before them, as `Template.ended` gives it: without a rendering for each."""
        of_history: dict[int, dict[int, Prompt[str]]] = defaultdict(dict)
        for at, prompt in zip(learned, prompts, strict=True):
            of_history[id(prompt.history)][at] = prompt
        known: dict[int, tuple[str, str]] = {}
        for prompt_of in of_history.values():
            if len(prompt_of) > RENDERED_EACH:
                known |= self._written_in_last(prompt_of)
        return known

    def _written_in_last(self, prompt_of: Mapping[int, Prompt[str]]) -> dict[int, tuple[str, str]]:
        """What the last of some prompts with one history has of the answers before it.

        Of each shape of turn the 1st, 2nd, 4th, 8th, … is rendered too. Where one is not what the prompt has, behind a
        beginning that all have (empty thoughts, which only a last answer is given), its shape is left out.
        """
        last_at, last = max(prompt_of.items())
        question = self._last_question(last_at)
        by_shape: dict[tuple[bool, ...], dict[int, tuple[str, str]]] = defaultdict(dict)
        for at, prompt in prompt_of.items():
            may_lack_thoughts = self._thinks(at) and at < question
            if prompt.length == last.length or may_lack_thoughts or self._form(at, prompt) is not None:
                continue
            in_last = self._in_history(prompt)
            if in_last is not None:
                turn = self.record.turns[at]
                by_shape[bool(turn.calls), bool(turn.text), self._thinks(at)][at] = in_last
        known: dict[int, tuple[str, str]] = {}
        for of_shape in by_shape.values():
            tried_at = list(_at_doublings(list(of_shape)))
            tried = {at: self.template.ended(self.written(at, _whole(prompt_of[at]))) for at in tried_at}
            lead = tried[tried_at[0]][0].removesuffix(of_shape[tried_at[0]][0])
            with_lead = {at: (lead + text, stop) for at, (text, stop) in of_shape.items()}
            known |= with_lead if is_no_thought(lead) and tried.items() <= with_lead.items() else tried
        return known

    def _in_history(self, prompt: Prompt[str]) -> tuple[str, str] | None:
        """The answer to a prompt in the history that goes on behind it, and its stop token; None where none is seen."""
        part, header, stops = prompt.history[prompt.length], self.template.header, self.template.stops
        if self.cut != header:  # the next part begins with its stop token
            return part[len(prompt.asks) :], self.cut
        answer = part[len(header) :]
        ends = [(place, stop) for stop in stops if (place := answer.find(stop)) >= 0]
        if not ends:
            return None
        place, stop = min(ends)
        return answer[:place], stop

    def _form(self, at: int, prompt: Prompt[str]) -> AnswerForm | None:
        """How the answer at `at` is written; None where it has to be rendered to see that."""
        turn, form = self.record.turns[at], self.template.form
        # Behind a tool's answer some prompts end otherwise.
        is_plain = not (turn.reasoning or turn.calls or mentions_thoughts(turn.text))
        return form if is_plain and not self.variables and prompt.asks.endswith(self.template.asks) else None

    def written_at(self, at: int) -> str:
        """What the template writes for the turn at `at`, up to the end of all that stands behind it."""
        return self.written(at, self._render_prompt(at))

    def written(self, at: int, prompt: str) -> str:
        """What the template writes for an answer where nothing follows it: what a server's model must have written."""
        before, own = self.messages[: self.starts[at]], self.messages[self.starts[at] : self.starts[at] + 1]
        full = self._render([*before, *own], prompt=False)
        if full.startswith(prompt):
            return full[len(prompt) :]
        # With the answer in it the conversation is written otherwise: thoughts of earlier turns are gone, or this
        # answer's stand elsewhere than where the prompt asks for them.
        start = self._start_of_turn(full, before, own[0])
        written = full[start:]
        thoughts = opened(prompt)
        if thoughts is not None:  # the prompt begins the thoughts, as DeepSeek-R1's does
            if closing := closing_of_no_thoughts(written):
                return closing
            space, closes = thoughts
            text = behind_thoughts(written)
            return f"{own[0].get('reasoning_content', '')}{space}{closes}{space * 2}{text}"
        return behind_thoughts(written) if closed(prompt) else written

    def _start_of_turn(self, full: str, before: Sequence[Message], own: Message) -> int:
        """Where the last turn's own text begins in a rendering: behind the last header before another text differs."""
        other = {key: _OTHER if isinstance(value, str) and key != "role" else value for key, value in own.items()}
        if own.get("tool_calls") and not own["content"] and not own.get("thinking"):
            calls = [{**call, "function": {**call["function"], "name": _OTHER}} for call in own["tool_calls"]]
            other = {**own, "tool_calls": calls}
        beginning = shared_characters(full, self._render([*before, other], prompt=False))
        header = self.template.header
        start = full.rfind(header, 0, beginning) if header else -1
        if start < 0:
            raise CannotExpress(
                f"{self.template.title} changes the turns before an answer once the answer is there, so "
                "the beginning of the answer cannot be found"
            )
        # Where the header opens thoughts, what follows begins with them.
        return start + len(without_opening(header))

    def _lost_of(self, turn: Turn, answer: str) -> tuple[str, ...]:
        """What of an answer the template leaves out. Raises CannotExpress where that is all of its text."""
        if self.template.knows_thoughts:
            turn = with_thoughts_apart(turn)
        lost = []
        if turn.reasoning.strip() and turn.reasoning.strip() not in answer:
            lost.append(NOT_WRITTEN["thoughts"])
        if turn.text.strip() and turn.text.strip() not in answer:
            if not turn.calls:
                raise CannotExpress(f"{self.template.title} does not write the text of an answer")
            lost.append(NOT_WRITTEN["text"])
        elif turn.text not in answer and not turn.reasoning:
            lost.append(NOT_WRITTEN["white space"])
        return tuple(lost)

    def _writes_no_documents(self, at: int, prompt: str) -> bool:
        """Whether the prompt before the turn at `at` is the same without the record's documents.

        A server that is sent them writes the same prompt, without a word.
        """
        without = {**self.variables, "documents": None}
        return self.template.render(self.messages[: self.starts[at]], tools=self.tools, variables=without) == prompt

    def _look_for_lost_calls(self, at: int, answer: str) -> None:
        """Raises CannotExpress where a call of a turn is not in its answer."""
        if all(str(call.get("name")) not in answer for call in self.record.turns[at].calls):
            raise CannotExpress(f"{self.template.title} has no place for tool calls; --template qwen2.5 has one")
        start = self.starts[at]
        calls = self.messages[start]["tool_calls"]
        if len(calls) == 1 or len(calls) in self._all_written:
            return
        # Several may have one name: each is given its own, and looked for.
        names = [f"atomtune-call-{number}" for number in range(len(calls))]
        renamed = [
            {**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)
        ]
        whole = self._render([*self.messages[:start], {**self.messages[start], "tool_calls": renamed}], prompt=False)
        written = sum(name in whole for name in names)
        if written < len(calls):
            raise CannotExpress(f"{self.template.title} writes {written} of the {len(calls)} calls of a turn")
        self._all_written.add(len(calls))

    def _look_for_lost_turns(self, until: int, prompt: str) -> None:
        """Raises CannotExpress where a question or a tool's answer is in no prompt."""
        reached = 0  # in the prompt: templates write turns in their order, so most are found at once
        for number, turn in enumerate(self.record.turns[:until]):
            if turn.role not in ("user", "tool"):
                continue
            for message in self.messages[self.starts[number] : self.starts[number + 1]]:
                text = str(message["content"]).strip()
                place = prompt.find(text, reached)
                if place >= 0:
                    reached = place
                    continue
                if text in prompt or any(
                    json.dumps(text, ensure_ascii=ascii_only)[1:-1] in prompt for ascii_only in (False, True)
                ):
                    continue
                raise CannotExpress(f"{self.template.title} leaves out what turn {number + 1} ({turn.role}) says")


def joined(prompt: Prompt[Piece]) -> Piece:
    """A prompt as one piece."""
    breaks: list[int] = []
    pieces = list(prompt.parts())
    for start, piece in zip(accumulate((len(piece.text) for piece in pieces), initial=0), pieces, strict=False):
        breaks += [start + at for at in piece.breaks]
    return Piece("".join(piece.text for piece in pieces), learn=False, breaks=tuple(breaks))


def _whole(prompt: Prompt[str]) -> str:
    return "".join(prompt.parts())


def _at_doublings(items: Sequence[int]) -> Iterator[int]:
    """The 1st, 2nd, 4th, 8th, … of them."""
    number = 1
    while number <= len(items):
        yield items[number - 1]
        number *= 2


def _all_places(text: str, part: str) -> list[int]:
    places, at = [], text.find(part)
    while at >= 0:
        places.append(at)
        at = text.find(part, at + len(part))
    return places
