"""Ollama: a Modelfile with the trained template, system text and stop.

Ollama does not use the model's chat template; it renders prompts with Go's template language. To find the text that the
chat template writes between two messages, a conversation of marks is rendered. The Modelfile's template is made of
these texts and compared with the chat template on other conversations. If they differ, the chat template is more than
a sequence of messages, and no Modelfile is written.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atomtune.data.encoding.chat_template import CannotExpress, Message, Template

#: Marks for the system text and for the turns of user and assistant; no template contains them.
_SYSTEM = "\u2983S\u2984"
_MARKS = tuple(f"\u2983{number}\u2984" for number in range(5))
#: The places between messages: the role before ("" at the beginning) and the role after.
_PAIRS = (("", "user"), ("user", "assistant"), ("assistant", "user"))


@dataclass(frozen=True)
class Texts:
    """The texts between messages.

    before  (role before, role) → text; ("", "user") is the beginning
    ask     after the last message, where the answer begins
    """

    before: Mapping[tuple[str, str], str]
    ask: str


@dataclass(frozen=True)
class OllamaTemplate:
    """A chat template as the text before each message, chosen by its role and the role before it.

    plain        for a conversation without a system text
    with_system  for one with a system text, which replaces the mark _SYSTEM; None if the template has no place for it
    """

    plain: Texts
    with_system: Texts | None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt that Ollama renders with `go_template`."""
        system = "".join(message["content"] for message in messages if message["role"] == "system")
        texts = self.with_system if system and self.with_system is not None else self.plain
        rendered, last = "", ""
        for message in messages:
            if message["role"] != "system":
                rendered += texts.before[last, message["role"]].replace(_SYSTEM, system) + message["content"]
                last = message["role"]
        return rendered + texts.ask.replace(_SYSTEM, system)

    def go_template(self) -> str:
        """This template in Go's language. Every text is a string in an action, so that no white space is lost."""
        branches: list[str] = []
        for (last, role), text in self.plain.before.items():
            condition = f'and (eq $last "{last}") (eq $m.Role "{role}")'
            if self.with_system is not None:
                branches.append(f"{condition} $.System }}}}{_go_text(self.with_system.before[last, role])}")
            branches.append(f"{condition} }}}}{_go_text(text)}")
        lines = ['{{- $last := "" }}', "{{- range $m := .Messages }}"]
        for number, branch in enumerate(branches):
            word = "if" if number == 0 else "else if"
            lines.append(f"{{{{- {word} {branch}{{{{ $m.Content }}}}{{{{- $last = $m.Role }}}}")
        lines += ["{{- end }}", "{{- end }}"]
        if self.with_system is not None:
            lines += [f"{{{{- if $.System }}}}{_go_text(self.with_system.ask)}", "{{- else }}"]
            return "\n".join(lines) + _go_text(self.plain.ask) + "{{ end }}"
        return "\n".join(lines) + _go_text(self.plain.ask)


def _go_text(text: str) -> str:
    """Go actions that write a text, with `.System` for the mark."""
    return "{{ $.System }}".join(_go_string(part) for part in text.split(_SYSTEM))


def _go_string(text: str) -> str:
    """A Go action that writes a text. `\"\"\"` would end the Modelfile's template, so quotes are escaped as \\x22.

    Characters that are not printable, which Ollama leaves out of a Modelfile, are escaped too.
    """
    escapes = {"\\": "\\\\", '"': "\\x22", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    escaped = "".join(escapes.get(char, char if char.isprintable() else f"\\U{ord(char):08x}") for char in text)
    return f'{{{{ "{escaped}" }}}}' if text else ""


def ollama_template(template: Template, *, adds_bos: bool) -> OllamaTemplate | None:
    """The template in Ollama's form; None if it is more than a sequence of messages.

    adds_bos  whether the engine itself puts a BOS before every prompt; then the template must not
    """
    bos = template.tokenizer.bos_token if adds_bos else None

    def rendered(messages: Sequence[Message]) -> str:
        text = template.render(messages)
        return text.removeprefix(bos) if bos else text

    try:
        plain = _texts_of(rendered(_dialogue(_MARKS)))
    except (CannotExpress, ValueError):  # it writes a message twice or not at all
        return None
    try:
        system: Message = {"role": "system", "content": _SYSTEM}
        with_system = _texts_of(rendered([system, *_dialogue(_MARKS)]))
    except CannotExpress:
        with_system = None
    except ValueError:
        return None
    candidate = OllamaTemplate(plain, with_system)
    probes = [messages for messages in _conversations() if with_system is not None or messages[0]["role"] == "user"]
    return candidate if all(candidate.render(messages) == rendered(messages) for messages in probes) else None


def _texts_of(rendered: str) -> Texts:
    """The text before each mark and after the last. Raises ValueError if a mark does not occur exactly once."""
    between: list[str] = []
    rest = rendered
    for mark in _MARKS:
        before, rest = rest.split(mark)
        between.append(before)
    return Texts(dict(zip(_PAIRS, between, strict=False)), rest)  # later turns repeat the second and third text


def _dialogue(texts: Sequence[str]) -> list[Message]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def _conversations() -> list[list[Message]]:
    """Conversations on which both templates are compared: with and without a system text, of several lengths."""
    texts = ("Hello\nthere", "你好。", "x", "Good night.", "5 < 6 & 7")
    conversations: list[list[Message]] = []
    for length in (1, 3, 5):
        turns = _dialogue(texts[:length])
        conversations += [turns, [{"role": "system", "content": "Be brief."}, *turns]]
    return conversations


def model_name(folder_name: str) -> str:
    """The name of a folder as a name that Ollama accepts: up to 80 ASCII letters, digits, `_`, `-` and `.`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder_name).strip("_-.")[:70] or "tuned"


def modelfile(file: Path, template: OllamaTemplate, *, stops: Sequence[str], system: str | None) -> str:
    """The text of a Modelfile next to a GGUF. Raises ValueError for a system text that a Modelfile cannot hold."""
    lines = [f"FROM ./{file.name}", f'TEMPLATE """{template.go_template()}"""']
    if system is not None:
        if '"""' in system or system.endswith('"'):
            raise ValueError('a Modelfile cannot hold a system prompt with """ in it or a " at its end')
        # Ollama leaves out, without a word, what Go's IsPrint calls not printable, for example a full-width space.
        if lost := next((char for char in system if not char.isprintable() and char not in "\t\r\n"), None):
            raise ValueError(f"a Modelfile cannot hold a system prompt with the character U+{ord(lost):04X} in it")
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"
