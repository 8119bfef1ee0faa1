"""Choosing a chat template, and probing how it writes with a few small conversations."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from atomtune.choices import RENAMED_TEMPLATES, SPLIT_TEMPLATES, TEMPLATES
from atomtune.data.encoding.chat_template import (
    OWN,
    TRIMS,
    AnswerForm,
    CannotExpress,
    InstructionRole,
    Message,
    Template,
)
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.encoding.thoughts import TAGS, mentions_thoughts, opened
from atomtune.data.encoding.token_ids import LIKE_CONTROL
from atomtune.data.encoding.tokenizer_trial import patterns_of, tried_tokenizer
from atomtune.data.formats.schema import THINKING
from atomtune.data.records import Record, Turn
from atomtune.data.tokenizer import Tokenizer
from atomtune.errors import BadModel, BadSettings
from atomtune.limits import try_apart
from atomtune.shared_prefix import shared_characters

#: A placeholder for a message's text; a noncharacter, so that no template contains it.
_TEXT = "\ufdd5"
#: The placeholder with mixed white space around it, with more newlines than any template writes.
_SPACED = f"\n\n\n\n \n {_TEXT} \n \n\n\n\n"
_QUESTION: Message = {"role": "user", "content": "?"}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},
}
#: The name of that tool as a word of its own.
_CALLED = re.compile(r"(?<![a-zA-Z])f(?![a-zA-Z])")
#: Formats in which [INST] is a token; Llama 2 and the first Mistral write it as text.
_INST_IS_A_TOKEN = ("mistral-v3", "mistral-tekken")
_CALL_ID = "a1b2c3d4e"  # Mistral's templates require nine letters and digits
_FILES = (".jinja", ".jinja2", ".j2")
_ROLE: InstructionRole = "user"
#: Share of tokens with a Chinese character: Llama 2 5 %, Llama 3 3 %, SmolLM2 0.2 %; Qwen3 17 %.
_CHINESE_SHARE = 0.1
_WORDS_LOOKED_AT = 4000
#: Probing takes milliseconds. Must be less than the limit of one rendering (sandbox.MOST_SECONDS): a template that hits
#: that limit raises an exception in the trial process, which counts as passed, and would then be probed in this one.
_PROBE_SECONDS = 3
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
    why = ""
    if name == "auto" and tokenizer.chat_template:
        name, source, role = OWN, _own_source(tokenizer), _ROLE
    else:
        if name == "auto":
            name = "atom" if _is_chinese(tokenizer) else "plain"
            why = _NO_TEMPLATE if name == "plain" else ""
        name = RENAMED_TEMPLATES.get(name, name)
        source, role = _source_of(name)
        name = Path(name).name
    return probed(Template(name, source, tokenizer, role, variables or {}, day or date.today(), why=why))


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
    if name not in built_in():
        known = ", ".join(["auto", *built_in()])
        raise BadSettings([f"--template {name}: no such template. Known: {known}, or the path of a .jinja file."])
    file = resources.files("atomtune.data") / "templates" / f"{name}.jinja"
    return file.read_text(encoding="utf-8").rstrip("\n"), "system" if name == "atom" else "user"


def built_in() -> list[str]:
    """The names of the templates that come with the tool."""
    folder = resources.files("atomtune.data") / "templates"
    return sorted(file.name.removesuffix(".jinja") for file in folder.iterdir())


def restore_template(
    name: str,
    instruction_role: InstructionRole,
    tokenizer: Tokenizer,
    *,
    variables: Mapping[str, Any] | None = None,
    day: date | None = None,
) -> Template:
    """The template that was saved with an adapter's tokenizer. Raises BadModel like `load_template`."""
    source = _own_source(tokenizer)
    return probed(Template(name, source, tokenizer, instruction_role, variables or {}, day or date.today()))


def probed(template: Template) -> Template:
    """Render a few small conversations and fill in the template's fields from `stop` on.

    A tokenizer's regexes, and a template that is not one of ours, are untrusted programs, so they are tried in another
    process first.
    Raises BadModel if they do not finish, if the template cannot write a question and its answer, or if there is no
    token to end the answer.
    """
    if tripped := tried_tokenizer(template.tokens):
        raise BadModel(
            f"{template.tokenizer.name_or_path}: the tokenizer {tripped.words} on a long run of {tripped.at!r}.\n"
            "A pattern in its tokenizer.json backtracks without end. Use the tokenizer that was published with the "
            "model."
        )
    if template.name not in TEMPLATES and (
        tripped := try_apart(lambda _say: _probed(template), seconds=_PROBE_SECONDS)
    ):
        raise BadModel(
            f"the template {template.name} {tripped.words} when it was asked to write a short conversation.\n"
            "Pass --template with another one."
        )
    return _probed(template)


