"""Training uses the tokens that serving sees: kinds of conversation on published and on tiny tokenizers.

Tests on published tokenizers are slow, and skipped if these are missing. The tiny ones have small templates of the same
form, and their expected texts are written by hand.
"""

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import AddedToken

from atomtune.choices import TEMPLATES
from atomtune.data.encoding import cuts as cuts_module
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.encoding.exchanges import exchanges_of
from atomtune.data.encoding.token_ids import PieceTokenizer
from atomtune.data.formats.detect import to_record
from atomtune.data.formats.schema import Schema
from atomtune.data.ledger import Ledger
from atomtune.data.reading.raw import RawRecord
from benchmarks.token_truth import (
    KINDS,
    MISTRAL,
    TOKENIZERS,
    WEATHER,
    answered,
    assistant,
    call,
    template_for,
    user,
    verdict,
)
from tests.reading import encode
from tests.tiny import CHATML, tokenizer_of


@pytest.mark.parametrize("name", [*TOKENIZERS, *MISTRAL])
def test_training_tokens_match_served_tokens_on_published_tokenizers(name, real):
    if name in TOKENIZERS:
        real(TOKENIZERS[name][0])
    template = template_for(name)
    if template is None:
        pytest.skip("its published template comes with trl, its encoder with mistral-common")
    differing = {
        kind: str(one) for kind, record in KINDS.items() if (one := verdict(template, record)).outcome == "differs"
    }
    assert not differing


# --- tiny ones in the shape of published ones -----------------------------------------------------------------------

#: Like gpt-oss: channels, a special token after calls, no earlier thoughts.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% set later = namespace(answer=false) %}{% for x in messages[loop.index:] %}"
    "{% if x.role == 'assistant' and not x.tool_calls %}{% set later.answer = true %}{% endif %}{% endfor %}"
    "{% if not later.answer and (m.thinking or m.content) %}"
    "<|im_start|>assistant<|channel|>analysis<|message|>{{ m.thinking or m.content }}<|end|>{% endif %}"
    "<|im_start|>assistant to={{ m.tool_calls[0].function.name }}<|channel|>commentary<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}<|im_start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|im_start|>assistant<|channel|>final<|message|>{{ m.content }}<|im_end|>"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|im_start|>{{ m.role }}<|message|>{{ tools | tojson if tools and loop.first }}{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
#: Like DeepSeek-R1: the prompt opens the thoughts, and the history has none.
OPENS = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_end|>"
    "{{ m.content.split('</think>')[-1] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>SPACED{% endif %}"
)
#: Like Qwen3.5 without thinking: the prompt closes the thoughts.
CLOSES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
#: Like Llama 3.1: texts are trimmed, and text beside a call is left out.
TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
    "{% else %}{{ tools | tojson if tools and loop.first }}{{ m.content | trim }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def shaped(source: str) -> Template:
    tokenizer = tokenizer_of("bytes", source)
    more = [AddedToken(token, special=True) for token in ("<|channel|>", "<|message|>", "<|end|>", "<|call|>")]
    tokenizer.add_tokens(more, special_tokens=True)
    return load_template("auto", tokenizer)


def learned(template: Template, record: dict) -> list[str]:
    """The target spans of a record's answers as text; checks that each follows its prompt."""
    ledger = Ledger()
    (examples,) = encode([RawRecord(record, "a:1")], template, ledger, max_tokens=10_000, schema=Schema("messages"))
    texts = []
    for example in examples:
        run: list[int] = []
        for token, times in [*zip(example.ids, example.learn, strict=True), (0, 0)]:
            if times:
                run.append(token)
            elif run:
                texts.append(template.tokenizer.decode(run))
                run = []
    return texts


def test_channels_are_learned_and_a_tool_call_ends_with_its_own_stop_token():
    # Catches a final answer trained without its channel, and a second stop token after the call's own.
    template = shaped(CHANNELS)
    arguments = json.dumps({"city": "Paris"})
    assert learned(template, KINDS["thoughts and calls"]) == [
        "<|channel|>analysis<|message|>I need the tool.<|end|><|im_start|>assistant to=get_weather"
        f"<|channel|>commentary<|message|>{arguments}<|call|>",
        "<|channel|>analysis<|message|>It said 21.<|end|><|im_start|>assistant"
        "<|channel|>final<|message|>It is 21 °C.<|im_end|>",
    ]
    assert learned(template, KINDS["text beside a call"])[1] == "<|channel|>final<|message|>It is 21 °C.<|im_end|>"
    assert set(template.stops) == {"<|im_end|>", "<|call|>"}


