"""Law of the engine: whatever the template, the shorter ways write what the tokenizer's apply_chat_template writes."""

import itertools

import pytest

from atomtune.data.encoding.chat_template import built_in, load_template
from atomtune.data.encoding.jinja_render import Frames, Sealed
from tests.tiny import CHATML, GEMMA, tokenizer_of

WHOLE = (
    "{% for m in messages %}<{{ m['role'] }}>BODY{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<go>{% endif %}"
)
#: Ways to look at a text, or to hand it on where nobody sees what happens to it.
LOOKS = {
    "trim": "{{ m['content'] | trim }}",
    "strip": "{{ m['content'].strip() }}",
    "attribute": "{{ m.content.upper() }}",
    "length": "{{ m['content'] | length }}",
    "equal": "{{ 'empty' if m['content'] == 'a' else 'x' }}",
    "unequal": "{{ 'empty' if m['content'] != 'a' else 'x' }}",
    "less": "{{ 1 if m['content'] < 'b' else 2 }}",
    "in": "{{ 1 if 'a' in m['content'] else 2 }}",
    "contained": "{{ 1 if m['content'] in 'abc' else 2 }}",
    "not contained": "{{ 1 if m['content'] not in m['role'] else 2 }}",
    "one of": "{{ 1 if m['content'] in ('a', 'b') else 2 }}",
    "a chain": "{{ 1 if 'a' in 'abc' and 'a' in m['content'] in 'abc' else 2 }}",
    "truth": "{% if m['content'] %}1{% else %}2{% endif %}",
    "or": "{{ m['content'] or 'nothing' }}",
    "not": "{{ not m['content'] }}",
    "starts": "{{ m['content'].startswith('a') }}",
    "slice": "{{ m['content'][1:] }}",
    "index": "{{ m['content'][0] }}",
    "letters": "{% for c in m['content'] %}{{ c }}-{% endfor %}",
    "tilde": "{% set x = 'a' ~ m['content'] %}{{ x | trim }}",
    "block": "{% set x %}{{ m['content'] }}{% endset %}{{ x | trim }}",
    "filter block": "{% filter upper %}{{ m['content'] }}{% endfilter %}",
    "macro": "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m['content']) | trim }}",
    "percent": "{{ ('%s' % m['content']) | trim }}",
    "percent of two": "{{ ('%s%s' % (m['content'], 1)) | upper }}",
    "join": "{{ [m['content'], 'x'] | join('+') | upper }}",
    "text's join": "{{ '+'.join([m['content']]).upper() }}",
    "format": "{{ '{}'.format(m['content']).upper() }}",
    "escape": "{{ m['content'] | e }}",
    "string": "{{ m['content'] | string | upper }}",
    "json": "{{ m | tojson }}",
    "messages as json": "{{ messages | tojson }}",
    "sum": "{{ ('a' + m['content']).upper() }}",
    "sum from the right": "{{ (m['content'] + 'a') | upper }}",
    "twice a sum": "{% set x = m['content'] + m['content'] %}{{ 1 if 'aa' in x else 2 }}",
    "times": "{{ (m['content'] * 2) | upper }}",
    "key": "{{ {m['content']: 1} | length }}",
    "look-up": "{{ {'a': 1}[m['content']] }}",
    "replace": "{{ 'abc' | replace('a', m['content']) }}",
    "default": "{{ m['content'] | default('x', true) }}",
    "test": "{{ 1 if m['content'] is lower else 2 }}",
    "same": "{{ 1 if m['content'] is eq('a') else 2 }}",
    "sorted": "{{ messages | map(attribute='content') | sort | join }}",
    "grouped": "{{ messages | groupby('content') | length }}",
    "namespace": "{% set ns = namespace(x=m['content']) %}{{ ns.x | trim }}",
    "namespace's sum": "{% set ns = namespace(x='') %}{% set ns.x = ns.x + m['content'] %}{{ ns.x | length }}",
    "dict": "{{ dict(x=m['content'])['x'] | trim }}",
    "range": "{{ range(m['content'] | length) | list }}",
    "refusal": "{{ raise_exception(m['content']) }}",
}
#: Templates that only copy, in every way that official ones do.
COPIES = {
    "plain": "{{ m['content'] }}",
    "attribute": "{{ m.content }}",
    "sum": "{{ '\\n' + m['content'] + '\\n' }}",
    "kept": "{% set x = '[' + m.content + ']' %}{{ x }}",
    "is string": "{% if m['content'] is string %}{{ m['content'] }}{% endif %}",
    "is defined": "{% if m['content'] is defined and m.content is not none %}{{ m.content }}{% endif %}",
    "by role": "{% if m['role'] == 'user' %}Q: {{ m['content'] }}{% else %}A: {{ m['content'] }}{% endif %}",
    "role in": "{% if m['role'] in ['user', 'x'] %}{{ m['content'] }}{% endif %}",
    "twice": "{{ m['content'] }}{{ m['content'] }}",
    "the first": "{{ messages[0]['content'] }}",
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
    except Exception as error:  # noqa: BLE001  # whatever it is: ours must fail then too
        return type(error)


def rendered(template, chat, prompt):
    try:
        return template.render(chat, prompt=prompt)
    except Exception:  # noqa: BLE001
        return Exception


@pytest.mark.parametrize("name", [*LOOKS, *(f"copy {one}" for one in COPIES)])
def test_a_template_writes_what_the_tokenizer_has_it_write(name):
    # Catches a frame taken from a template that treats texts differently by what they say.
    body = COPIES[name.removeprefix("copy ")] if name.startswith("copy ") else LOOKS[name]
    tokenizer = tokenizer_of("sentencepiece", WHOLE.replace("BODY", body))
    try:
        template = load_template("auto", tokenizer)
    except Exception:  # noqa: BLE001  # a template that refuses the first question it is asked is no template
        assert name in ("look-up", "refusal")
        return
    for chat in chats():
        for prompt in (True, False):
            expected = by_the_tokenizer(template, chat, prompt)
            ours = rendered(template, chat, prompt)
            assert ours == expected or (isinstance(expected, type) and ours is Exception), chat


@pytest.mark.parametrize("name", LOOKS)
def test_who_looks_has_no_frame(name):
    frames = Frames(WHOLE.replace("BODY", LOOKS[name]), {"eos_token": "</s>"})
    assert frames.render([{"role": "user", "content": "a"}], prompt=True) is None


@pytest.mark.parametrize("name", COPIES)
def test_who_copies_has_one(name):
    # Else all of this would be true of an engine that never takes the short way.
    frames = Frames(WHOLE.replace("BODY", COPIES[name]), {"eos_token": "</s>"})
    assert frames.render([{"role": "user", "content": "a"}], prompt=True) is not None


@pytest.mark.parametrize("name", built_in())
@pytest.mark.parametrize(("kind", "own"), [("sentencepiece", GEMMA), ("bytes", CHATML), ("characters", None)])
def test_the_built_in_templates_too(name, kind, own):
    template = load_template(name, tokenizer_of(kind, own))
    assert template.quick
    for chat in chats():
        for turns in (chat[:1], [*chat, *chat[:1]], [{"role": "system", "content": " s"}, *chat]):
            for prompt in (True, False):
                expected = by_the_tokenizer(template, turns, prompt)
                assert rendered(template, turns, prompt) == (Exception if isinstance(expected, type) else expected)


def test_a_sealed_text_has_no_way_of_a_text_but_to_be_put_behind_another():
    # A new Python may give str a new method; it must be refused too.
    open_ = {name for name in dir(str) if not name.startswith("__")}
    sealed = Sealed("a")
    for name in open_:
        with pytest.raises(Exception, match=r"^$"):
            getattr(sealed, name)()
    assert isinstance("x" + sealed + "y", Sealed)
