"""Tokens: prints an example token by token, coloured by whether a token is learned.

Everything is visible: spaces, line ends, control tokens, and the bytes of a character that is split between tokens.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text
from transformers.convert_slow_tokenizer import bytes_to_unicode

from atomtune.console import Console
from atomtune.data.records import Example
from atomtune.language import message, translated

#: Maximum number of examples shown for one record.
_SHOWN_OF_A_RECORD = 8
SPACE, LINE_END, TAB = "·", "↵", "⇥"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
#: Two alternating shades each, so that token boundaries show without a separator. Control tokens: yellow and violet.
LEARNED = (Style.parse("black on #a9dfbb"), Style.parse("black on #7fcb9b"))
READ = (Style.parse("grey82 on grey19"), Style.parse("grey82 on grey27"))
CONTROL_LEARNED, CONTROL_READ = Style.parse("bold black on #f0cf65"), Style.parse("bold #c9b6ff on #2b2640")


class TokenDecoder:
    """Token id → its text for display; each id is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, str] = {}
        self.control: set[int] = set(tokenizer.all_special_ids)
        for number, token in tokenizer.added_tokens_decoder.items():
            self._added[int(number)] = str(token)
            if token.special:
                self.control.add(number)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        is_byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
        # Byte-level tokenizers write each byte as a printable character: a space as Ġ, a line end as Ċ.
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()} if is_byte_level else {}
        self._known: dict[int, str] = {}

    def __call__(self, number: int) -> str:
        """The text of a token, with invisible characters made visible; bytes of a split character look like ⟨E4⟩."""
        if number not in self._known:
            self._known[number] = with_marks(self._piece(number))
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
    text = raw.decode("utf-8", "surrogateescape")  # a byte of a split character becomes a lone surrogate
    return re.sub(r"[\udc80-\udcff]", lambda byte: f"⟨{ord(byte.group()) - 0xDC00:02X}⟩", text)


def with_marks(piece: str) -> str:
    """A token's text with invisible characters made visible."""
    marked = piece.replace(" ", SPACE).replace("\n", LINE_END).replace("\t", TAB)
    shown = ""
    for character in marked:
        shown += character if character.isprintable() else f"⟨{ord(character):02X}⟩"
    return shown or "⟨⟩"  # a token without text


def coloured(
    ids: Sequence[int], learned: Sequence[int], decoder: TokenDecoder, *, colour: bool = True, width: int = 80
) -> Text:
    """Tokens for a terminal; without colours, │ separates them and ⟦ ⟧ enclose those that are learned.

    width  maximum number of cells per line; lines break between tokens
    """
    text = Text(overflow="fold")
    learned_before, cells = False, 0
    for i, (number, times) in enumerate(zip(ids, learned, strict=True)):
        shown, is_learned = decoder(number), times > 0
        border = "" if colour else _border(i, learned_before, is_learned)
        cells += cell_len(border + shown)
        if cells > width:
            text.append("\n")
            cells = cell_len(border + shown)
        style = _style(i, is_learned, is_control=number in decoder.control) if colour else Style.null()
        text.append(border + shown, style)
        if LINE_END in shown:
            text.append("\n")
            cells = 0
        learned_before = is_learned
    if learned_before and not colour:
        text.append("⟧")
    return text


def _style(place: int, is_learned: bool, *, is_control: bool) -> Style:
    if is_control:
        return CONTROL_LEARNED if is_learned else CONTROL_READ
    shades = LEARNED if is_learned else READ
    return shades[place % 2]


def _border(place: int, learned_before: bool, is_learned: bool) -> str:
    """The separator before a token if there are no colours: who│are│you⟦I│am⟧│ok."""
    if is_learned and not learned_before:
        return "⟦"
    between = "│" if place else ""
    return f"⟧{between}" if learned_before and not is_learned else between


def legend(*, colour: bool) -> Text:
    """The legend of the colours, or of the separators."""
    if not colour:
        words = f"⟦learned⟧, the rest is read only; │ between tokens; {SPACE} space, {LINE_END} line end"
        return Text(translated(words))
    text = Text()
    styles = {
        message("learned"): LEARNED[0],
        "read only": READ[0],
        "special token, learned": CONTROL_LEARNED,
        "special token, read only": CONTROL_READ,
    }
    for word, style in styles.items():
        text.append(f" {translated(word)} ", style)
        text.append("  ")
    text.append("\n")
    return text.append(translated(f"{SPACE} space  {LINE_END} line end  ⟨E4⟩ a byte of a split character"))


def show(console: Console, examples: Sequence[Example], decoder: TokenDecoder, *, part: int = 1500) -> None:
    """Print examples token by token; of one with more than `part` tokens, only the end, which has its last answer."""
    colour = console.color_system is not None and not console.no_color
    console.print(legend(colour=colour))
    of_record = Counter(example.origin for example in examples)
    for example in _first_of_each_record(examples):
        first = max(0, len(example.ids) - part)
        n_learned = sum(times > 0 for times in example.learn)
        not_shown = f"; the first {first:,} are not shown" if first else ""
        console.say(f"\n{example.origin}  {len(example.ids):,} tokens, {n_learned:,} learned{not_shown}")
        console.print(coloured(example.ids[first:], example.learn[first:], decoder, colour=colour, width=console.width))
    for origin, count in of_record.items():
        if count > _SHOWN_OF_A_RECORD:
            console.say(f"\n{origin}  {count - _SHOWN_OF_A_RECORD:,} more examples of this record, not shown")


def _first_of_each_record(examples: Sequence[Example]) -> Iterator[Example]:
    """At most _SHOWN_OF_A_RECORD examples of each record: a conversation of thousands of turns may have as many."""
    shown: Counter[str] = Counter()
    for example in examples:
        shown[example.origin] += 1
        if shown[example.origin] <= _SHOWN_OF_A_RECORD:
            yield example