@pytest.mark.parametrize(
    ("opening", "expected"),
    [
        ("<think>\n", "Nine times eight.\n</think>\n\n72<|endoftext|>"),
        ("<think>", "Nine times eight.</think>72<|endoftext|>"),
    ],
)
@pytest.mark.parametrize("inline", [True, False])
def test_reasoning_continues_the_think_block_opened_by_the_prompt(opening, expected, inline):
    # Catches a second <think> block after an empty one.
    template = shaped(OPENS.replace("SPACED", opening))
    apart = {"messages": [user("9*8?"), assistant("72", reasoning_content="Nine times eight.")]}
    assert learned(template, KINDS["thoughts inline"] if inline else apart) == [expected]


@pytest.mark.parametrize("template", ["qwen3", "opens"])
def test_reasoning_without_its_opening_tag_is_read_as_reasoning(template):
    # A server returns them like this if its prompt ends in the mark. Catches the message "no answer has thoughts" for
    # records that all have some, and DeepSeek-R1's template, which left them out.
    made = load_template("qwen3", tokenizer_of("bytes", CHATML))
    if template == "opens":
        made = shaped(OPENS.replace("SPACED", "<think>\n"))
    apart = {"messages": [user("9*8?"), assistant("72", reasoning_content="Nine times eight.")]}
    half = {"messages": [user("9*8?"), assistant("Nine times eight.\n</think>\n\n72")]}
    twice = {
        "messages": [
            user("9*8?"),
            assistant("<think>\nNine times eight.\n</think>\n\n72", reasoning_content="Nine times eight."),
        ]
    }
    ledger = Ledger()
    raws = [RawRecord(record, "a:1") for record in (apart, half, twice)]
    (one,), (other,), (third,) = encode(raws, made, ledger, max_tokens=10_000, schema=Schema("messages"))
    assert one == other == third
    assert ledger.records_with_thoughts == 3


@pytest.mark.parametrize("text", ["The tag </think> closes the block.", "Write <think>\n</think>\n there."])
def test_an_answer_that_mentions_think_tags_is_not_read_as_reasoning(text):
    made = shaped(OPENS.replace("SPACED", "<think>\n").replace(".split('</think>')[-1]", ""))
    ledger = Ledger()
    records = [RawRecord({"messages": [user("How?"), assistant(text)]}, "a:1")]
    encode(records, made, ledger, max_tokens=10_000, schema=Schema("messages"))
    assert ledger.records_used == 1 and not ledger.records_with_thoughts


def test_an_answer_without_reasoning_closes_the_block_opened_by_the_prompt():
    template = shaped(OPENS.replace("SPACED", "<think>\n"))
    record = {"messages": [user("9*8?"), assistant("72")]}
    assert learned(template, record) == ["\n</think>\n\n72<|endoftext|>"]


#: Like Nemotron: the prompt opens the thoughts, and an answer without thoughts has its own empty block.
OPENS_OR_EMPTY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n' if m.reasoning_content else '<think></think>' }}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_missing_reasoning_is_written_in_the_templates_own_empty_form():
    # Catches a second closing mark: `\n</think>\n\n</think>72` was once trained.
    template = shaped(OPENS_OR_EMPTY)
    assert learned(template, {"messages": [user("9*8?"), assistant("72")]}) == ["</think>72<|im_end|>"]
    thought = assistant("72", reasoning_content="Nine times eight.")
    assert learned(template, {"messages": [user("9*8?"), thought]}) == ["Nine times eight.\n</think>\n72<|im_end|>"]


#: Like Gemma 4: after a tool's answer the prompt ends without a header, but the answer has one.
NO_HEADER_BEHIND_TOOLS = (
    "{{ tools | tojson if tools }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n{% endif %}"
)


