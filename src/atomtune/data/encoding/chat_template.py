"""Templates: Record → Exchanges, through the very chat template a server will use.

Before: formats.py.  After: encode.py.
A template is a Jinja text, the built-in ones too, and it is saved with the adapter's tokenizer: what is trained is what
is served, because it is the same text. Each learned answer is asked for as a server asks for it: everything before it,
rendered up to where the answer starts, as if the conversation ended there.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from atomtune.data.encoding.jinja_render import Frames, compiled, is_plain
from atomtune.data.encoding.special_tokens import ANSWER, Shield, control_pattern
from atomtune.data.records import Exchange, Piece, Record, Turn
from atomtune.errors import BadModel, BadSettings, UserError

Message = dict[str, Any]
#: What reads like a control string in the texts that templates write.
_LIKE_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
_THINK = "<think>"


class CannotExpress(UserError):
    """The template refuses this conversation; the message says why."""


@dataclass(frozen=True)
class Template:
    """A chat template and the tokenizer it speaks to."""

    name: str
    source: str = field(repr=False)
    tokenizer: Any = field(repr=False)
    instruction_role: Literal["system", "user"]  # where an instruction with an input goes
    stop: str = ""  # the control token that ends an answer
    behind: str = ""  # all that the template writes behind an answer
    plain: bool = True  # an answer stands as it is behind what the template writes to ask for it
    writes_bos: bool = True  # False where the tokenizer has one and a prompt does not begin with it
    unknown_controls: tuple[str, ...] = ()  # written by the template, and no tokens of this tokenizer
    quick: bool = False  # plain texts are rendered without the tokenizer's help (engine.py)

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
                messages.append(_message(turn))
        return messages

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), prompt: bool = True
    ) -> str:
        """The text a server renders; with `prompt`, up to where the answer starts."""
        try:
            program = compiled(self.source)
            if self.quick and program is not None and not tools and is_plain(messages):
                written = self._frames.render(messages, prompt=prompt)
                if written is None:
                    return program.render(messages=messages, add_generation_prompt=prompt, **self._frames.given)
                return written
            if not messages:  # transformers renders no conversation without a message
                raise CannotExpress(f"the template {self.name} cannot express it: nothing stands before an answer")
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self.source,
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=prompt,
                )
            )
        except (TemplateError, TypeError) as error:  # a template may add texts to what is none
            line = getattr(error, "lineno", None)  # of a text that is no template at all
            place = f" (its line {line})" if line else ""
            raise CannotExpress(f"the template {self.name} cannot express it: {error}{place}") from None

    @cached_property
    def _frames(self) -> Frames:
        return Frames(self.source, {"tools": None, "documents": None, **self.tokenizer.special_tokens_map})

    def pieces(self, record: Record, at: int = -1) -> tuple[Piece, Piece]:
        """The prompt, which is not learned, and the answer behind it: the turn at `at`."""
        at %= len(record.turns)
        if record.turns[at].role == "text":
            shield = Shield(self.tokenizer)
            return Piece(self.tokenizer.bos_token or "", False), shield.whole(record.turns[at].text, learn=True)
        shield = Shield(self.tokenizer)
        # Hidden once: a control string has the same mark in the prompt and in the whole, which begins with it.
        asked = [_hidden(message, shield) for message in self.messages(record.turns[:at])]
        tools = shield.hide(record.tools)
        text = self.render(asked, tools=tools)
        if record.tools and not all(_tool_name(tool) in text for tool in record.tools):
            raise CannotExpress(f"the template {self.name} has no place for tools")
        turn = record.turns[at]
        if self.plain and not turn.reasoning and not turn.calls:
            return shield.piece(text, learn=False), shield.whole(turn.text, learn=True)
        whole = [*asked, *(_hidden(message, shield) for message in self.messages([turn]))]
        return shield.piece(text, learn=False), self._answer(turn, whole, tools, text, shield)

    def exchanges(self, record: Record) -> tuple[Exchange, ...]:
        """Every learned answer of a record with what is asked before it. Raises CannotExpress."""
        return tuple(Exchange(*self.pieces(record, at), record.turns[at].learn, at) for at in record.learned)

    def prompt_piece(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Piece:
        """The rendered prompt, with a break inside every control string that comes from the messages' own texts."""
        shield = Shield(self.tokenizer)
        hidden = [{**message, "content": shield.hide(message["content"])} for message in messages]
        return shield.piece(self.render(hidden, tools=shield.hide(tools)), learn=False)

    def _answer(
        self, turn: Turn, whole: list[Message], tools: Sequence[Mapping[str, Any]], asked: str, shield: Shield
    ) -> Piece:
        """What the template writes for an answer where nothing follows it: what a server's model must have written."""
        full = self.render(whole, tools=tools, prompt=False)
        if full.startswith(asked):
            written = shield.piece(self._ended(full[len(asked) :]), learn=True)
            same = written.text.strip() == turn.text.strip()  # white space is the template's, not the answer's
            answer = shield.whole(turn.text, learn=True) if same else written
        elif asked.rstrip().endswith(_THINK):  # the prompt begins the thoughts, as DeepSeek-R1's does
            answer = shield.whole(f"{turn.reasoning}\n</think>\n\n{turn.text}", learn=True)
        else:
            answer = shield.whole(turn.text, learn=True)
        if any(str(call.get("name")) not in answer.text for call in turn.calls):
            raise CannotExpress(f"the template {self.name} has no place for tool calls")
        return answer

    def _ended(self, written: str) -> str:
        """An answer without what the template writes behind every answer."""
        if self.behind and written.endswith(self.behind):
            return written[: -len(self.behind)]
        return written.rpartition(self.stop)[0] if self.stop in written else written