def thinking_modes(template: Template) -> dict[bool, Template]:
    """The template with thinking on and with thinking off; empty if it has only one mode.

    Raises BadModel like `probed`.
    """
    if THINKING not in template.source:
        return {}
    modes = {}
    for thinks in (True, False):
        modes[thinks] = probed(replace(template, variables={**template.variables, THINKING: thinks}))
    return modes


def runs_programs(template: Template) -> bool:
    """Whether encoding runs untrusted programs: a template that is not one of ours, or regexes of the tokenizer."""
    return template.name not in TEMPLATES or bool(patterns_of(template.tokenizer))


def _probed(template: Template) -> Template:
    tokenizer, controls = template.tokenizer, template.tokens.controls
    answer = {"role": "assistant", "content": _TEXT}
    try:
        prompt = template.render([_QUESTION])
        full = template.render([_QUESTION, answer], prompt=False)
    except CannotExpress as error:
        sentence = str(error) if str(error).endswith((".", "!", "?")) else f"{error}."
        raise BadModel(
            f"{sentence}\nThis happened with one plain question and answer, so the template itself is at fault."
        ) from None
    # The text after an answer begins with the token that ends it (<|im_end|>, <end_of_turn>, </s>).
    after_answer = full.partition(_TEXT)[2]
    match = controls.match(after_answer.lstrip())
    stop = match.group() if match else tokenizer.eos_token
    if not stop:
        raise BadModel(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token and the template writes none, so an "
            "answer could never stop.\n"
            "Set eos_token in its tokenizer_config.json, or use --template with one that ends answers with a token."
        )
    header, asks = _header(template, prompt)
    at_stops = stop if template.tokens.splits_before(stop) else ""
    cut = header or at_stops
    template = replace(
        template, stop=stop, after_answer=after_answer, header=header, asks=asks, cut=cut, cut_at_stops=at_stops
    )
    template = replace(
        template,
        form=_answer_form(template),
        knows_thoughts=opened(prompt) is not None or _writes_thoughts(template),
        forgets_thoughts=_forgets_thoughts(template),
        calls_as_text=_takes_calls_as_text(template),
        header_after_tools=_header_after_tools(template),
        writes_bos=not tokenizer.bos_token or prompt.startswith(tokenizer.bos_token),
        unknown_controls=_unknown_controls(template, full),
    )
    lead = template.form.lead if template.form is not None else ""
    template = replace(template, lets_think=opened(prompt) is not None or mentions_thoughts(lead))
    return replace(template, stops=tuple(dict.fromkeys([stop, *_other_stops(template)])))


def _unknown_controls(template: Template, written: str) -> tuple[str, ...]:
    """Strings in the rendered text that look like control tokens but are not tokens of this tokenizer."""
    tokens = {str(token) for token in template.tokenizer.added_tokens_decoder.values()}
    tokens |= template.tokenizer.get_vocab().keys()
    looks = set(LIKE_CONTROL.findall(written))
    if template.name not in _INST_IS_A_TOKEN:
        looks -= {"[INST]", "[/INST]"}
    if template.name != OWN:  # a model's own template may write these tags as plain text on purpose
        looks.update(tag for tags in TAGS for tag in tags if tag in written)
    return tuple(sorted(looks - tokens))


def _header(template: Template, prompt: str) -> tuple[str, str]:
    """The template's `header` and `asks`.

    prompt  <|im_start|>user ?<|im_end|> <|im_start|>assistant <think>
    asks                                 <|im_start|>assistant <think>
    header                               <|im_start|>assistant            as far as an earlier answer's turn agrees

    Both are "" if no control token begins the turn, or if texts cannot be split before it.
    """
    controls = template.tokens.controls
    history = _written(template, [_QUESTION])
    asks = prompt[len(history) :] if history is not None and prompt.startswith(history) else ""
    if not controls.match(asks):
        last = [match.start() for match in controls.finditer(prompt)][-1:]
        asks = prompt[last[0] :] if last and last[0] else ""
    earlier = _written(template, [_QUESTION, {"role": "assistant", "content": _TEXT}, _QUESTION])
    start = len(prompt) - len(asks)
    if not asks or earlier is None or not earlier.startswith(prompt[:start]):
        return "", ""
    turn = earlier[start:].partition(_TEXT)[0]
    header = asks[: shared_characters(asks, turn)]
    if not controls.match(header) or not template.tokens.splits_before(header):
        return "", ""
    return header, asks


