"""Sandbox: whatever a template computes, it soon ends, in little memory, with a text or an error of its own."""

import datetime
import resource
import time

import pytest
from jinja2 import TemplateError

from atomtune.data.encoding import sandbox
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.jinja_render import Renderer
from atomtune.errors import BadModel
from tests.tiny import CHATML, tokenizer_of

RANGE = "{% for i in range(99999) %}"
END = "{% endfor %}"
GROWING = (
    "{% set ns = namespace(x='xy') %}{% for i in range(99) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x | length }}"
)
BOMBS = {
    "constants alone": "{{ ('a ' * 100000) | wordwrap(1) | length }}{{ (range(99999) | batch(1) | list) | length }}",
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "range by a record": "{% for i in range(10 ** (messages[0].content | length)) %}x{% endfor %}",
    "loops in loops": RANGE * 3 + "{% if i > 99999999 %}x{% endif %}" + END * 3,
    "loops of calls": RANGE * 2 + "{% set x = messages[0].content.strip() %}" + END * 2,
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop that calls itself twice": (
        "{% for x in [0] recursive %}{% if loop.depth < 60 %}{{ loop([0]) }}{{ loop([0]) }}{% endif %}{% endfor %}"
    ),
    "times": "{{ 'x' * 10**9 }}",
    "times in turn": RANGE + "{{ 'x' * 99999 }}" + END,
    "a list": "{{ ([0] * 10**9) | length }}",
    "bytes": "{{ ('x'.encode() * 10**10) | length }}",
    "powers": "{{ 9 ** 9 ** 9 }}",
    "squares": GROWING.replace("'xy'", "3").replace("EXPRESSION", "ns.x * ns.x").replace("length", "string"),
    "powers in turn": GROWING.replace("'xy'", "3").replace("EXPRESSION", "ns.x ** 64").replace("length", "string"),
    "center": "{{ 'x' | center(999999999) }}",
    "center, a method": "{{ 'x'.center(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "ljust": "{{ 'x'['ljust'](9999999999) }}",
    "tabs": "{{ '\t'.expandtabs(9999999999) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "percent, a filter": "{{ '%9999999999d' | format(1) }}",
    "precision": "{{ '%.9999999999f' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format by a value": "{{ '{:{}}'.format(1, 9999999999) }}",
    "format map": "{{ '{x:>9999999999}'.format_map({'x': 1}) }}",
    "indent": "{{ 'a\nb' | indent(9999999999) }}",
    "indent by a text": "{{ ('a\n' * 10**6) | indent('x' * 10**6) }}",
    "wordwrap": "{{ ('a ' * 10**5) | wordwrap(1, true, 'x' * 10**6) }}",
    "replace": "{{ ('a' * 10**6) | replace('a', 'x' * 10**6) }}",
    "replace nothing": "{{ ('a' * 10**6).replace('', 'x' * 10**6) }}",
    "join": "{{ range(99999) | join('x' * 10**7) }}",
    "join, a method": "{{ ('x' * 10**7).join('y' * 10**6) }}",
    "join of the same": "{{ (['x' * 10**7] * 10**6) | join }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10**10) | list | length }}",
    "round": "{{ 5 | round(-10**10) }}",
    "round up": "{{ 5.5 | round(10**10, 'ceil') }}",
    "JSON": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "bytes of a number": "{{ (1).to_bytes(10**10, 'big') | length }}",
    "sums of lists": "{{ ([range(99999) | list] * 99999) | sum(start=[]) | length }}",
    "translate": "{{ ('x' * 10**6).translate({120: 'y' * 10**6}) | length }}",
    "plus": GROWING.replace("EXPRESSION", "ns.x + ns.x"),
    "tilde": GROWING.replace("EXPRESSION", "ns.x ~ ns.x"),
    "a join": GROWING.replace("EXPRESSION", "[ns.x, ns.x] | join"),
    "a replace": GROWING.replace("EXPRESSION", "ns.x | replace('x', 'xx')"),
    "a percent": GROWING.replace("EXPRESSION", "'%s%s' % (ns.x, ns.x)"),
    "a format": GROWING.replace("EXPRESSION", "'{0}{0}'.format(ns.x)"),
    "a format filter": GROWING.replace("EXPRESSION", "'%s%s' | format(ns.x, ns.x)"),
    "lists": GROWING.replace("'xy'", "[1]").replace("EXPRESSION", "ns.x + ns.x"),
    "blocks": (
        "{% set ns = namespace(x='xy') %}{% for i in range(99) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}{{ ns.x | length }}"
    ),
    "a block of a loop": "{% set x %}" + RANGE + "{{ 'x' * 99999 }}" + END + "{% endset %}{{ x | length }}",
    "macros": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + GROWING.replace("EXPRESSION", "f(ns.x)"),
    "parentheses": "{{ " + "(" * 100_000 + ")" * 100_000 + " }}",
    "blocks in blocks": "{% for i in [1] %}" * 40 + END * 40,
    "a long one": "{{ 1 }}" * 300_000,
    "1 / 0": "{{ 1 / 0 }}",
    "a large integer": "{{ '9' * 9999 | int }}{{ ('9' * 99999) | int }}",
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.3)


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_bomb_ends_quickly_and_takes_little_memory(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    try:
        text = render(BOMBS[name])
    except Exception:  # noqa: BLE001  # any error of the template
        text = ""
    assert len(text) <= sandbox.MOST_CHARACTERS
    assert time.process_time() - began < 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 * 1024  # KiB: a few texts of 32 MB


def render(source: str) -> str:
    messages = [{"role": "user", "content": "a question of some length"}]
    return Renderer(source, {}, datetime.date(2024, 2, 29))(messages, prompt=True)


def test_a_template_timeout_is_reported_for_each_rendering_anew():
    endless = Renderer(RANGE * 3 + END * 3, {}, datetime.date(2024, 2, 29))
    for _ in range(2):
        with pytest.raises(TemplateError, match="did not finish within"):
            endless([{"role": "user", "content": "a"}], prompt=True)


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{% for x in [1, 2] %}{{ loop.length }}{{ loop.revindex }}{{ loop.last }} {% endfor %}", "22False 21True "),
        ("{% for x in 'abc' if x != 'b' %}{{ loop.nextitem }}{{ x }}{% endfor %}", "cac"),
        ("{% for k, v in {'a': 1} | items %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for x in [] %}{% else %}none{% endfor %}", "none"),
        ("{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{{ 'a-b'.replace('-', '+') }}{{ ' '.join(['a', 'b']) }}{{ 'a'.center(3) }}|", "a+ba b a |"),
        ("{{ '{}:{x}'.format(1, x=2) }}{{ '%s, %d' % ('a', 2) }}{{ '%(x)s' | format(x=1) }}", "1:2a, 21"),
        ("{{ 'a\nb' | indent }}|{{ 'a\nb' | indent(2, true) }}", "a\n    b|  a\n  b"),
        ("{{ 2 ** 10 }} {{ 3 * 'ab' }} {{ [1] * 2 + [2] }} {{ 7 % 4 }}", "1024 ababab [1, 1, 2] 3"),
        ("{{ [1, 2] | sum }} {{ 2.55 | round(1) }} {{ [1, 2, 3] | batch(2) | list }}", "3 2.5 [[1, 2], [3]]"),
        ("{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}{% set x %}a{{ 1 }}{% endset %}{{ x ~ 2 }}", "1-2a12"),
        ("{{ ', '.join([{'a': 'x'}, {'a': 'y'}] | map(attribute='a')) }} {{ '-'.join({'k': 1}.keys()) }}", "x, y k"),
        ("{{ [[1], [2, 3]] | sum(start=[]) }}", "[1, 2, 3]"),
        (
            "{{ '**%s** since 20240101, %5.1f %%' % ('it', 2) }}|{{ '%(x)-3s' % {'x': 1} }}|",
            "**it** since 20240101,   2.0 %|1  |",
        ),
    ],
)
def test_common_template_features_are_allowed(source, written):
    assert render(source) == written


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ '1e999' | float | int }}", "infinity"),
        ("{{ 'abcdef' | truncate(-5) }}", "expected length"),
        ("{{ '\\ud800' }}", "an incomplete character ('\\ud800')"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ strftime_now(5) }}", "must be str"),
        ("{% set x = messages.pop() %}", "unsafe"),
    ],
)
def test_any_exception_of_a_template_is_blamed_on_the_template(source, why):
    # Regression: Jinja's AssertionError, and a NameError of code generated while compiling, were reported as our bugs.
    with pytest.raises(BadModel) as refused:
        load_template("auto", tokenizer_of("bytes", source + CHATML))
    assert why in str(refused.value)
    assert "the template itself is at fault" in str(refused.value)
