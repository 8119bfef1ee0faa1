"""Cuts: where a rendered conversation is cut into parts, so that one rendering gives many prompts and answers.

Each cut is before a control token at which the parts tokenize to the ids of the whole (`Template.cut`). The last part
of a prompt, after which the model writes, is called `asks`; the parts before it are its history.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from atomtune.data.encoding.chat_template import WrittenAnswer
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.records import Prompt

#: Up to this many answers, each prompt is rendered separately; the prompts of more are cut out of one rendering.
RENDERED_EACH = 4


class Cuts:
    """The cuts of one record's renderings, before each `mark`. This class is for templates without a mark: no cuts."""

    def __init__(self, templated: TemplatedRecord, mark: str = "") -> None:
        self.templated = templated
        self.mark = mark

    def prompt(self, at: int) -> Prompt[str]:
        """The prompt before the turn at `at`, rendered separately."""
        *history, asks = self._parts(self.templated.prompt_text(at))
        return Prompt(history, len(history), asks)

    def prompts_in(self, last: Prompt[str], learned: Sequence[int]) -> list[Prompt[str]] | None:
        """Cut the prompts before all learned turns out of the last one; None if their ends cannot be found.

        The template may write some of these prompts differently, so `prompts.py` renders some and compares.
        """
        return None

    def answer_in(self, prompt: Prompt[str]) -> WrittenAnswer | None:
        """The answer after a prompt, cut out of the rest of its history; None if it has no stop token."""
        return None

    def _parts(self, text: str) -> Iterator[str]:
        places = _all_places(text, self.mark) if self.mark else []
        bounds = [0, *(place for place in places if place), len(text)]
        return (text[start:end] for start, end in pairwise(bounds))

    def _assistants_before(self, at: int) -> list[int]:
        return [number for number, turn in enumerate(self.templated.record.turns[:at]) if turn.role == "assistant"]


class AtHeaders(Cuts):
    """Cuts before the header that begins each assistant turn.

    <user>q1<end> | <assistant>a1<end><user>q2<end> | <assistant>a2<end><user>q3<end> | <assistant>
    history[0]      history[1]                        history[2]                        asks

    prompt of a1    history[:1] and asks
    prompt of a2    history[:2] and asks
    prompt of a3    history[:3] and asks
    answer a2       in history[2], after its header and up to its stop token
    """

    def prompts_in(self, last: Prompt[str], learned: Sequence[int]) -> list[Prompt[str]] | None:
        assistants = self._assistants_before(learned[-1])
        # A template may write several headers in one turn, and may end a prompt after a tool result differently than
        # after a question.
        ends_as_usual = last.asks == self.templated.template.asks or bool(self.templated.variables)
        if last.length != len(assistants) + 1 or not ends_as_usual:
            return None
        parts_before = {at: number for number, at in enumerate([*assistants, learned[-1]], start=1)}
        return [last._replace(length=parts_before[at]) for at in learned]

    def answer_in(self, prompt: Prompt[str]) -> WrittenAnswer | None:
        text = prompt.history[prompt.length][len(self.mark) :]
        ends = [(place, stop) for stop in self.templated.template.stops if (place := text.find(stop)) >= 0]
        if not ends:
            return None
        place, stop = min(ends)
        return WrittenAnswer(text[:place], stop)


class AtStops(Cuts):
    """Cuts before the stop token that ends each answer, for templates without a header, for example Mistral's.

    [INST]q1[/INST]a1 | </s>[INST]q2[/INST]a2 | </s>[INST]q3[/INST]
    history[0]          history[1]              asks

    prompt of a1    history[0] up to a1
    prompt of a2    history[:1], and history[1] up to a2
    prompt of a3    history[:2] and asks
    answer a2       in history[1], after the end of its prompt
    """

    def prompts_in(self, last: Prompt[str], learned: Sequence[int]) -> list[Prompt[str]] | None:
        assistants = self._assistants_before(learned[-1])
        if last.length != len(assistants):
            return None
        number_of = {at: number for number, at in enumerate(assistants)}
        leads: dict[tuple[bool, bool, str], str] = {}
        prompts: list[Prompt[str]] = []
        for at in learned[:-1]:
            part = last.history[number_of[at]]
            start = self._start_of_answer(at, part, leads)
            if start < 0:
                return None
            prompts.append(Prompt(last.history, number_of[at], part[:start]))
        return [*prompts, last]

    def answer_in(self, prompt: Prompt[str]) -> WrittenAnswer | None:
        return WrittenAnswer(prompt.history[prompt.length][len(prompt.asks) :], self.mark)

    def _start_of_answer(self, at: int, part: str, leads: dict[tuple[bool, bool, str], str]) -> int:
        """Where the answer at `at` starts in the part that ends with it; -1 if that cannot be found.

        leads   (has text, has calls, white space before its text) → what the template writes before the text of such
                an answer, with that white space unless the template trims it; filled in here
        """
        content = str(self.templated.message_of(at)["content"])
        text, (space, _) = content.strip(), space_around(content)
        kind = bool(text), bool(self.templated.record.turns[at].calls), space
        if kind not in leads:
            lead = self._lead(at, text)
            if lead is None:
                return -1
            leads[kind] = lead
        has_calls_alone = kind[:2] == (False, True)
        return part.find(leads[kind]) if has_calls_alone else part.rfind(leads[kind] + text)

    def _lead(self, at: int, text: str) -> str | None:
        """What the template writes for a turn before its text; without a text, the control token before its calls.

        None if no control token comes before the calls, so that their beginning cannot be found. If that token is the
        one that ends the answer, the template leaves the calls out.
        """
        written = self.templated.answer_text(at, self.templated.prompt_text(at))
        if text:
            return written.partition(text)[0]
        control = self.templated.template.tokens.controls.match(written)
        return control.group() if control and control.group() != self.mark else None


def space_around(text: str) -> tuple[str, str]:
    """The white space at the beginning and at the end of a text; both are all of it if there is nothing else."""
    return text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]


def cuts_of(templated: TemplatedRecord) -> Cuts:
    """How the renderings of this record are cut."""
    template, record = templated.template, templated.record
    uses_tools = bool(record.tools) or any(turn.calls or turn.role == "tool" for turn in record.turns)
    # After a tool result, Mistral's templates begin no new assistant turn, but each answer still has its stop token.
    mark = template.cut_at_stops if uses_tools and not template.header_after_tools else template.cut
    if not mark:
        return Cuts(templated)
    return AtHeaders(templated, mark) if mark == template.header else AtStops(templated, mark)


def worth_cutting(answers: int) -> bool:
    """Whether a record with this many answers is cut out of one rendering."""
    return answers > RENDERED_EACH


def spot_checks(items: Sequence[int]) -> Iterator[int]:
    """The 1st, 2nd, 4th, 8th, … of the items, for comparing what was cut out with a separate rendering.

    Prompts grow along a conversation: all together, their length is quadratic in that of the conversation. Those chosen
    here, at doubling distances, are together not much longer than the last.
    """
    number = 1
    while number <= len(items):
        yield items[number - 1]
        number *= 2


def whole(prompt: Prompt[str]) -> str:
    """The whole text of a prompt."""
    return "".join(prompt.parts())


def _all_places(text: str, part: str) -> list[int]:
    places, at = [], text.find(part)
    while at >= 0:
        places.append(at)
        at = text.find(part, at + len(part))
    return places
