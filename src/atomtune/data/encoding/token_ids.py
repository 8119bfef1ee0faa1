"""Token ids: Pieces → ids, as a server's tokenizer makes them of the same text; and special-token escaping.

Laws: where a Piece has a break stands no control token; a Piece without breaks is tokenized in one go. A control string
in a record's own text is hidden while the template renders and becomes text again afterwards, with a break inside it.
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

_MARK, _END = "\ufdd0", "\ufdd1"  # Unicode noncharacters: they mean nothing in any text
_HIDDEN = re.compile(f"{_MARK}control(\\d+){_END}")
#: What reads like a control string, whether or not a tokenizer flags it as special.
LIKE_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]")
# Put before a continuing part so that the tokenizer does not take it for the beginning of a text (and write a space).
_ANCHORS = ("\n", "|", "1", "。")
#: Texts on which the short way to a tokenizer's ids is compared with the long one before it is taken.
_PROBES = ("Hi", " two  spaces ", "你好\n", "<s>a</s>", "")


class CannotTokenize(UserError):
    """The tokenizer gave up on a text; the message says why."""


@contextlib.contextmanager
def _panics_told() -> Iterator[None]:
    """A panic of the Rust tokenizer as CannotTokenize.

    It panics where a pattern of its own, out of tokenizer.json, tries too long to match: `(a|aa)+$`. The exception
    belongs to no module, is no Exception, and is known by its name alone.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CannotTokenize(f"the tokenizer cannot split a text: {str(error)[:200]}") from None