def test_an_answer_after_a_tool_result_is_learned_as_the_template_writes_it():
    answers = learned(shaped(NO_HEADER_BEHIND_TOOLS), KINDS["tool call"])
    assert answers[-1] == "<|im_start|>assistant\nIt is 21 °C in Paris.<|im_end|>"


def test_reasoning_after_a_prompt_that_closes_the_block_is_reported_unlearned():
    template = shaped(CLOSES)
    ledger = Ledger()
    records = [RawRecord(KINDS["thoughts inline"], "a:1")]
    ((example,),) = encode(records, template, ledger, max_tokens=10_000, schema=Schema("messages"))
    assert template.tokenizer.decode(example.ids).endswith("<think>\n\n</think>\n\n72<|im_end|>")
    assert any("reasoning" in notice for notice in ledger.notices)


def test_whitespace_and_text_dropped_by_the_template_are_reported():
    template = shaped(TRIMS)
    assert learned(template, KINDS["white space"]) == ["Hello.<|im_end|>", "Yes<|im_end|>"]
    for kind, word in (("white space", "whitespace"), ("text beside a call", "next to a tool call")):
        ledger = Ledger()
        raw = RawRecord(KINDS[kind], "a:1")
        assert encode([raw], template, ledger, max_tokens=10_000, schema=Schema("messages"))
        assert [times for notice, times in ledger.notices.items() if word in notice] == [1], "it counts records"


@pytest.mark.parametrize("names", [("get_weather", "get_weather"), ("get_weather", "get_time")])
def test_a_record_whose_tool_call_the_template_drops_is_refused(names):
    # gpt-oss's template writes only the first call of a turn. Two calls of one name passed, and the second was lost.
    calls = [call(name, {"city": city}, f"abcdefgh{city}") for name, city in zip(names, "12", strict=True)]
    messages = [user("Weather?"), assistant("", tool_calls=calls), answered(names[0], "5"), answered(names[1], "6")]
    record = {"tools": [WEATHER], "messages": [*messages, assistant("5 and 6.")]}
    every_call = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}")
    with_tools = "{{ tools | tojson if tools }}" + every_call
    for source, reasons in (
        (CHANNELS, ["the tokenizer's own template writes 1 of the 2 calls of a turn"]),
        (with_tools, []),
    ):
        ledger = Ledger()
        encode([RawRecord(record, "a:1")], shaped(source), ledger, max_tokens=10_000, schema=Schema("messages"))
        assert [refusal.reason for refusal in ledger.records_refused] == reasons


def test_a_record_whose_turn_the_template_drops_is_refused_naming_the_turn():
    # Catches an answer trained after a question, or a tool's answer, that the model never sees.
    deaf = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    source = deaf.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ tools | tojson if tools and loop.first }}{{ m.tool_calls }}"
    )
    template = shaped(source)
    ledger = Ledger()
    raw = RawRecord(KINDS["tool call"], "a:1")
    assert not encode([raw], template, ledger, max_tokens=10_000, schema=Schema("messages"))
    assert "leaves out what turn 3 (tool) says" in ledger.records_refused[0].reason


def test_an_empty_system_prompt_replaces_the_templates_default():
    default = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a default.<|im_end|>\n{% endif %}" + CHATML
    )
    template = shaped(default)
    raw = RawRecord(KINDS["empty system text"], "a:1")
    ((example,),) = encode([raw], template, Ledger(), max_tokens=10_000, schema=Schema("messages"))
    assert template.tokenizer.decode(example.ids).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


def test_an_end_of_turn_token_not_flagged_special_still_ends_turns():
    # Catches <|endoftext|> trained after answers of a base whose <|im_end|> is an ordinary added token.
    tokenizer = tokenizer_of("bytes", CHATML.replace("im_end", "done"))
    tokenizer.add_tokens([AddedToken("<|done|>", special=False)])
    template = load_template("auto", tokenizer)
    assert template.stop == "<|done|>"
    piece = template.prompt_piece([{"role": "user", "content": "a<|done|>b"}])
    (ids,) = template.tokens.ids_of([piece])
    assert ids.count(tokenizer.convert_tokens_to_ids("<|done|>")) == 1, "a record's own stays text"


