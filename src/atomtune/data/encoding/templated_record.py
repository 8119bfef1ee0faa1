"""Templated record: a record's messages, and what its template renders of them: a prompt, and the answer after it.

A server sends the model everything before an answer, rendered as if the conversation ended there. The model must write
what the template writes after that, with thoughts, calls and channels:

    rendered up to the answer    <user>q1<end><assistant>a1<end><user>q2<end><assistant>
    rendered with the answer     <user>q1<end><assistant>a1<end><user>q2<end><assistant>a2<end>
    answer                                                                              a2<end>

These are the texts for training. `prompts.py` and `answers.py` find the same texts with fewer renderings.
"""

from collections.abc import Sequence
from functools import cached_property

from atomtune.data.encoding.chat_template import CannotExpress, Message, Template, tool_name
from atomtune.data.encoding.thoughts import (
    after_thoughts,
    closed,
    closing_of_no_thoughts,
    opened,
    without_opening,
)
from atomtune.data.encoding.token_ids import Escaper
from atomtune.data.records import Record
from atomtune.shared_prefix import shared_characters

#: Replaces a text if only what surrounds it matters; a noncharacter, so that no template writes it.
_OTHER = "\ufdd4"


class TemplatedRecord:
    """A record's messages in the form that its template expects, with control strings hidden.

    turns       0 user, with an input    1 assistant    2 tool    3 assistant
    messages    0 system    1 user       2 assistant    3 tool    4 assistant
    starts      0                        2              3         4              5

    A control string has the same mark in every rendering, so hiding it does not change whether the rendering with the
    answer begins with the prompt.
    """

    def __init__(self, template: Template, record: Record) -> None:
        self.template = template
        self.record = record
        self.escaper = Escaper(template.tokens)
        self.tools = self.escaper.hide(record.tools)
        self.variables = self.escaper.hide(record.variables)
        self.messages: list[Message] = []
        self._starts = [0]  # index of each turn's first message, and the number of messages
        for turn in record.turns:
            if turn.role != "text":
                self.messages += [self.escaper.hide_message(message) for message in template.messages([turn])]
            self._starts.append(len(self.messages))

    def messages_before(self, at: int) -> list[Message]:
        """The messages of all turns before the turn at `at`."""
        return self.messages[: self._starts[at]]

    def messages_of(self, at: int) -> list[Message]:
        """The messages of one turn: two if an instruction and its input are separate, none for a text."""
        return self.messages[self._starts[at] : self._starts[at + 1]]

    def message_of(self, at: int) -> Message:
        """The first message of a turn, which is the only one of an assistant turn."""
        return self.messages[self._starts[at]]

    def thinks(self, at: int) -> bool:
        """Whether a turn has thoughts, in a key of the record or inside its text."""
        return bool(self.record.turns[at].reasoning) or "reasoning_content" in self.message_of(at)

    @cached_property
    def has_thoughts(self) -> bool:
        """Whether any turn has thoughts."""
        return any(map(self.thinks, range(len(self.record.turns))))

    def last_question(self, before: int) -> int:
        """Index of the last user turn before turn `before`; 0 if there is none."""
        return next((at for at in range(before - 1, -1, -1) if self.record.turns[at].role == "user"), 0)

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        """The rendered text of these messages; with `prompt`, it ends where the next answer starts."""
        return self.template.render(messages, tools=self.tools, prompt=prompt, variables=self.variables)

    def prompt_text(self, at: int) -> str:
        """The rendered prompt before the turn at `at`. Raises CannotExpress, also if the template leaves out a tool."""
        if self.record.turns[at].role == "text":
            return self.template.tokenizer.bos_token or ""
        prompt = self.render(self.messages_before(at), prompt=True)
        if self.tools and not all(tool_name(tool) in prompt for tool in self.tools):
            title, suggested = self.template.title, self.template.suggested_for_tools
            raise CannotExpress(f"{title} has no place for tools; --template {suggested} has one")
        return prompt

    def answer_text(self, at: int, prompt: str) -> str:
        """What the template writes after this prompt if the conversation ends with the turn at `at`.

        Raises CannotExpress if the answer cannot be found.
        """
        full = self.render([*self.messages_before(at), self.message_of(at)], prompt=False)
        if full.startswith(prompt):
            return full[len(prompt) :]
        # Once the answer is there, the template writes the earlier text differently: it leaves out thoughts of earlier
        # turns, or the thoughts of this answer are not where the prompt begins them.
        turn = full[self._start_of_turn(at, full) :]
        opening = opened(prompt)
        if opening is None:
            return after_thoughts(turn) if closed(prompt) else turn
        # The prompt begins the thoughts (DeepSeek-R1): the answer continues inside them.
        if closing := closing_of_no_thoughts(turn):
            return closing
        space, closing_mark = opening
        thoughts = self.message_of(at).get("reasoning_content", "")
        return f"{thoughts}{space}{closing_mark}{space * 2}{after_thoughts(turn)}"

    def _start_of_turn(self, at: int, full: str) -> int:
        """Where the text of the turn at `at` starts in a rendering that ends with it.

        full                         …<user>q2<end><assistant>a2<end>
        rendered with another text   …<user>q2<end><assistant>?<end>
        equal beginning              …<user>q2<end><assistant>          the turn's text starts after its last header
        """
        other = _with_other_texts(self.message_of(at))
        beginning = shared_characters(full, self.render([*self.messages_before(at), other], prompt=False))
        header = self.template.header
        start = full.rfind(header, 0, beginning) if header else -1
        if start < 0:
            raise CannotExpress(
                f"{self.template.title} changes the turns before an answer once the answer is there, so "
                "the beginning of the answer cannot be found"
            )
        # If the header opens thoughts, the turn's text begins with that mark.
        return start + len(without_opening(header))


def _with_other_texts(message: Message) -> Message:
    """The message with all its texts replaced; if it has only calls, with their names replaced."""
    if message.get("tool_calls") and not message["content"] and not message.get("thinking"):
        calls = [{**call, "function": {**call["function"], "name": _OTHER}} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}
    return {key: _OTHER if isinstance(value, str) and key != "role" else value for key, value in message.items()}
