"""Tokenizer: the part of a transformers tokenizer that this project uses, as a Protocol.

Fast and slow tokenizers of transformers satisfy it. data/ receives a tokenizer and does not import transformers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, overload


class Tokenizer(Protocol):
    """The attributes and methods of a transformers tokenizer that are used here."""

    name_or_path: str
    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    chat_template: Any  # one template, a dict of templates by name, or None
    init_kwargs: dict[str, Any]

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    @property
    def all_special_tokens(self) -> Sequence[str]: ...

    @property
    def special_tokens_map(self) -> Mapping[str, Any]: ...

    def __call__(self, text: str | Sequence[str], **options: Any) -> Mapping[str, Any]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def decode(self, token_ids: Any, **options: Any) -> str: ...

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...

    def get_chat_template(self) -> str: ...

    def save_pretrained(self, save_directory: str | Path) -> Any: ...