def test_a_long_conversation_is_the_same_however_it_is_rendered():
    # Catches prompts cut at the wrong places out of one rendering; the oracle renders each prompt by itself.
    messages = [{"role": "system", "content": "S"}]
    for n in range(30):
        messages += [user(f"q{n} <|im_end|>"), assistant(f"a{n}")]
        if n % 7 == 3:
            messages[-1]["tool_calls"] = [call("get_weather", {"city": str(n)})]
            messages.append({"role": "tool", "content": f"tool {n}"})
            messages.append(assistant(f"b{n}", **({"weight": 0} if n == 10 else {})))
    template = shaped(
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}")
    )
    record = {"messages": messages}
    together = encode([RawRecord(record, "a:1")], template, Ledger(), max_tokens=10**6, schema=Schema("messages"))
    each = Template(**{**vars_of(template), "header": "", "asks": "", "cut": ""})
    apart = encode([RawRecord(record, "a:1")], each, Ledger(), max_tokens=10**6, schema=Schema("messages"))
    assert together == apart
    assert template.header


def vars_of(template: Template) -> dict:
    return {name: getattr(template, name) for name in template.__dataclass_fields__}


def test_training_a_thinking_model_without_reasoning_is_reported():
    # Catches a thinking model that silently loses its thoughts to records without any.
    plain, thinking = KINDS["question and answer"], KINDS["thoughts inline"]
    for template, names in (
        (load_template("qwen3", tokenizer_of("bytes", CHATML)), "enable_thinking"),
        (shaped(OPENS.replace("SPACED", "<think>\n")), "learns to answer without thinking"),
    ):
        ledgers = [Ledger(), Ledger()]
        for records, ledger in zip(([plain], [plain, thinking]), ledgers, strict=True):
            raws = [RawRecord(record, "a:1") for record in records]
            encode(raws, template, ledger, max_tokens=10_000, schema=Schema("messages"))
        told = [template.about_thoughts(ledger.records_used, ledger.records_with_thoughts) for ledger in ledgers]
        assert names in told[0]
        assert told[1] == "1 of 2 records have answers with thoughts"
    chatml = load_template("chatml", tokenizer_of("bytes", CHATML))
    assert chatml.about_thoughts(1, 0) == ""


def long_conversation(seed: int, *, tools: bool) -> dict:
    """Up to 20 exchanges, a few with thoughts, calls, answers that are no targets, or their own mode."""
    draw = random.Random(seed)
    record: dict = {"messages": [], **({"tools": [WEATHER]} if tools else {})}
    if draw.random() < 0.3:
        record["enable_thinking"] = draw.random() < 0.5
    if draw.random() < 0.5:
        record["messages"].append({"role": "system", "content": "S"})
    thinks = draw.choice([0.0, 0.1, 0.8])

    def answer(text: str, **more: Any) -> dict:
        if draw.random() < thinks:
            more["reasoning_content"] = f"hm {text}"
        return assistant(text, **more, **({"weight": 0} if draw.random() < 0.1 else {}))

    for n in range(draw.randint(5, 20)):
        record["messages"].append(user(draw.choice([f"q{n}", "again", "x</s>y", "多少?"])))
        if tools and draw.random() < 0.3:
            for turn in range(draw.choice([1, 1, 2, 9])):
                called = call("get_weather", {"city": f"{n} {turn}"}, f"abcdef{n:02}{turn}")
                record["messages"] += [answer("", tool_calls=[called]), answered("get_weather", "5", called["id"])]
        record["messages"].append(answer(draw.choice([f"a{n}", "yes", "a\n\nb", "好。"])))
    return record


