"""Templates: Record → Pieces, through the very chat template a server will use.

Before: formats.py.  After: encode.py.
A template is a Jinja text, `atom` too, and it is saved with the adapter's tokenizer: what is trained is what is served,
because it is the same text. Law 2 (text from a record never becomes a control token) begins here: control strings in
a record's texts are shielded while the template renders, and their places are handed on as breaks.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

from atomtune.data.records import Piece, Record, Turn
from atomtune.errors import BadModel, BadSettings, UserError

Message = dict[str, str]
_MARK = "\ufdd0"  # Unicode noncharacters: they mean nothing in any text
_SHIELD = re.compile(f"{_MARK}control(\\d+)\ufdd1")
_ANSWER = f"{_MARK}answer\ufdd1"


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

    def messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Turns as chat messages; atom keeps an instruction and its input apart, role templates join them."""
        messages: list[Message] = []
        for turn in turns:
            if turn.role != "user" or not turn.input:
                messages.append({"role": turn.role, "content": turn.text})
            elif self.instruction_role == "system":
                messages += [{"role": "system", "content": turn.text}, {"role": "user", "content": turn.input}]
            else:
                joined = f"{turn.text}\n{turn.input}" if turn.text else turn.input
                messages.append({"role": "user", "content": joined})
        return messages

    def render(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
        """The text a server renders; with `prompt`, up to where the answer starts."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.source, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            raise CannotExpress(f"the template {self.name} cannot express it: {error}") from None

    def pieces(self, record: Record) -> tuple[Piece, Piece]:
        """The prompt, which is not learned, and the answer, which is."""
        return self.prompt_piece(self.messages(record.prompt)), self._whole(record.answer)

    def prompt_piece(self, messages: Sequence[Message]) -> Piece:
        """The rendered prompt, with a break inside every control string that comes from the messages' own texts."""
        found: list[str] = []

        def shield(match: re.Match[str]) -> str:
            found.append(match.group())
            return f"{_MARK}control{len(found) - 1}\ufdd1"

        controls = re.compile(f"{_MARK}|{self._controls.pattern}")  # a text must not imitate the shield either
        shielded = [{**m, "content": controls.sub(shield, m["content"])} for m in messages]
        text = self.render(shielded)
        if not found:
            return Piece(text, learn=False)
        parts, breaks, at, length = [], [], 0, 0
        for match in _SHIELD.finditer(text):
            control = found[int(match.group(1))]
            parts += [text[at : match.start()], control]
            length += match.start() - at
            if control != _MARK:
                breaks.append(length + 1)
            length, at = length + len(control), match.end()
        return Piece("".join([*parts, text[at:]]), learn=False, breaks=tuple(breaks))

    def _whole(self, answer: str) -> Piece:
        return Piece(answer, learn=True, breaks=tuple(m.start() + 1 for m in self._controls.finditer(answer)))

    @property
    def _controls(self) -> re.Pattern[str]:
        return control_pattern(self.tokenizer)


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches every string that this tokenizer reads as a control token."""
    cached = getattr(tokenizer, "_atomtune_controls", None)
    size = len(tokenizer)
    if cached is None or cached[0] != size:
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        # One-character tokens cannot be broken, and no tokenizer in use has one as a control token.
        longest_first = sorted((s for s in special if len(s) > 1), key=len, reverse=True)
        cached = (size, re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"))
        tokenizer._atomtune_controls = cached
    return cached[1]


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
    file = resources.files("atomtune.data") / "templates" / f"{name}.jinja"
    if not file.is_file():
        known = sorted(f.name.removesuffix(".jinja") for f in file.parent.iterdir())  # type: ignore[attr-defined]
        raise BadSettings(
            [f"--template {name}: no such template. Known: auto, {', '.join(known)}, or the path of a .jinja file."]
        )
    source = file.read_text(encoding="utf-8").rstrip("\n")
    return _with_stop(name, source, tokenizer, "system" if name == "atom" else "user")


def restore_template(name: str, instruction_role: Literal["system", "user"], tokenizer: Any) -> Template:
    """The template saved with an adapter's tokenizer."""
    return _with_stop(name, tokenizer.get_chat_template(), tokenizer, instruction_role)


def _with_stop(name: str, source: str, tokenizer: Any, instruction_role: Literal["system", "user"]) -> Template:
    template = Template(name, source, tokenizer, instruction_role)
    asked = [{"role": "user", "content": "?"}]
    # What the template writes behind an answer begins with the token that ends it (<|im_end|>, <end_of_turn>, </s>).
    full = template.render([*asked, {"role": "assistant", "content": _ANSWER}], prompt=False)
    behind = full.partition(_ANSWER)[2]
    match = control_pattern(tokenizer).match(behind.lstrip())
    stop = match.group() if match else tokenizer.eos_token
    if not stop:
        raise BadModel(
            "The tokenizer has no end-of-sequence token and the template writes none, so an answer could never stop.\n"
            "Set eos_token in its tokenizer_config.json, or pass --template with one that ends answers by a token."
        )
    return Template(name, source, tokenizer, instruction_role, str(stop))
