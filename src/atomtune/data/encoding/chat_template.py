"""Chat templates: messages → text, with the same template that a server will use.

Every template is Jinja source, the built-in ones too. It is saved with the adapter's tokenizer, so that training and
serving use the same template.
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

#: Name of the template that comes with the tokenizer.
OWN = "the tokenizer's own"
#: Built-in templates with a place for tools → the tokens by which a tokenizer made for them is recognized.
_FOR_TOOLS = {
    "llama3.1": {"<|start_header_id|>"},
    "mistral-tekken": {"[AVAILABLE_TOOLS]", "Ġ"},  # byte-level, in place of SentencePiece
    "mistral-v3": {"[AVAILABLE_TOOLS]"},
}
#: How templates strip white space around an answer.
TRIMS: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: text,
    "both ends": str.strip,
    "the end": str.rstrip,
    "the beginning": str.lstrip,
    "line breaks at both ends": lambda text: text.strip("\n"),
    "leading line breaks": lambda text: text.lstrip("\n"),
    "trailing line breaks": lambda text: text.rstrip("\n"),
    "trailing spaces": lambda text: text.rstrip(" "),
}


class CannotExpress(UserError):
    """The template refuses this conversation; the message says why."""


class WrittenAnswer(NamedTuple):
    """What a template writes for an answer."""

    text: str
    stop: str  # the control token after it


@dataclass(frozen=True)
class AnswerForm:
    """How a template writes the answer of a plain turn, if that depends only on the answer's text."""

    lead: str = ""  # written before every such answer; Qwen3: "<think>\n\n</think>\n\n"
    trims: str = "nothing"  # a key of TRIMS

    def written(self, text: str) -> str:
        return self.lead + TRIMS[self.trims](text)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """How a template writes, as `template_probes.probed` finds it.

    stop                the control token that ends an answer
    stops               stop, and the tokens that end other assistant turns, such as <|call|>
    after_answer        everything the template writes after an answer
    form                None: each answer must be rendered to see how it is written
    header              begins every assistant turn, with a control token; "": none, or texts cannot be split before it
    asks                the end of a prompt, from the header on; longer than header if it also opens or closes thoughts
    cut                 prompts are split before this string: header, else stop; "": they cannot be split
    cut_at_stops        the stop token, if texts can be split before it, else ""
    header_after_tools  the header follows a tool result too
    forgets_thoughts    earlier answers lose their thoughts once a new question follows
    knows_thoughts      handles thoughts separately from the text
    lets_think          the model thinks after the prompt, and an answer without thoughts has an empty block
    calls_as_text       expects a call's arguments as JSON text
    writes_bos          False if the tokenizer has a BOS token but prompts do not begin with it
    unknown_controls    control strings it writes that are not tokens of this tokenizer
    """

    stop: str = ""
    stops: tuple[str, ...] = ()
    after_answer: str = ""
    form: AnswerForm | None = None
    header: str = ""
    asks: str = ""
    cut: str = ""
    cut_at_stops: str = ""
    header_after_tools: bool = True
    forgets_thoughts: bool = False
    knows_thoughts: bool = False
    lets_think: bool = False
    calls_as_text: bool = False
    writes_bos: bool = True
    unknown_controls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template(Traits):
    """A chat template with its tokenizer; its traits are known once it has been probed."""

    name: str
    source: str = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    instruction_role: InstructionRole  # the role of an instruction that comes with an input
    variables: Mapping[str, Any] = field(default_factory=dict)  # set by the user, for example enable_thinking
    day: date = field(default_factory=date.today)  # the date that the template may write
    why: str = ""  # for the user, if no template was named and the tokenizer has none

    @property
    def title(self) -> str:
        """The template's name in messages to the user."""
        return "the tokenizer's own template" if self.name == OWN else f"the template {self.name}"

    @property
    def instruction_place(self) -> str:
        """Where a client has to put the instruction that all records share, for messages to the user."""
        return "as the system message" if self.instruction_role == "system" else "in front of the user's message"

    @property
    def suggested_for_tools(self) -> str:
        """The built-in template to suggest if this one has no place for tools."""
        vocabulary = self.tokenizer.get_vocab().keys()
        fitting = [name for name, tokens in _FOR_TOOLS.items() if tokens <= vocabulary]
        return fitting[0] if fitting else "qwen2.5"

    @property
    def names_the_day(self) -> bool:
        return "strftime_now" in self.source

    def about_thoughts(self, records: int, with_thoughts: int) -> str:
        """A note for the user on how many answers have thoughts; "" if there is nothing to say."""
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
        """Everything that decides what the template writes, except the tokenizer."""
        day = self.day.isoformat() if self.names_the_day else ""
        return [self.source, self.stop, self.instruction_role, json.dumps(self.variables, sort_keys=True), day]

    @cached_property
    def key(self) -> str:
        """Equal for templates that write the same prompts."""
        return json.dumps(self.made_of())

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the unknown token; None if there is none, or if it also ends answers, as in GPT-2."""
        unknown = self.tokenizer.unk_token_id
        return None if unknown in self.tokenizer.convert_tokens_to_ids(list(self.stops)) else unknown

    @cached_property
    def tokens(self) -> PieceTokenizer:
        return PieceTokenizer(self.tokenizer)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.source, {**self.tokenizer.special_tokens_map, **self.variables}, self.day)

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Turns as chat messages. An instruction with an input becomes two messages for atom, one for others."""
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
        """A call in the form of OpenAI's `tool_calls`, which templates expect."""
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
        """The text that a server renders; with `prompt`, it ends where the answer starts.

        Raises CannotExpress if the template refuses the conversation or fails on it.
        """
        if not messages:  # a server does not accept an empty conversation
            raise CannotExpress(f"{self.title} cannot express it: it writes nothing before an answer")
        try:
            return self._renderer(messages, prompt=prompt, tools=tools, variables=variables)
        except Exception as error:  # noqa: BLE001  # a template is a program and may raise anything
            line = getattr(error, "lineno", None)  # if the source is not valid Jinja
            place = f" (its line {line})" if line else ""
            why = str(error) or type(error).__name__
            raise CannotExpress(f"{self.title} cannot express it: {why}{place}") from None

    def prompt_piece(self, messages: Sequence[Message]) -> Piece:
        """The rendered prompt, with a break in every control string that comes from the text of a message."""
        escaper = Escaper(self.tokens)
        hidden = [escaper.hide_message(message) for message in messages]
        return escaper.piece(self.render(hidden), learn=False)

    def ended(self, written: str) -> WrittenAnswer:
        """Split what the template writes for an answer into the text before its stop token, and that token."""
        for last in list(self.tokens.controls.finditer(written))[-1:]:
            if not written[last.end() :].strip():
                return WrittenAnswer(written[: last.start()], last.group())
        if self.after_answer and written.endswith(self.after_answer):
            return WrittenAnswer(written[: -len(self.after_answer)], self.stop)
        return WrittenAnswer(written, self.stop)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool in the form of OpenAI's `tools`; "" if it has none."""
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
