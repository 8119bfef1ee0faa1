"""Rendering: for every template, the text equals that of the tokenizer's apply_chat_template."""

import contextlib
import datetime
import itertools

import pytest
from jinja2 import TemplateError

from atomtune.choices import TEMPLATES
from atomtune.data.encoding.chat_template import CannotExpress
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.jinja_render import Renderer
from tests.tiny import CHATML, GEMMA, tokenizer_of

WHOLE = (
    "{% for m in messages %}<{{ m['role'] }}>BODY{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<go>{% endif %}"
)
BODIES = {
    "plain": "{{ m['content'] }}",
    "attribute": "{{ m.content }}",
    "trim": "{{ m['content'] | trim }}",
    "strip": "{{ m['content'].strip() }}",
    "equal": "{{ 'empty' if m['content'] == 'a' else 'x' }}",
    "in": "{{ 1 if 'a' in m['content'] else 2 }}",
    "truth": "{% if m['content'] %}1{% else %}2{% endif %}",
    "slice": "{{ m['content'][1:] }}",
    "block": "{% set x %}{{ m['content'] }}{% endset %}{{ x | trim }}",
    "filter block": "{% filter upper %}{{ m['content'] }}{% endfilter %}",
    "macro": "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m['content']) | trim }}",
    "percent": "{{ ('%s' % m['content']) | trim }}",
    "escape": "{{ m['content'] | e }}",
    "json": "{{ m | tojson }}",
    "json, indented": "{{ messages | tojson(indent=2, separators=(',', ':'), sort_keys=true) }}",
    "times": "{{ (m['content'] * 2) | upper }}",
    "key": "{{ {m['content']: 1} | length }}",
    "sorted": "{{ messages | map(attribute='content') | sort | join }}",
    "namespace": "{% set ns = namespace(x='') %}{% set ns.x = ns.x + m['content'] %}{{ ns.x | length }}",
    "dict": "{{ dict(x=m['content'])['x'] | trim }}",
    "loop": "{{ loop.index }}{{ loop.last }}{% if loop.first %}{% continue %}{% endif %}",
    "set at the top": "{% set ns = namespace(seen=seen or 0) %}{% set seen = ns.seen + 1 %}{{ seen }}",
    "generation": "{% generation %}{{ m['content'] }}{% endgeneration %}",
    "set in a generation": "{% set x = 1 %}{% generation %}{{ x }}{% set x, y = m['content'], 2 %}{{ x }}"
    "{% endgeneration %}{{ x }}{{ y }}",
    "refusal": "{% if m['content'] == 'aa' %}{{ raise_exception('no aa here') }}{% endif %}",
}
TEXTS = ["a", " a ", "", "aa", "A<b>&", "\n", "%s{}", "\ufdd0control0\ufdd1", "你好"]


def chats() -> list[list[dict[str, str]]]:
    pairs = itertools.product(TEXTS, TEXTS[:4])
    return [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]


def by_the_tokenizer(template, chat, prompt):
    try:
        return template.tokenizer.apply_chat_template(
            chat, chat_template=template.source, tokenize=False, add_generation_prompt=prompt
        )
    except Exception:  # noqa: BLE001  # if transformers fails, ours must fail too
        return CannotExpress


def rendered(template, chat, prompt):
    try:
        return template.render(chat, prompt=prompt)
    except CannotExpress:
        return CannotExpress


@pytest.mark.parametrize("name", BODIES)
def test_rendering_matches_the_tokenizers_apply_chat_template(name):
    # Catches a filter or function that differs from the one that transformers provides, and state that one rendering
    # leaves for the next: they all share one context.
    template = load_template("auto", tokenizer_of("sentencepiece", WHOLE.replace("BODY", BODIES[name])))
    for chat in chats():
        for prompt in (True, False):
            assert rendered(template, chat, prompt) == by_the_tokenizer(template, chat, prompt), chat


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("kind", "own"), [("sentencepiece", GEMMA), ("bytes", CHATML), ("characters", None)])
def test_built_in_templates_render_like_apply_chat_template(name, kind, own):
    template = load_template(name, tokenizer_of(kind, own))
    for chat in chats():
        for turns in (chat[:1], [*chat, *chat[:1]], [{"role": "system", "content": " s"}, *chat]):
            for prompt in (True, False):
                assert rendered(template, turns, prompt) == by_the_tokenizer(template, turns, prompt)


def render(source: str, **variables) -> str:
    day = datetime.date(2024, 2, 29)
    return Renderer(source, {}, day)([{"role": "user", "content": "a"}], prompt=True, variables=variables)


def test_rendering_uses_the_runs_date_and_the_records_variables():
    assert render("{{ strftime_now('%d %b %Y') }} {{ x }}", x=1) == "29 Feb 2024 1"
    renderer = Renderer("{{ x }}{{ y }}", {"y": 2}, datetime.date(2024, 2, 29))
    message = [{"role": "user", "content": "a"}]
    assert [renderer(message, prompt=True, variables={"x": 1}), renderer(message, prompt=True)] == ["12", "2"]


@pytest.mark.parametrize("source", ["{% set ns = namespace() %}{% set ns._x = 1 %}", "{{ messages.__class__ }}x"])
def test_a_template_cannot_reach_into_python(source):
    with contextlib.suppress(TemplateError):
        assert render(source) == "x"
