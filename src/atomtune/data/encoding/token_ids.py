"""Token ids: Pieces → the ids that a server's tokenizer gives to the same text; and escaping of control strings.

Laws: no control token spans a break of a Piece; a Piece without breaks is tokenized in one go.
A control string in a record's own text is replaced by a mark while the template renders. Afterwards the string is put
back, with a break inside it:

    record     say </s> twice
    hidden     say ⟨control0⟩ twice
    rendered   User: say ⟨control0⟩ twice</s>
    Piece      User: say </s> twice</s>       breaks (11,): the first </s> is text, the second a token
"""

import contextlib
import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from atomtune.data.records import Piece
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import UserError

_MARK, _END = "\ufdd0", "\ufdd1"  # Unicode noncharacters, which have no meaning in any text
_HIDDEN = re.compile(f"{_MARK}control(\\d+){_END}")
#: Strings that look like control tokens, whether or not the tokenizer flags them as special.
LIKE_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
# Put before a text that continues another one, so that the tokenizer does not add a space as at the start of a text.
_ANCHORS = ("\n", "|", "1", "。")
#: Texts on which the Rust tokenizer is compared with the Python call before it is used directly.
_PROBES = ("Hi", " two  spaces ", "你好\n", "<s>a</s>", "")


class CannotTokenize(UserError):
    """The tokenizer failed on a text; the message says why."""


@contextlib.contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Turn a panic of the Rust tokenizer into CannotTokenize.

    It panics if a regex of tokenizer.json, such as `(a|aa)+$`, backtracks too long. PanicException cannot be imported
    and derives from BaseException, so only its name identifies it.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CannotTokenize(f"the tokenizer cannot split a text: {str(error)[:200]}") from None


