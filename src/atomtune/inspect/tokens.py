"""Tokens: an example as one sees it, each token apart, what is learned coloured.

Nothing is hidden: spaces, line ends, control tokens and the bytes of a character that was split are all visible.
"""

import re
from collections.abc import Sequence
from typing import Any

from rich.style import Style
from rich.text import Text

from atomtune.console import Console
from atomtune.data.records import Example

SPACE, LINE_END, TAB = "·", "↵", "⇥"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
#: Two shades each, in turn, so that boundaries show without a mark between tokens.
LEARNED = (Style.parse("black on #a9dfbb"), Style.parse("black on #7fcb9b"))
READ = (Style.parse("grey82 on grey19"), Style.parse("grey82 on grey27"))
CONTROL_LEARNED, CONTROL_READ = Style.parse("bold black on #f0cf65"), Style.parse("bold #c9b6ff on #2b2640")


def byte_of() -> dict[str, int]:
    """GPT-2's alphabet: the printable character that byte-level tokenizers write for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


class TokenDecoder:
    """How a tokenizer's ids look; each id is asked for once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self.control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.control |= set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._bytes = byte_of() if backend is not None and "ByteLevel" in str(backend.decoder) else {}
        self._known: dict[int, str] = {}

    def __call__(self, number: int) -> str:
        """What this token stands for; bytes that are no character alone as ⟨E4⟩."""
        if number not in self._known:
            self._known[number] = visible(self._piece(number))
        return self._known[number]

    def _piece(self, number: int) -> str:
        if number in self._added:
            return self._added[number]
        token = str(self._tokenizer.convert_ids_to_tokens(number))
        if byte := _BYTE.fullmatch(token):
            return _decoded(bytes([int(byte.group(1), 16)]))
        if self._bytes and all(character in self._bytes for character in token):
            return _decoded(bytes(self._bytes[character] for character in token))
        return token.replace("▁", " ")


def _decoded(raw: bytes) -> str:
    text = raw.decode("utf-8", "surrogateescape")  # a byte that is no character alone: a lone surrogate
    return re.sub(r"[\udc80-\udcff]", lambda byte: f"⟨{ord(byte.group()) - 0xDC00:02X}⟩", text)


def visible(piece: str) -> str:
    """A token's text with what is not to be seen made visible."""
    shown = piece.replace(" ", SPACE).replace("\n", LINE_END).replace("\t", TAB)
    return "".join(c if c.isprintable() else f"⟨{ord(c):02X}⟩" for c in shown) or "⟨⟩"


def coloured(ids: Sequence[int], learned: Sequence[int], decoder: TokenDecoder, *, colour: bool = True) -> Text:
    """Tokens for a terminal; without colours, │ stands between them and ⟦ ⟧ around what is learned."""
    text = Text(overflow="fold")
    for i, (number, learn) in enumerate(zip(ids, learned, strict=True)):
        shown = decoder(number)
        if not colour:
            before = learned[i - 1] if i else 0
            text.append(("⟧" if before and not learn else "") + ("⟦" if learn and not before else "│" if i else ""))
            text.append(shown)
        elif number in decoder.control:
            text.append(shown, CONTROL_LEARNED if learn else CONTROL_READ)
        else:
            text.append(shown, (LEARNED if learn else READ)[i % 2])
        if LINE_END in shown:
            text.append("\n")
    if not colour and learned and learned[-1]:
        text.append("⟧")
    return text


def legend(*, colour: bool) -> Text:
    """What the colours mean."""
    if not colour:
        return Text(f"⟦learned⟧, the rest is read only; │ between tokens; {SPACE} space, {LINE_END} line end")
    text = Text()
    for word, style in (
        ("learned", LEARNED[0]),
        ("read only", READ[0]),
        ("control token, learned", CONTROL_LEARNED),
        ("control token, read only", CONTROL_READ),
    ):
        text.append(f" {word} ", style)
        text.append("  ")
    return text.append(f"{SPACE} space  {LINE_END} line end  ⟨E4⟩ a byte of a split character")


def show(console: Console, examples: Sequence[Example], decoder: TokenDecoder, *, part: int = 1500) -> None:
    """Print examples token by token; of one that is longer than `part` tokens its end, where its answer stands."""
    colour = console.color_system is not None and not console.no_color
    console.print(legend(colour=colour))
    for example in examples:
        hidden = max(0, len(example.ids) - part)
        learned = sum(map(bool, example.learn))
        more = f"; the first {hidden:,} are not shown" if hidden else ""
        console.say(f"\n{example.origin}  {len(example.ids):,} tokens, {learned:,} learned{more}")
        console.print(coloured(example.ids[hidden:], example.learn[hidden:], decoder, colour=colour))