def same_however_rendered(template: Template, monkeypatch: pytest.MonkeyPatch, *, tools: bool) -> int:
    """Compare with rendering and tokenizing every prompt by itself; returns the number of encoded records."""
    records = [RawRecord(long_conversation(seed, tools=tools), f"a:{seed}") for seed in range(10)]
    ledgers = Ledger(), Ledger()
    short = encode(records, template, ledgers[0], max_tokens=10**6, schema=Schema("messages"))
    with monkeypatch.context() as patch:
        patch.setattr(cuts_module, "RENDERED_EACH", 10**9)
        each = replace(template, cut="")
        assert short == encode(records, each, ledgers[1], max_tokens=10**6, schema=Schema("messages"))
    refused = [[refusal.origin for refusal in ledger.records_refused] for ledger in ledgers]
    assert refused[0] == refused[1]  # if there are two reasons, either may be found first
    return len(short)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_published_tokenizers_give_long_conversations_the_ids_of_single_prompts(name, real, monkeypatch):
    # Catches a prompt cut out of another that does not begin with it: thoughts kept after the last question, calls,
    # modes that a record sets.
    real(TOKENIZERS[name][0])
    template = template_for(name)
    if template is None:
        pytest.skip("its published template comes with trl")
    assert same_however_rendered(template, monkeypatch, tools=False)
    same_however_rendered(template, monkeypatch, tools=True)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_templates_give_long_conversations_the_ids_of_single_prompts(name, kind, monkeypatch):
    template = load_template(name, tokenizer_of(kind))
    assert same_however_rendered(template, monkeypatch, tools=False)
    same_however_rendered(template, monkeypatch, tools=True)


@pytest.mark.parametrize("thoughts", [{}, {"reasoning_content": "hm"}])
def test_a_thousand_calls_are_not_rendered_one_by_one(thoughts, monkeypatch):
    # Once every call was rendered with all before it: 1,500 calls took 85 seconds.
    template = load_template("qwen3", tokenizer_of("bytes"))
    messages = [user("q")]
    for n in range(1000):
        called = [call("get_weather", {"city": str(n)})]
        if n % 3 == 2:
            called.append(call("get_weather", {"city": "Osk"}))
        messages += [assistant("", tool_calls=called, **thoughts)]
        messages += [{"role": "tool", "content": "5"} for _ in called]
    rendered = []
    render = Template.render
    monkeypatch.setattr(Template, "render", lambda *args, **more: rendered.append(1) or render(*args, **more))
    record, _ = to_record(
        RawRecord({"messages": [*messages, assistant("done")], "tools": [WEATHER]}, "a:1"), Schema("messages")
    )
    exchanges = exchanges_of(template, record)
    assert len(exchanges) == 1001
    assert len(rendered) < 60
    for number in (0, 2, 500, 998):
        assert f'"city": "{number}"' in exchanges[number].answer.text
        assert exchanges[number].answer.text.startswith("<think>")
    same_however_rendered(template, monkeypatch, tools=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_is_rendered_a_few_times_and_not_once_for_every_answer(name, monkeypatch):
    tokenizer = tokenizer_of("sentencepiece")
    marks = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in [*marks, "<end_of_turn>", "[INST]", "[/INST]"]])
    template = load_template(name, tokenizer)
    rendered: list[int] = []
    render = Template.render

    def counted(self: Template, messages: Any, **more: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, **more)

    monkeypatch.setattr(Template, "render", counted)
    record = {"messages": [message for n in range(100) for message in (user(f"q{n}"), assistant(f"a{n}"))]}
    assert encode([RawRecord(record, "a:1")], template, Ledger(), max_tokens=10**6, schema=Schema("messages"))
    assert sum(rendered) < 6 * len(record["messages"])


@pytest.mark.parametrize(("name", "parts"), [("chatml", 1), ("qwen3", 100)])
def test_a_long_conversation_is_tokenized_about_once_and_not_once_for_every_answer(name, parts, monkeypatch):
    template = load_template(name, tokenizer_of("bytes", CHATML))
    characters: list[int] = []
    ids_of = PieceTokenizer.ids_of

    def counted(self: PieceTokenizer, pieces: Any) -> list[list[int]]:
        pieces = list(pieces)
        characters.append(sum(len(piece.text) for piece in pieces))
        return ids_of(self, pieces)

    monkeypatch.setattr(PieceTokenizer, "ids_of", counted)
    record = {"messages": [message for n in range(100) for message in (user(f"q{n}"), assistant(f"a{n}"))]}
    (examples,) = encode([RawRecord(record, "a:1")], template, Ledger(), max_tokens=10**6, schema=Schema("messages"))
    assert len(examples) == parts
    text = template.tokenizer.decode(examples[-1].ids)
    assert sum(characters) < 3 * len(text)