class PieceTokenizer:
    """A tokenizer, its control tokens, and how it treats the start of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in tokenizer.all_special_tokens}
        # DeepSeek's <｜User｜> and <|im_end|> of some base models delimit turns but are not flagged as special.
        special |= {str(token) for token in added if token.special or LIKE_CONTROL.fullmatch(str(token))}
        # A one-character token has no room for a break, and no published tokenizer has such a control token.
        longest_first = sorted((s for s in special if len(s) > 1), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self.controls = re.compile(pattern)
        self.to_hide = re.compile(f"{_MARK}|{pattern}")
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(longest_first))

    def ids_of(self, pieces: Iterable[Piece]) -> list[list[int]]:
        """Token ids of each piece; a control string with a break inside it stays text. Raises CannotTokenize."""
        pieces = list(pieces)
        unbroken = iter(self.tokenized([piece.text for piece in pieces if not piece.breaks]))
        return [self._escaped_ids(piece) if piece.breaks else next(unbroken) for piece in pieces]

    @cached_property
    def writes_a_space(self) -> bool:
        """Whether the tokenizer adds a space to the start of a text, as SentencePiece does: `▁Paris` for `Paris`."""
        return self.tokenized(["Paris"])[0] == self._continuation(" Paris")

    @cached_property
    def _writes_a_space_before_spaces(self) -> bool:
        """Whether it adds that space even if the text starts with one: sentencepiece does, transformers' Llama not."""
        return self.tokenized([" Paris"])[0] == self._continuation("  Paris")

    def without_written_space(self, text: str) -> str:
        """The text to tokenize on its own, for an answer whose first space comes from the template.

        If the tokenizer adds a space by itself, the template's space is removed, so that there is only one.
        """
        if not text.startswith(" ") or not self.writes_a_space:
            return text
        return text[1:] if not text.startswith("  ") or self._writes_a_space_before_spaces else text

    def splits_before(self, text: str) -> bool:
        """Whether a text can be split before `text`, a control token, and the parts tokenized on their own.

        That is, whether the ids of both parts together are those of the whole, on some examples.
        """
        if not self.controls.match(text):
            return False
        for before in ("Hi", "Hi \n", " 你好", "<b>", "1\t", "\n\n"):
            for after in (text, f"{text} a", f"{text}a\n"):
                first, second, together = self.tokenized([before, after, before + after])
                if first + second != together:
                    return False
        return True

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, tokenized on its own without BOS and EOS. Raises CannotTokenize."""
        if not texts:
            return []
        if self._rust_gives_the_same:
            backend = self._backend()
            with _panics_as_errors():
                return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self._by_python_call(texts)

    def _backend(self) -> Any:
        """The Rust tokenizer, without options that an earlier call of the Python tokenizer may have set."""
        backend = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend

    def _by_python_call(self, texts: list[str]) -> list[list[int]]:
        with _panics_as_errors():
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
        return [list(ids) for ids in encoded["input_ids"]]

    @cached_property
    def _rust_gives_the_same(self) -> bool:
        """Whether the Rust tokenizer gives the same ids as the Python call; it is about twice as fast."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        called = self._by_python_call(list(_PROBES))  # this also resets truncation and padding
        return [e.ids for e in backend.encode_batch_fast(list(_PROBES), add_special_tokens=False)] == called

    def _escaped_ids(self, piece: Piece) -> list[int]:
        """Ids of a piece with control strings that must stay text.

        Between the template's own control tokens, it is tokenized with special tokens disabled, as mistral-common and
        harmony do. If the tokenizer cannot do that, each such string is split after its first character.
        """
        ids: list[int] = []
        for start, stop in self._stretches(piece):
            breaks = [at - start for at in _between(piece.breaks, start, stop)]
            text = piece.text[start:stop]
            if not breaks:
                ids += self._continuation(text) if ids else self.tokenized([text])[0]
                continue
            anew = not ids or self._begins_anew_after_controls
            plain = self._as_plain_text(text, goes_on=not anew)
            ids += self._cut_ids(text, breaks, begins=not ids) if plain is None else plain
        return ids

    def _stretches(self, piece: Piece) -> list[tuple[int, int]]:
        """Split the piece into (start, stop) stretches: each text with breaks, up to the template's control tokens.

        Neighbouring stretches without breaks are joined, so that they are tokenized in one go.
        """
        # text           say </s> twice</s>       the first </s> has a break inside, the second is the template's
        # stretches      say </s> twice | </s>
        bounds, breaks = [0], frozenset(piece.breaks)
        for match in self.controls.finditer(piece.text):
            if match.start() + 1 not in breaks:  # written by the template
                bounds += [match.start(), match.end()]
        spans = [(a, b) for a, b in itertools.pairwise([*bounds, len(piece.text)]) if a < b]
        joined: list[tuple[int, int]] = []
        for a, b in spans:
            holds_break = bool(_between(piece.breaks, a, b))
            before_holds = bool(joined) and bool(_between(piece.breaks, *joined[-1]))
            if joined and not holds_break and not before_holds:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        return joined

    def _as_plain_text(self, text: str, *, goes_on: bool) -> list[int] | None:
        """Ids of a text with special tokens disabled; None if this tokenizer cannot do that.

        goes_on  the text continues another one, so the tokenizer must not add a space before it
        """
        if not self._rust_gives_the_same:
            return None
        backend = self._backend()
        anchors = _ANCHORS if goes_on else ("",)
        backend.encode_special_tokens = True
        try:
            with _panics_as_errors():
                tried = [
                    backend.encode_batch_fast([anchor, anchor + text], add_special_tokens=False) for anchor in anchors
                ]
        finally:
            backend.encode_special_tokens = False
        for alone, together in tried:
            if together.ids[: len(alone.ids)] == alone.ids and (alone.ids or not goes_on):
                ids: list[int] = together.ids[len(alone.ids) :]
                return ids if self.control_ids.isdisjoint(ids) else None
        return None

    @cached_property
    def _begins_anew_after_controls(self) -> bool:
        """Whether a text has the same ids after a control token as on its own."""
        control = self.tokenizer.eos_token
        if not control or not self.controls.fullmatch(control):
            return False
        alone, together = self.tokenized([control, f"{control}Hi two"])
        return alone + self.tokenized(["Hi two"])[0] == together

    def _cut_ids(self, text: str, breaks: Sequence[int], *, begins: bool) -> list[int]:
        """Ids of a text that is split at its breaks, each part tokenized on its own.

        begins  the text does not continue another one
        """
        first, *rest = [text[a:b] for a, b in itertools.pairwise([0, *breaks, len(text)])]
        ids = self.tokenized([first])[0] if begins else self._continuation(first)
        ids_of = {part: self._continuation(part) for part in dict.fromkeys(rest)}  # repeated parts are tokenized once
        for part in rest:
            ids += ids_of[part]
        return ids

    def _continuation(self, part: str) -> list[int]:
        """Ids of a text that continues another one, without the space that some tokenizers add at the start."""
        for anchor in _ANCHORS:
            alone, together = self.tokenized([anchor, anchor + part])
            if alone and together[: len(alone)] == alone:
                return together[len(alone) :]
        return self.tokenized([part])[0]


def _between(breaks: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """The breaks with start < break < stop; `breaks` is sorted."""
    return breaks[bisect_right(breaks, start) : bisect_left(breaks, stop)]


class Escaper:
    """Hides the control strings of a record's texts from the template, and turns rendered text into Pieces with breaks.

    Equal strings get equal marks, so that two renderings of the same texts have the same prefix.
    """

    def __init__(self, tokens: PieceTokenizer) -> None:
        self._tokens = tokens
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """The value with the control strings in its texts, at any depth, replaced by marks."""
        if isinstance(value, str):
            return self._tokens.to_hide.sub(self._mark, value) if self._tokens.to_hide.search(value) else value
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def _mark(self, match: re.Match[str]) -> str:
        control = match.group()
        if control not in self._hidden:
            self._hidden.append(control)
        return f"{_MARK}control{self._hidden.index(control)}{_END}"

    def hide_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A chat message with the control strings in all values but its role hidden."""
        return {key: value if key == "role" else self.hide(value) for key, value in message.items()}

    def piece(self, text: str, *, learn: bool) -> Piece:
        """The rendered text with the hidden control strings put back and a break inside each."""
        if not self._hidden:
            return Piece(text, learn)
        parts: list[str] = []
        breaks, at, length = [], 0, 0
        for match in _HIDDEN.finditer(text):
            control = self._hidden[int(match.group(1))]
            parts += [text[at : match.start()], control]
            length += match.start() - at
            if control != _MARK:
                breaks.append(length + 1)
            length, at = length + len(control), match.end()
        return Piece("".join([*parts, text[at:]]), learn, breaks=tuple(breaks))
