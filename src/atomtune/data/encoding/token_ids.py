"""Ids: Pieces → token ids, as a server's tokenizer makes them of the same text.

Before: template.py.  After: encode.py.
Law: no token reaches across a Piece's breaks; a Piece without breaks is tokenized in one go.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from atomtune.data.records import Piece

# Put before a continuing part so that the tokenizer does not take it for the beginning of a text (and write a space).
_ANCHORS = ("\n", "|", "1", "。")
#: Texts on which the short way to a tokenizer's ids is compared with the long one before it is taken.
_PROBES = ("Hi", " two  spaces ", "你好\n", "<s>a</s>", "")


def ids_of(pieces: Sequence[Piece], tokenizer: Any) -> list[list[int]]:
    """Token ids of each piece; control strings are tokens only where no break says otherwise."""
    whole = iter(_tokenize([piece.text for piece in pieces if not piece.breaks], tokenizer))
    return [_broken_ids(piece, tokenizer) if piece.breaks else next(whole) for piece in pieces]


def _tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and _short_way_is_the_same(tokenizer):
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return _called(texts, tokenizer)


def _called(texts: list[str], tokenizer: Any) -> list[list[int]]:
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _short_way_is_the_same(tokenizer: Any) -> bool:
    """Whether the Rust tokenizer itself gives what calling the Python one gives; it is about twice as fast."""
    known = getattr(tokenizer, "_atomtune_short_way", None)
    if known is None:
        called = _called(list(_PROBES), tokenizer)  # this also lifts a truncation or padding that was left set
        short = tokenizer.backend_tokenizer.encode_batch_fast(list(_PROBES), add_special_tokens=False)
        known = tokenizer._atomtune_short_way = [one.ids for one in short] == called
    return bool(known)


def _broken_ids(piece: Piece, tokenizer: Any) -> list[int]:
    bounds = [0, *piece.breaks, len(piece.text)]
    first, *rest = [piece.text[a:b] for a, b in itertools.pairwise(bounds)]
    ids = _tokenize([first], tokenizer)[0]
    for part in rest:
        ids += _continuation(part, tokenizer)
    return ids


def _continuation(part: str, tokenizer: Any) -> list[int]:
    """Ids of a text that goes on from another, without the space some tokenizers write at a beginning."""
    for anchor in _ANCHORS:
        alone, together = _tokenize([anchor, anchor + part], tokenizer)
        if alone and together[: len(alone)] == alone:
            return together[len(alone) :]
    return _tokenize([part], tokenizer)[0]