def _message(turn: Turn) -> Message:
    message: Message = {"role": turn.role, "content": turn.text}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [_tool_call(call) for call in turn.calls]
    if turn.name:
        message["name"] = turn.name
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    return message


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as OpenAI's `tool_calls` hold it, which is what templates read."""
    function = {key: value for key, value in call.items() if key != "id"}
    tool_call = {"type": "function", "function": function}
    return {"id": call["id"], **tool_call} if "id" in call else tool_call


def _hidden(message: Message, shield: Shield) -> Message:
    if len(message) == 2:  # a role and a text, as nearly all are
        return {"role": message["role"], "content": shield.hide(message["content"])}
    return {key: value if key == "role" else shield.hide(value) for key, value in message.items()}


def _tool_name(tool: Mapping[str, Any]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def load_template(name: str, tokenizer: Any) -> Template:
    """`auto` (the tokenizer's own, else atom), a built-in name, or a .jinja file.

    Raises BadSettings for a name that does not exist, BadModel when the tokenizer has no token to stop at.
    """
    if name == "auto" and tokenizer.chat_template:
        return _with_stop("the tokenizer's own", tokenizer.get_chat_template(), tokenizer, "user")
    if name == "auto":
        name = "atom"
    if name.endswith((".jinja", ".jinja2", ".j2")):
        path = Path(name)
        if not path.is_file():
            raise BadSettings([f"--template {name}: no such file."])
        try:
            return _with_stop(path.name, path.read_text(encoding="utf-8"), tokenizer, "user")
        except UnicodeDecodeError as error:
            raise BadSettings([f"--template {name}: not UTF-8: {error}"]) from None
    if name not in built_in():
        known = ", ".join(["auto", *built_in()])
        raise BadSettings([f"--template {name}: no such template. Known: {known}, or the path of a .jinja file."])
    file = resources.files("atomtune.data") / "templates" / f"{name}.jinja"
    source = file.read_text(encoding="utf-8").rstrip("\n")
    return _with_stop(name, source, tokenizer, "system" if name == "atom" else "user")


def built_in() -> list[str]:
    """The names of the templates that come with the tool."""
    folder = resources.files("atomtune.data") / "templates"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir())


def restore_template(name: str, instruction_role: Literal["system", "user"], tokenizer: Any) -> Template:
    """The template saved with an adapter's tokenizer."""
    return _with_stop(name, tokenizer.get_chat_template(), tokenizer, instruction_role)


def _with_stop(name: str, source: str, tokenizer: Any, instruction_role: Literal["system", "user"]) -> Template:
    template = Template(name, source, tokenizer, instruction_role)
    asked = [{"role": "user", "content": "?"}]
    # What the template writes behind an answer begins with the token that ends it (<|im_end|>, <end_of_turn>, </s>).
    try:
        prompt = template.render(asked)
        full = template.render([*asked, {"role": "assistant", "content": ANSWER}], prompt=False)
    except CannotExpress as error:
        raise BadModel(
            f"{error}.\nIt was asked one question and its answer, so the template itself is at fault."
        ) from None
    before, _, behind = full.partition(ANSWER)
    match = control_pattern(tokenizer).match(behind.lstrip())
    stop = match.group() if match else tokenizer.eos_token
    if not stop:
        raise BadModel(
            "The tokenizer has no end-of-sequence token and the template writes none, so an answer could never stop.\n"
            "Set eos_token in its tokenizer_config.json, or pass --template with one that ends answers by a token."
        )
    quick = Template(name, source, tokenizer, instruction_role, quick=compiled(source) is not None)
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    written = sorted(set(_LIKE_CONTROL.findall(full)) - tokens - {ANSWER})
    return Template(
        name,
        source,
        tokenizer,
        instruction_role,
        str(stop),
        behind,
        writes_bos=not tokenizer.bos_token or prompt.startswith(tokenizer.bos_token),
        plain=before.startswith(prompt) and not before[len(prompt) :].strip(),
        unknown_controls=tuple(one for one in written if one not in tokenizer.get_vocab()),
        quick=quick.quick and all(_outcome(quick, *probe) == _outcome(template, *probe) for probe in _probes()),
    )


def _probes() -> Iterator[tuple[list[Message], bool]]:
    """Conversations on which the two ways to render are compared."""
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": f" {role} {n}\n<b> "} for n, role in enumerate(roles)]
    for before in ([], [{"role": "system", "content": "S\n"}], [{"role": "system", "content": "1"}] * 2):
        for count in range(1, 5):
            for prompt in (True, False):
                yield [*before, *turns[:count]], prompt


def _outcome(template: Template, messages: list[Message], prompt: bool) -> str:
    try:
        return template.render(messages, prompt=prompt)
    except CannotExpress as error:
        return str(error)