class PieceTokenizer:
    """A tokenizer, and what had to be found out about it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in tokenizer.all_special_tokens}
        # DeepSeek's <｜User｜> and some base models' <|im_end|> are not flagged special, and begin and end turns too.
        special |= {str(token) for token in added if token.special or LIKE_CONTROL.fullmatch(str(token))}
        # One-character tokens cannot be broken, and no tokenizer in use has one as a control token.
        longest_first = sorted((s for s in special if len(s) > 1), key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self.controls = re.compile(pattern)
        self.to_hide = re.compile(f"{_MARK}|{pattern}")
        self.control_ids = frozenset(tokenizer.convert_tokens_to_ids(longest_first))

    def ids_of(self, pieces: Iterable[Piece]) -> list[list[int]]:
        """Token ids of each piece; control strings are tokens only where no break says otherwise."""
        pieces = list(pieces)
        unbroken = iter(self.tokenized([piece.text for piece in pieces if not piece.breaks]))
        return [self._escaped_ids(piece) if piece.breaks else next(unbroken) for piece in pieces]

    @cached_property
    def writes_a_space(self) -> bool:
        """Whether a text tokenized on its own begins with a space, as SentencePiece's do: `▁Paris` for `Paris`."""
        return self.tokenized(["Paris"])[0] == self._continuation(" Paris")

    @cached_property
    def _writes_a_space_before_spaces(self) -> bool:
        """Whether it does that before a text that begins with one too: sentencepiece does, transformers' Llama not."""
        return self.tokenized([" Paris"])[0] == self._continuation("  Paris")

    def without_written_space(self, text: str) -> str:
        """What to tokenize on its own for the ids of a text behind a prompt that begins with a template's space."""
        if not text.startswith(" ") or not self.writes_a_space:
            return text
        return text[1:] if not text.startswith("  ") or self._writes_a_space_before_spaces else text

    def splits_before(self, text: str) -> bool:
        """Whether a text may be cut before this one, which begins with a control token, and both parts tokenized."""
        if not self.controls.match(text):
            return False
        for before in ("Hi", "Hi \n", " 你好", "<b>", "1\t", "\n\n"):
            for behind in (text, f"{text} a", f"{text}a\n"):
                first, second, together = self.tokenized([before, behind, before + behind])
                if first + second != together:
                    return False
        return True

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self._short_way_is_the_same:
            backend = self._backend()
            with _panics_told():
                return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self._called(texts)

    def _backend(self) -> Any:
        """The Rust tokenizer, without the options that another call of the Python one left behind in it."""
        backend = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend

    def _called(self, texts: list[str]) -> list[list[int]]:
        with _panics_told():
            encoded = self.tokenizer(
                texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
        return [list(ids) for ids in encoded["input_ids"]]

    @cached_property
    def _short_way_is_the_same(self) -> bool:
        """Whether the Rust tokenizer itself gives what calling the Python one gives; it is about twice as fast."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        called = self._called(list(_PROBES))  # this also lifts a truncation or padding that was left set
        return [e.ids for e in backend.encode_batch_fast(list(_PROBES), add_special_tokens=False)] == called

    def _escaped_ids(self, piece: Piece) -> list[int]:
        """Ids of a piece with control strings that are text.

        Between the template's own control tokens it is tokenized as if no text were special, which is what
        mistral-common and harmony do; where that is not possible, each such string is cut behind its first character.
        """
        ids: list[int] = []
        for start, stop in self._stretches(piece):
            breaks = [at - start for at in _between(piece.breaks, start, stop)]
            text = piece.text[start:stop]
            anew = not ids or self._begins_anew_behind_controls
            plain = self._as_plain_text(text, goes_on=not anew) if breaks else None
            if not breaks:
                ids += self._continuation(text) if ids else self.tokenized([text])[0]
            elif plain is not None:
                ids += plain
            else:
                ids += self._cut_ids(text, breaks, begins=not ids)
        return ids

    def _stretches(self, piece: Piece) -> list[tuple[int, int]]:
        """Where the piece is cut: around each run of text that holds a break, up to the template's control tokens."""
        bounds, breaks = [0], frozenset(piece.breaks)
        for match in self.controls.finditer(piece.text):
            if match.start() + 1 not in breaks:  # the template's own
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
        """Ids of a text, nothing in it special; None where this tokenizer cannot do that.

        goes_on  it stands behind other text, so that no space is written before it
        """
        if not self._short_way_is_the_same:
            return None
        backend = self._backend()
        anchors = _ANCHORS if goes_on else ("",)
        backend.encode_special_tokens = True
        try:
            with _panics_told():
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
    def _begins_anew_behind_controls(self) -> bool:
        """Whether text behind a control token has the ids that it has alone."""
        control = self.tokenizer.eos_token
        if not control or not self.controls.fullmatch(control):
            return False
        alone, together = self.tokenized([control, f"{control}Hi two"])
        return alone + self.tokenized(["Hi two"])[0] == together

    def _cut_ids(self, text: str, breaks: Sequence[int], *, begins: bool) -> list[int]:
        first, *rest = [text[a:b] for a, b in itertools.pairwise([0, *breaks, len(text)])]
        ids = self.tokenized([first])[0] if begins else self._continuation(first)
        ids_of = {part: self._continuation(part) for part in dict.fromkeys(rest)}  # of a string repeated often, once
        for part in rest:
            ids += ids_of[part]
        return ids

    def _continuation(self, part: str) -> list[int]:
        """Ids of a text that goes on from another, without the space some tokenizers write at a beginning."""
        for anchor in _ANCHORS:
            alone, together = self.tokenized([anchor, anchor + part])
            if alone and together[: len(alone)] == alone:
                return together[len(alone) :]
        return self.tokenized([part])[0]


def _between(breaks: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """Of breaks in rising order, those inside a stretch."""
    return breaks[bisect_right(breaks, start) : bisect_left(breaks, stop)]


class Escaper:
    """Hides control strings in a record's texts, and gives what was rendered from them back as Pieces with breaks.

    Equal strings have equal marks, so two renderings of the same texts begin alike.
    """

    def __init__(self, tokens: PieceTokenizer) -> None:
        self._tokens = tokens
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """The same value with the control strings in its texts, at any depth, replaced by marks."""
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
        """A chat message with the control strings of all it holds hidden, its role excepted."""
        if len(message) == 2:  # a role and a text, as nearly all are
            return {"role": message["role"], "content": self.hide(message["content"])}
        return {key: value if key == "role" else self.hide(value) for key, value in message.items()}

    def piece(self, text: str, *, learn: bool) -> Piece:
        """What was rendered, with its own texts back in it and a break inside each control string among them."""
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
