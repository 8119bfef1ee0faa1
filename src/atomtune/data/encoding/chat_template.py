"""Chat templates: messages → text, through the very template a server will use.

A template is a Jinja text, the built-in ones too, and it is saved with the adapter's tokenizer: what is trained is what
is served, because it is the same text.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, Literal, NamedTuple

from atomtune.data.encoding.jinja_render import Renderer
from atomtune.data.encoding.thoughts import with_thoughts_apart
from atomtune.data.encoding.token_ids import Escaper, PieceTokenizer
from atomtune.data.records import Piece, Turn
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import UserError

Message = dict[str, Any]
InstructionRole = Literal["system", "user"]

#: The name of the template that comes with the tokenizer.
OWN = "the tokenizer's own"
#: What a template does to the white space around an answer.
TRIMS: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: text,
    "both ends": str.strip,
    "the end": str.rstrip,
    "the beginning": str.lstrip,
    "line ends": lambda text: text.strip("\n"),
    "line ends before": lambda text: text.lstrip("\n"),
    "line ends behind": lambda text: text.rstrip("\n"),
    "spaces behind": lambda text: text.rstrip(" "),
}


class CannotExpress(UserError):
    """The template refuses this conversation; the message says why."""


class WrittenAnswer(NamedTuple):
    """What a template writes for an answer."""

    text: str
    stop: str  # the control token after it


@dataclass(frozen=True)
class AnswerForm:
    """How a template writes the answer of a plain turn, if that depends on nothing but its text."""

    lead: str = ""  # stands before every such answer: "<think>\n\n</think>\n\n" of Qwen3
    trims: str = "nothing"

    def written(self, text: str) -> str:
        return self.lead + TRIMS[self.trims](text)


@dataclass(frozen=True)
class Template:
    """A chat template and the tokenizer it speaks to. `choose_template.probed` finds out what stands below `day`."""

    name: str
    source: str = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    instruction_role: InstructionRole  # where an instruction with an input goes
    variables: Mapping[str, Any] = field(default_factory=dict)  # what the user sets in it, as enable_thinking
    day: date = field(default_factory=date.today)
    why: str = ""  # said to the user, where no template was named and the tokenizer has none
    stop: str = ""  # the control token that ends an answer
    stops: tuple[str, ...] = ()  # that, and those that end other turns of the assistant: <|call|>
    behind: str = ""  # all that the template writes behind an answer
    form: AnswerForm | None = None  # None: each answer is rendered to see how it is written
    header: str = ""  # begins every turn of the assistant with a control token; "": no text does, or none is known
    asks: str = ""  # the end of a prompt from there on; longer than header where it opens or closes thoughts
    cut: str = ""  # a control string before which prompts are cut: header, else stop; "": a text may not be cut there
    cut_at_stops: str = ""  # the stop token, where a text may be cut before it
    header_behind_tools: bool = True  # header stands behind a tool's answer too
    forgets_thoughts: bool = False  # behind a question it writes earlier answers without their thoughts
    knows_thoughts: bool = False  # it takes thoughts apart from the text
    lets_think: bool = False  # behind its prompt a model thinks, and an answer without thoughts has an empty block
    calls_as_text: bool = False  # it takes a call's arguments as JSON text
    writes_bos: bool = True  # False where the tokenizer has one and a prompt does not begin with it
    unknown_controls: tuple[str, ...] = ()  # written by the template, and no tokens of this tokenizer

    @property
    def title(self) -> str:
        """What messages call it."""
        return "the tokenizer's own template" if self.name == OWN else f"the template {self.name}"

    @property
    def instruction_place(self) -> str:
        """Where a client writes the instruction that all records share."""
        return "as the system message" if self.instruction_role == "system" else "in front of the user's message"

    @property
    def names_the_day(self) -> bool:
        return "strftime_now" in self.source

    def about_thoughts(self, records: int, with_thoughts: int) -> str:
        """What a user should know about thoughts in so many records; nothing where there is nothing to say."""
        if with_thoughts:
            return f"{with_thoughts:,} of {records:,} records have answers with thoughts"
        if not records or not self.lets_think:
            return ""
        variable = (
            "; --chat_template_kwargs '{\"enable_thinking\": false}' asks for that in the prompt too"
            if "enable_thinking" in self.source
            else ""
        )
        return (
            f"no answer has thoughts, and {self.title} lets the model think: it learns to answer without thinking"
            f"{variable}"
        )

    def made_of(self) -> list[str]:
        """All that decides what it writes, besides the tokenizer."""
        day = self.day.isoformat() if self.names_the_day else ""
        return [self.source, self.stop, self.instruction_role, json.dumps(self.variables, sort_keys=True), day]

    @cached_property
    def key(self) -> str:
        """Equal for templates that write equal prompts."""
        return json.dumps(self.made_of())

    @cached_property
    def tokens(self) -> PieceTokenizer:
        return PieceTokenizer(self.tokenizer)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.source, {**self.tokenizer.special_tokens_map, **self.variables}, self.day)

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Turns as chat messages; atom keeps an instruction and its input apart, role templates join them."""
        messages: list[Message] = []
        for turn in turns:
            if turn.role == "user" and turn.input and self.instruction_role == "system":
                messages += [{"role": "system", "content": turn.text}, {"role": "user", "content": turn.input}]
            elif turn.role == "user" and turn.input:
                joined = f"{turn.text}\n{turn.input}" if turn.text else turn.input
                messages.append({"role": "user", "content": joined})
            else:
                messages.append(self._message(turn))
        return messages

    def _message(self, turn: Turn) -> Message:
        if self.knows_thoughts:
            turn = with_thoughts_apart(turn)
        message: Message = {"role": turn.role, "content": turn.text}
        if turn.reasoning:
            message["reasoning_content"] = message["thinking"] = turn.reasoning  # gpt-oss reads the second
        if turn.calls:
            message["tool_calls"] = [self._call(call) for call in turn.calls]
        if turn.name:
            message["name"] = turn.name
        if turn.call_id:
            message["tool_call_id"] = turn.call_id
        return message

    def _call(self, call: Mapping[str, Any]) -> Message:
        """A call as OpenAI's `tool_calls` hold it, which is what templates read."""
        function = {key: value for key, value in call.items() if key != "id"}
        if self.calls_as_text and not isinstance(call.get("arguments"), str):
            function["arguments"] = json.dumps(call.get("arguments"), ensure_ascii=False)
        tool_call = {"type": "function", "function": function}
        return {"id": call["id"], **tool_call} if "id" in call else tool_call

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text a server renders; with `prompt`, up to where the answer starts."""
        if not messages:  # a server takes no conversation without a message
            raise CannotExpress(f"{self.title} cannot express it: it writes nothing before an answer")
        try:
            return self._renderer(messages, prompt=prompt, tools=tools, variables=variables)
        except Exception as error:  # noqa: BLE001  # a template is a program: what it raises is its own
            line = getattr(error, "lineno", None)  # of a text that is no template at all
            place = f" (its line {line})" if line else ""
            why = str(error) or type(error).__name__
            raise CannotExpress(f"{self.title} cannot express it: {why}{place}") from None

    def prompt_piece(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Piece:
        """The rendered prompt, with a break inside every control string that comes from the messages' own texts."""
        escaper = Escaper(self.tokens)
        hidden = [escaper.hide_message(message) for message in messages]
        return escaper.piece(self.render(hidden, tools=escaper.hide(tools)), learn=False)

    def ended(self, written: str) -> WrittenAnswer:
        """What the template writes after a prompt, as the answer's text and its stop token."""
        for last in list(self.tokens.controls.finditer(written))[-1:]:
            if not written[last.end() :].strip():
                return WrittenAnswer(written[: last.start()], last.group())
        if self.behind and written.endswith(self.behind):
            return WrittenAnswer(written[: -len(self.behind)], self.stop)
        return WrittenAnswer(written, self.stop)


def tool_name(tool: Mapping[str, Any]) -> str:
    """Of a tool as OpenAI's `tools` have it; "" where it has none."""
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