def _answer_form(template: Template) -> AnswerForm | None:
    """How plain answers are written; None unless first and later answers, with any white space, are written alike."""
    question = Turn("user", "?")
    forms = set()
    for before in ([question], [question, Turn("assistant", "A"), question]):
        for text in (_TEXT, _SPACED, f"{_TEXT} \n  ", f"{_TEXT}<b>\n\n{_TEXT}"):
            try:
                templated = TemplatedRecord(template, Record((*before, Turn("assistant", text)), ""))
                prompt = templated.prompt_text(len(before))
                written, stop = template.ended(templated.answer_text(len(before), prompt))
            except CannotExpress:
                return None
            if stop != template.stop:
                return None
            forms.add(frozenset(_forms_of(written, text)))
    common = frozenset.intersection(*forms)
    for trims in TRIMS:
        for lead in sorted(form.lead for form in common if form.trims == trims):
            return AnswerForm(lead, trims)
    return None


def _forms_of(written: str, text: str) -> Iterator[AnswerForm]:
    """Every AnswerForm that turns `text` into `written`."""
    for trims, trim in TRIMS.items():
        if written.endswith(trim(text)):
            yield AnswerForm(written[: len(written) - len(trim(text))], trims)


def _writes_thoughts(template: Template) -> bool:
    turn = {"role": "assistant", "content": "A", "reasoning_content": _TEXT, "thinking": _TEXT}
    return _TEXT in (_written(template, [_QUESTION, turn]) or "")


def _forgets_thoughts(template: Template) -> bool:
    """Whether all earlier answers, up to the last question, are written without their thoughts."""
    plain: Message = {"role": "assistant", "content": "A"}
    thought = {**plain, "reasoning_content": _TEXT, "thinking": _TEXT}
    without = _written(template, [_QUESTION, plain, _QUESTION, plain, _QUESTION])
    return without is not None and without == _written(template, [_QUESTION, thought, _QUESTION, thought, _QUESTION])


def _header_after_tools(template: Template) -> bool:
    """Whether a prompt that ends with a tool result has the header after it; True if the template refuses it."""
    answered = {"role": "tool", "name": "f", "tool_call_id": _CALL_ID, "content": _TEXT}
    for arguments in ({"a": 1}, '{"a": 1}'):
        try:
            prompt = template.render([_QUESTION, _calling(arguments), answered], tools=[_TOOL])
        except CannotExpress:
            continue
        return template.header in prompt.rpartition(_TEXT)[2]
    return True


def _takes_calls_as_text(template: Template) -> bool:
    def called(arguments: Any) -> str | None:
        return _written(template, [_QUESTION, _calling(arguments)], tools=True)

    as_values = called({"a": _TEXT})
    return (as_values is None or "{'a'" in as_values) and _TEXT in (called(f'{{"a": "{_TEXT}"}}') or "")


def _calling(arguments: Any) -> Message:
    function = {"name": "f", "arguments": arguments}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def written_call(template: Template) -> str:
    """The rendered assistant turn that calls f with {"a": 1}, header included; "" if the template writes no calls."""
    call = _calling('{"a": 1}' if template.calls_as_text else {"a": 1})
    turn = (_written(template, [_QUESTION, call], tools=True) or "").rpartition(_QUESTION["content"])[2]
    return turn if _CALLED.search(turn) else ""


def _other_stops(template: Template) -> Iterator[str]:
    """The token that ends an assistant turn with a tool call, if the template writes such turns."""
    written = written_call(template)
    if written:
        yield template.ended(written)[1]


def _written(template: Template, messages: list[Message], *, tools: bool = False) -> str | None:
    """The rendered conversation; None if the template refuses it."""
    try:
        return template.render(messages, prompt=False, tools=[_TOOL] if tools else [])
    except CannotExpress:
        return None
