"""Probing a chat template: how it writes, found by rendering a few small conversations."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from atomtune.choices import TEMPLATES
from atomtune.data.encoding.chat_template import OWN, TRIMS, AnswerForm, CannotExpress, Message, Template
from atomtune.data.encoding.templated_record import TemplatedRecord
from atomtune.data.encoding.thoughts import TAGS, mentions_thoughts, opened
from atomtune.data.encoding.token_ids import LIKE_CONTROL
from atomtune.data.encoding.tokenizer_trial import patterns_of, tried_tokenizer
from atomtune.data.formats.schema import THINKING
from atomtune.data.records import Record, Turn
from atomtune.errors import BadModel
from atomtune.limits import try_in_child_process
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
#: Probing takes milliseconds. Must be less than the limit of one rendering (sandbox.MOST_SECONDS): a template that hits
#: that limit raises an exception in the trial process, which counts as passed, and would then be probed in this one.
_PROBE_SECONDS = 3


def probed(template: Template) -> Template:
    """Render a few small conversations and fill in the template's traits.

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
        tripped := try_in_child_process(lambda _say: _probed(template), seconds=_PROBE_SECONDS)
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
