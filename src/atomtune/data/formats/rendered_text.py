"""Rendered texts: a `text` that a chat template has already rendered is parsed back into turns.

Law: turns are returned only if the same template renders them to the same text again, except for white space at its
ends, one BOS and one final stop token (tests/data/formats/test_rendered_text.py). If there is any doubt (such as a
marker inside a turn), the result is None, and the text is learned whole.
Gemma's and Mistral's templates put a system text into the first user turn. It stays there, as nothing separates them.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any

from jinja2 import TemplateError

from atomtune.data.encoding.jinja_render import Renderer, built_in
from atomtune.data.records import Turn

#: A marker near the beginning of a text, and the template family it belongs to; the one that occurs first decides.
_SIGNS = (
    ("<s>Human: ", "atom"),
    ("<s>System: ", "atom"),
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("[INST] ", "mistral"),
    ("### Instruction:\n", "alpaca"),
    ("### Human: ", "guanaco"),
    ("Human: ", "hh-rlhf"),
    ("USER: ", "vicuna"),
)
_WITHIN = 200
_BOS = ("<s>", "<bos>", "<|begin_of_text|>")
#: Stop tokens of bases, one of which may end a text of these families: no template of theirs has one of its own.
_STOPS = ("<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>", "<end_of_turn>", "<｜end▁of▁sentence｜>")
_WITH_ANY_STOP = ("alpaca", "guanaco", "hh-rlhf", "vicuna")
_TUTORIAL = "请回答用户问题: "  # separates the instruction from the input in the tutorial's format
#: Default system texts, which a template writes if the conversation has none.
_OWN_SYSTEM = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.",
    ),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
}
# Templates of published data sets, for texts that no built-in template writes.
_WITHOUT_NEWLINES = (  # the examples in Llama-Chinese's README
    "{%- for m in messages -%}{{- '<s>' + {'system': 'System: ', 'user': 'Human: ', 'assistant': 'Assistant: '}"
    "[m['role']] + m['content'] + '</s>' -}}{%- endfor -%}"
)
_LINE_ENDS = (  # Llama-Chinese's data/train_sft.csv
    "{%- for m in messages -%}{{- '<s>' + {'system': 'System: ', 'user': 'Human: ', 'assistant': 'Assistant: '}"
    "[m['role']] + m['content'] + '\\n</s>' -}}{%- endfor -%}"
)
_SIDES = (  # OpenAssistant-Guanaco and Anthropic's HH-RLHF: no stop tokens; @ is a separator, # a mark before a turn
    "{%- for m in messages -%}{{- '@' if not loop.first -}}{{- '#' + {'user': 'Human: ', 'assistant': 'Assistant: '}"
    "[m['role']] + m['content'] -}}{%- endfor -%}{{- eos_token -}}"
)
_LLAMA2 = (
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}{%- for m in messages -%}"
    "{%- if m['role'] == 'user' -%}{{- '<s>[INST] ' -}}"
    "{{- system if loop.index0 == 1 and messages[0]['role'] == 'system' -}}{{- m['content'] + ' [/INST]' -}}"
    "{%- elif m['role'] == 'assistant' -%}{{- ' ' + m['content'] + ' </s>' -}}{%- endif -%}{%- endfor -%}"
)
_LLAMA3_AS_IT_IS = (  # without trimming: Llama 3.1's default system text ends with two newlines
    "{%- for m in messages -%}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' -}}"
    "{{- m['content'] + '<|eot_id|>' -}}{%- endfor -%}"
)
_ALPACA_INPUT = (  # Stanford's original, in which the input has its own heading
    "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{- m['content'] + '\\n\\n' -}}"
    "{%- elif m['role'] == 'user' -%}{{- '### Instruction:\\n' + m['content'] + '\\n\\n' -}}"
    "{{- '### Input:\\n' + m['input'] + '\\n\\n' if m['input'] -}}"
    "{%- else -%}{{- '### Response:\\n' + m['content'] + eos_token + '\\n\\n' -}}{%- endif -%}{%- endfor -%}"
)
#: Unsloth's, with the heading of an empty input too.
_ALPACA_EVERY_INPUT = _ALPACA_INPUT.replace(" if m['input'] -}}", " -}}")


@dataclass(frozen=True, slots=True)
class TextLayout:
    """How to parse the texts of one template, and the template that must render the turns to the same text again."""

    name: str
    step: re.Pattern[str]  # one turn or one exchange; its groups are named after roles, and `input`
    markers: re.Pattern[str]  # must not occur inside a turn: the text could then be split otherwise
    stops: tuple[str, ...]  # possible ends of the text; the first is added if there is none
    source: str = ""  # the template; "": the built-in one of this name
    opening: re.Pattern[str] | None = None  # a system text before the first marker
    own_bos: bool = False  # the BOS is one of the markers, so it is neither stripped nor optional
    may_repeat: frozenset[str] = frozenset()  # roles that occur twice in a row in published texts


def _layout(name: str, step: str, markers: str, *stops: str, opening: str = "", **more: Any) -> TextLayout:
    before = re.compile(opening, re.DOTALL) if opening else None
    return TextLayout(name, re.compile(step, re.DOTALL), re.compile(markers), stops, opening=before, **more)


# Atomic groups, (?>…), prevent backtracking: if a later part of a step fails, the earlier turns are not extended past
# their end marker. They may not contain the marker anyway, and a text with many of them would take quadratic time.
_ATOM, _EOS = r"</?s>", r"(?:</s>|<\|endoftext\|>)"
_INST = r"</?s>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>"
_LLAMA3 = (
    r"<\|start_header_id\|>(?:system<\|end_header_id\|>\n\n(?P<system>.*?)|user<\|end_header_id\|>\n\n(?P<user>.*?)"
    r"|assistant<\|end_header_id\|>\n\n(?P<assistant>.*?))<\|eot_id\|>",
    r"<\|(?:(?:start|end)_header_id|eot_id|eom_id|python_tag|begin_of_text)\|>",
    "<|eot_id|>",
)
_ALPACA = (
    r"### Instruction:\n(?>(?P<user>.*?)\n\n(?=### (?:Input|Response):\n))"
    r"(?:### Input:\n(?>(?P<input>.*?)\n\n(?=### Response:\n)))?"
    rf"### Response:\n(?P<assistant>.*?){_EOS}(?:\n\n|\Z)",
    rf"### (?:Instruction|Input|Response):|<s>|{_EOS}",
    *("</s>", "<|endoftext|>"),
)


def _sides(name: str, between: str, mark: str) -> TextLayout:
    """The layout of Human and Assistant turns, with a mark before each and a separator between them."""
    human, assistant = f"{mark}Human: ", f"{mark}Assistant: "
    return _layout(
        name,
        rf"{human}(?>(?P<user>.*?){between}{assistant})(?P<assistant>.*?)(?:{between}(?={human})|</s>)",
        *(rf"{mark or f'(?:^|{between})'}(?:Human|Assistant):|</?s>", "</s>"),
        source=_SIDES.replace("@", between.replace("\n", "\\n")).replace("#", mark),
    )


_ALPACA_OPENING = r"(?!### Instruction:\n)(?P<system>.*?)\n\n(?=### Instruction:\n)"
#: Family → its layouts; the first that can parse a text and render it again is used.
_LAYOUTS: dict[str, tuple[TextLayout, ...]] = {
    "tutorial": (
        _layout(
            "atom",
            rf"<s>(?:System: (?P<system>.*?)\n|Human: (?>(?P<user>.*?){_TUTORIAL})(?P<input>.*?)\n"
            r"|Assistant:(?P<assistant>.*?))</s>",
            *(f"{_ATOM}|{_TUTORIAL}", "</s>"),
            own_bos=True,
        ),
    ),
    "atom": (
        # In Llama-Chinese's data files every turn, answers too, ends with a newline that is not part of its text.
        _layout(
            "atom-official",
            r"<s>(?:System: (?P<system>.*?)|Human: (?P<user>.*?)|Assistant: (?P<assistant>.*?))\n</s>",
            *(_ATOM, "\n</s>"),
            source=_LINE_ENDS,
            own_bos=True,
            may_repeat=frozenset({"user"}),
        ),
        _layout(
            "atom-official",
            r"<s>(?:System: (?P<system>.*?)\n|Human: (?P<user>.*?)\n|Assistant: (?P<assistant>.*?))</s>",
            *(_ATOM, "</s>"),
            own_bos=True,
            may_repeat=frozenset({"user"}),
        ),
        _layout(
            "atom-official",
            r"<s>(?:System: (?P<system>.*?)|Human: (?P<user>.*?)(?<!\n)|Assistant: (?P<assistant>.*?))</s>",
            *(_ATOM, "</s>"),
            source=_WITHOUT_NEWLINES,
            own_bos=True,
            may_repeat=frozenset({"user"}),
        ),
    ),
    "chatml": (
        _layout(
            "chatml",
            r"<\|im_start\|>(?:system\n(?P<system>.*?)|user\n(?P<user>.*?)|assistant\n(?P<assistant>.*?)"
            r"|tool\n(?P<tool>.*?))<\|im_end\|>(?:\n|\Z)",
            *(r"<\|im_(?:start|end)\|>", "<|im_end|>"),
        ),
    ),
    "llama3": (_layout("llama3", *_LLAMA3), _layout("llama3", *_LLAMA3, source=_LLAMA3_AS_IT_IS)),
    "gemma": (
        _layout(
            "gemma",
            r"<start_of_turn>(?:user\n(?P<user>.*?)|model\n(?P<assistant>.*?))<end_of_turn>(?:\n|\Z)",
            *(r"<(?:start|end)_of_turn>|<bos>", "<end_of_turn>"),
        ),
    ),
    "mistral": (
        _layout(
            "llama2",
            r"<s>\[INST\] (?:<<SYS>>\n(?>(?P<system>.*?)\n<</SYS>>\n\n))?"
            r"(?>(?P<user>.*?) \[/INST\] )(?P<assistant>.*?) </s>",
            *(_INST, " </s>"),
            source=_LLAMA2,
            own_bos=True,
        ),
        _layout("mistral-v3", r"\[INST\] (?>(?P<user>.*?)\[/INST\] )(?P<assistant>.*?)</s>", _INST, "</s>"),
    ),
    "alpaca": (
        _layout("alpaca", *_ALPACA, opening=_ALPACA_OPENING),
        _layout("alpaca", *_ALPACA, opening=_ALPACA_OPENING, source=_ALPACA_INPUT),
        _layout("alpaca", *_ALPACA, opening=_ALPACA_OPENING, source=_ALPACA_EVERY_INPUT),
    ),
    "guanaco": tuple(_sides("guanaco", between, "### ") for between in ("\n\n", "\n", "")),
    "hh-rlhf": (_sides("hh-rlhf", "\n\n", ""),),
    "vicuna": (
        _layout(
            "vicuna",
            r"USER: (?>(?P<user>.*?) ASSISTANT: )(?P<assistant>.*?)</s>",
            *(r"\b(?:USER|ASSISTANT):|</?s>", "</s>"),
            opening=r"(?!USER: )(?P<system>.*?) (?=USER: )",
        ),
    ),
}


def turns_of(text: str) -> tuple[str, tuple[Turn, ...]] | None:
    """The template that rendered this text, and its turns; None unless that is certain.

    The name is that of a built-in template, or `llama2`, whose published data looks much like Mistral's.
    """
    family = _family(text)
    if family is None:
        return None
    if family in _WITH_ANY_STOP:
        text = _with_a_known_stop(text.strip())
    for layout in _LAYOUTS[family]:
        bare, stop = _bare(text, layout)
        if not stop and _ends_within(bare, layout.stops):
            continue
        turns = _take_apart(bare + (stop or layout.stops[0]), layout)
        if turns is None:
            continue
        if _bare(_write(turns, layout, stop or layout.stops[0]), layout)[0] == bare:
            return layout.name, _without_own_system(turns, layout.name)
    return None


def _with_a_known_stop(text: str) -> str:
    """The text with `</s>` at its end instead of another stop token, which would be read as a part of the answer."""
    for stop in _STOPS:
        if text.endswith(stop):
            return text.removesuffix(stop) + "</s>"
    return text


def begins_like(text: str) -> str:
    """The name of the template whose markers are near the beginning of this text; "" if there are none."""
    family = _family(text)
    return "" if family is None else _LAYOUTS[family][0].name


def _family(text: str) -> str | None:
    """The family whose marker comes first. `in` and `find` are many times faster here than a regular expression."""
    head = text[:_WITHIN]
    signs = [(head.find(sign), family) for sign, family in _SIGNS if sign in head]
    if not signs:
        return None
    _, family = min(signs)
    return "tutorial" if family == "atom" and _TUTORIAL in text else family


def _bare(text: str, layout: TextLayout) -> tuple[str, str]:
    """The text without optional white space, BOS and stop token at its ends; and that stop token, or ""."""
    text = text.strip()
    if not layout.own_bos:
        for bos in _BOS:
            if text.startswith(bos):
                text = text.removeprefix(bos).lstrip()
                break
    for stop in layout.stops:
        if text.endswith(stop):
            return text.removesuffix(stop), stop
    return text, ""


def _ends_within(text: str, stops: Sequence[str]) -> bool:
    """Whether the text ends in the middle of a stop token."""
    beginnings = [stop.strip()[:length] for stop in stops for length in range(1, len(stop.strip()))]
    return any(text.endswith(beginning) for beginning in beginnings)


def _take_apart(text: str, layout: TextLayout) -> tuple[Turn, ...] | None:
    """The whole text as turns, or None; the caller checks that the template renders them to the same text."""
    turns: list[Turn] = []
    at = 0
    opening = layout.opening.match(text) if layout.opening else None
    if opening:
        turns += _turns_in(opening)
        at = opening.end()
    while at < len(text):
        step = layout.step.match(text, at)
        if step is None:
            return None
        turns += _turns_in(step)
        at = step.end()
    for turn in turns:
        if layout.markers.search(turn.text) or layout.markers.search(turn.input):
            return None
    return tuple(turns) if _is_a_conversation(turns, layout) else None


def _turns_in(step: re.Match[str]) -> Iterator[Turn]:
    texts = step.groupdict()
    for role in ("system", "user", "tool", "assistant"):
        if texts.get(role) is not None:
            yield Turn(role, texts[role], (texts.get("input") or "") if role == "user" else "")


def _is_a_conversation(turns: Sequence[Turn], layout: TextLayout) -> bool:
    """Whether it begins with a user turn and no role follows itself, except those of `may_repeat`.

    It may end with a question: turns after the last answer are dropped when the text is read as a record, and a text
    without any answer is refused there.
    """
    roles = [turn.role for turn in turns if turn.role != "system"]
    if not roles or roles[0] != "user":
        return False
    repeated = {before for before, after in itertools.pairwise(roles) if before == after}
    return repeated <= layout.may_repeat


def _without_own_system(turns: tuple[Turn, ...], name: str) -> tuple[Turn, ...]:
    is_own = turns[0].role == "system" and turns[0].text in _OWN_SYSTEM.get(name, ())
    return turns[1:] if is_own else turns


def _write(turns: Sequence[Turn], layout: TextLayout, stop: str) -> str:
    """The text that the layout's template renders for these turns; "" if it refuses them."""
    messages: list[dict[str, Any]] = []
    if layout.name in _OWN_SYSTEM and turns[0].role != "system":
        messages.append({"role": "system", "content": ""})  # without it the template writes its default
    for turn in turns:
        if layout.name == "atom" and turn.input:
            messages += [{"role": "system", "content": turn.text}, {"role": "user", "content": turn.input}]
        else:
            messages.append({"role": turn.role, "content": turn.text, "input": turn.input})
    try:
        return _renderer(layout, stop)(messages, prompt=False)
    except TemplateError:
        return ""


@cache
def _renderer(layout: TextLayout, stop: str) -> Renderer:
    """The template that writes this layout, with a stop token."""
    source = layout.source or built_in(layout.name)
    return Renderer(source, {"bos_token": "<s>", "eos_token": stop.strip()}, date.min)
