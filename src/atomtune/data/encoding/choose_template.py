"""Choosing a chat template: the tokenizer's own, a built-in one, or a file."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from atomtune.choices import RENAMED_TEMPLATES, SPLIT_TEMPLATES, TEMPLATES
from atomtune.data.encoding.chat_template import OWN, InstructionRole, Template
from atomtune.data.encoding.jinja_render import built_in
from atomtune.data.encoding.template_probes import probed
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import BadModel, BadSettings

_FILES = (".jinja", ".jinja2", ".j2")
#: Share of tokens with a Chinese character: Llama 2 5 %, Llama 3 3 %, SmolLM2 0.2 %; Qwen3 17 %.
_CHINESE_SHARE = 0.1
_WORDS_LOOKED_AT = 4000
_NO_TEMPLATE = (
    "the tokenizer has no chat template, so --template plain is used: question and answer, each on a new line, with no "
    "added words or role markers. If this model was trained on a chat format, pass that format with --template"
)


def load_template(
    name: str, tokenizer: Tokenizer, *, variables: Mapping[str, Any] | None = None, day: date | None = None
) -> Template:
    """Load and probe the template that the user named.

    name  `auto` (the tokenizer's own, else atom for a Chinese tokenizer, else plain), a built-in name, or the path of a
          .jinja file
    Raises BadSettings for an unknown name; BadModel if the tokenizer's own template is missing or ambiguous, and
    for the reasons of `probed`.
    """
    if name == "auto" and tokenizer.chat_template:
        return restore_template(OWN, "user", tokenizer, variables=variables, day=day)
    why = ""
    if name == "auto":
        name = "atom" if _is_chinese(tokenizer) else "plain"
        why = _NO_TEMPLATE if name == "plain" else ""
    name = RENAMED_TEMPLATES.get(name, name)
    source, role = _source_of(name)
    return probed(Template(Path(name).name, source, tokenizer, role, variables or {}, day or date.today(), why=why))


def _own_source(tokenizer: Tokenizer) -> str:
    """The source of the tokenizer's own template. Raises BadModel if it has none, or several and no default."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        path, templates = tokenizer.name_or_path, tokenizer.chat_template
        has = f"chat templates {', '.join(templates)} and no default" if templates else "no chat template"
        raise BadModel(f"{path}: the tokenizer has {has}. Pass --template with a name or a .jinja file.") from None


def _is_chinese(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary was made for Chinese, as Atom's was: enough of its tokens have a Chinese character.

    Looks at a sample of about _WORDS_LOOKED_AT tokens.
    """
    own = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    sample = own[:: max(1, len(own) // _WORDS_LOOKED_AT)]
    words = [word for word in (tokenizer.decode([token]) for token in sample) if word.strip() and "\ufffd" not in word]
    chinese = [word for word in words if any("\u4e00" <= character <= "\u9fff" for character in word)]
    return len(chinese) >= _CHINESE_SHARE * len(words)


def _source_of(name: str) -> tuple[str, InstructionRole]:
    if name.endswith(_FILES):
        path = Path(name)
        if not path.is_file():
            raise BadSettings([f"--template {name}: no such file."])
        try:
            return path.read_text(encoding="utf-8-sig"), "user"  # without an editor's byte-order mark
        except UnicodeDecodeError as error:
            raise BadSettings([f"--template {name}: not UTF-8: {error}"]) from None
    if name in SPLIT_TEMPLATES:
        raise BadSettings([f"--template {name}: its format differs by generation. Pass {SPLIT_TEMPLATES[name]}."])
    if name not in TEMPLATES:
        known = ", ".join(["auto", *sorted(TEMPLATES)])
        raise BadSettings([f"--template {name}: no such template. Known: {known}, or the path of a .jinja file."])
    return built_in(name), "system" if name == "atom" else "user"


def restore_template(
    name: str,
    instruction_role: InstructionRole,
    tokenizer: Tokenizer,
    *,
    variables: Mapping[str, Any] | None = None,
    day: date | None = None,
) -> Template:
    """The tokenizer's own template, as saved with an adapter too. Raises BadModel like `load_template`."""
    source = _own_source(tokenizer)
    return probed(Template(name, source, tokenizer, instruction_role, variables or {}, day or date.today()))
