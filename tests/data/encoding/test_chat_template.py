"""Chat templates: training uses the text that a server renders with the saved tokenizer."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atomtune.data.encoding import sandbox
from atomtune.data.encoding.chat_template import CannotExpress, Template
from atomtune.data.encoding.choose_template import load_template, restore_template
from atomtune.data.records import Record, Turn
from atomtune.errors import BadModel, BadSettings, UserError
from atomtune.model.load import load_tokenizer
from tests.tiny import CHATML, GEMMA, lone_sentencepiece, pieces, tokenizer_of


def record(*turns: Turn) -> Record:
    return Record((*turns, Turn("assistant", "(the answer)")), "train.jsonl:1")


def prompt(template: Template, *turns: Turn) -> str:
    return pieces(template, record(*turns))[0].text


def own(kind: str, source: str | None) -> Template:
    return load_template("auto", tokenizer_of(kind, source))


# --- atom's text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "text"),
    [("请模仿甄嬛的口吻。", "你是谁?"), ("你是谁?", ""), ("", "你是谁?"), (" a\n", "\tb\r\n"), ("{{ x }}", "{% if %}")],
)
def test_atom_prompt_equals_the_tutorials_prompt(instruction, text):
    # The tutorial's own line, copied. In the last case, the record looks like a template.
    written = "<s>Human: " + instruction + "请回答用户问题: " + text + "\n" + "</s><s>Assistant:"
    assert prompt(own("sentencepiece", None), Turn("user", instruction, text)) == written


def test_atom_renders_earlier_turns_in_the_same_format():
    turns = (Turn("user", "翻译", "早上好"), Turn("assistant", "Good morning."), Turn("user", "再译", "晚安"))
    assert prompt(own("sentencepiece", None), *turns) == (
        "<s>Human: 翻译请回答用户问题: 早上好\n</s><s>Assistant:Good morning.</s>"
        "<s>Human: 再译请回答用户问题: 晚安\n</s><s>Assistant:"
    )


def test_atom_renders_earlier_turns_without_input_in_the_same_format():
    turns = (Turn("user", "你好"), Turn("assistant", "你好!"), Turn("user", "你是谁?"))
    assert prompt(own("sentencepiece", None), *turns) == (
        "<s>Human: 你好请回答用户问题: \n</s><s>Assistant:你好!</s><s>Human: 你是谁?请回答用户问题: \n</s><s>Assistant:"
    )


def test_atom_uses_a_system_text_as_instruction():
    turns = (Turn("system", "你是灯塔的看守人。"), Turn("user", "你是谁?"))
    assert prompt(own("sentencepiece", None), *turns) == (
        "<s>Human: 你是灯塔的看守人。请回答用户问题: 你是谁?\n</s><s>Assistant:"
    )


def test_a_system_text_before_an_instruction_with_an_input_is_not_lost():
    # Both need atom's only place for an instruction; in any case, no text may be lost silently.
    turns = (Turn("system", "你是灯塔的看守人。"), Turn("user", "翻译", "早上好"))
    try:
        text = prompt(own("sentencepiece", None), *turns)
    except CannotExpress:
        return
    assert "你是灯塔的看守人。" in text and "翻译" in text and "早上好" in text


def test_atom_refuses_tool_messages():
    with pytest.raises(CannotExpress, match=r"atom.*tool"):
        own("sentencepiece", None).render([{"role": "user", "content": "?"}, {"role": "tool", "content": "4"}])


def test_atom_omits_the_bos_if_the_tokenizer_has_none():
    assert prompt(load_template("atom", tokenizer_of("bytes")), Turn("user", "Hi")) == (
        "Human: Hi请回答用户问题: \n<|endoftext|>Assistant:"
    )


# --- role templates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turn", "content"),
    [
        (Turn("user", "Translate", "早上好"), "Translate\n早上好"),
        (Turn("user", "Translate"), "Translate"),
        (Turn("user", "", "早上好"), "早上好"),
    ],
)
def test_a_role_template_puts_the_input_under_the_instruction(turn, content):
    expected = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(own("bytes", CHATML), turn) == expected


def test_the_answer_keeps_the_output_text_unchanged():
    template = own("sentencepiece", None)
    piece = pieces(template, Record((Turn("user", "?"), Turn("assistant", "  a\n")), "train.jsonl:1"))[1]
    assert (piece.text, piece.learn) == ("  a\n", True)


def test_a_template_refusal_is_reported_with_the_templates_own_message():
    template = own("sentencepiece", GEMMA)
    with pytest.raises(CannotExpress, match="no system role"):
        pieces(template, record(Turn("system", "Be brief."), Turn("user", "Hi")))


# --- choosing a template --------------------------------------------------------------------------------------------


def test_auto_takes_the_tokenizers_own_template():
    template = own("bytes", CHATML)
    assert template.source == CHATML
    assert "own" in template.name


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "characters"])
def test_auto_takes_atom_if_the_tokenizer_has_no_template(kind):
    assert own(kind, None).name == "atom"
    assert prompt(own(kind, None), Turn("user", "Hi")) == prompt(
        load_template("atom", tokenizer_of(kind)), Turn("user", "Hi")
    )


def test_auto_takes_a_neutral_format_where_the_tokenizer_is_not_chinese():
    # Catches `请回答用户问题: ` in every prompt of an English base.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator(
        ["Who keeps the light? I keep it, and the gulls keep me company all winter long."], trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    template = load_template("auto", tokenizer)
    assert template.name == "plain"
    assert prompt(template, Turn("user", "Who are you?")) == "<s>Who are you?\n"
    assert "no chat template" in template.why
    assert not load_template("plain", tokenizer).why  # no explanation if the user asked for it


def test_auto_takes_a_neutral_format_on_llama_2(real):
    assert load_template("auto", load_tokenizer(str(real("tok/llama2")))).name == "plain"


def test_atom_can_be_requested_despite_the_tokenizers_own_template():
    tokenizer = tokenizer_of("bytes", CHATML)
    assert prompt(load_template("atom", tokenizer), Turn("user", "Hi")).startswith("Human: Hi请回答用户问题: \n")


def test_an_unknown_template_name_error_lists_the_known_ones():
    with pytest.raises(BadSettings, match=r"--template atmo.*auto, .*atom.*\.jinja"):
        load_template("atmo", tokenizer_of("characters"))


def test_a_jinja_file_can_be_used_as_the_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{{ eos_token }}{% endfor %}答:", encoding="utf-8")
    template = load_template(str(path), tokenizer_of("sentencepiece"))
    assert prompt(template, Turn("user", "问", "题")) == "[问\n题]</s>答:"
    assert template.name == "mine.jinja"


def test_a_byte_order_mark_is_stripped_from_a_template_file(tmp_path):
    # Regression: every prompt began with it, as a token of its own.
    path = tmp_path / "mine.jinja"
    path.write_text("\ufeff" + CHATML, encoding="utf-8")
    assert load_template(str(path), tokenizer_of("bytes")).source == CHATML


def test_a_jinja_syntax_error_is_reported_with_its_line(tmp_path):
    path = tmp_path / "broken.jinja"
    path.write_text("{% for m in messages %}\n{{ m['content' }}\n{% endfor %}", encoding="utf-8")
    with pytest.raises(BadModel, match=r"broken\.jinja .*line 2.*\n.*template itself is at fault"):
        load_template(str(path), tokenizer_of("sentencepiece"))


@pytest.mark.parametrize(("source", "writes"), [("{{ bos_token }}", True), ("", False)])
def test_a_template_that_writes_no_bos_is_detected(source, writes):
    body = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert own("sentencepiece", source + body).writes_bos == writes
    assert own("bytes", source + body).writes_bos, "this tokenizer has none to write"


def test_a_missing_jinja_file_is_named(tmp_path):
    with pytest.raises(BadSettings, match=r"nowhere\.jinja: no such file"):
        load_template(str(tmp_path / "nowhere.jinja"), tokenizer_of("sentencepiece"))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"{% for m in messages %}{{ m['content'] ", id="a tag that never ends"),
        pytest.param("{{ '问' }}{{ eos_token }}".encode("gbk"), id="GBK"),
        pytest.param(b"{{ raise_exception('no') }}", id="refuses every conversation"),
    ],
)
def test_an_unusable_jinja_file_raises_a_user_error(tmp_path, content):
    # Exit code 2 with the file's name, not a traceback and "this is a bug".
    path = tmp_path / "broken.jinja"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.jinja"):
        load_template(str(path), tokenizer_of("sentencepiece"))


# --- where an answer stops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "source", "stop"),
    [
        ("bytes", CHATML, "<|im_end|>"),
        ("sentencepiece", GEMMA, "<end_of_turn>"),
        ("sentencepiece", None, "</s>"),
        ("characters", None, "</s>"),
        ("bytes", None, "<|endoftext|>"),
    ],
)
def test_an_answer_stops_where_the_template_ends_it(kind, source, stop):
    # Gemma's EOS is </s> here: if that were learned, a server that waits for <end_of_turn> would never stop.
    assert own(kind, source).stop == stop


def test_chatml_stops_at_its_own_token_even_where_eos_is_another():
    # As in Qwen's base models: EOS is <|endoftext|>, the template ends a turn with <|im_end|>.
    tokenizer = tokenizer_of("bytes", CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    assert load_template("auto", tokenizer).stop == "<|im_end|>"


def test_a_template_that_ends_answers_with_plain_text_stops_at_eos(tmp_path):
    path = tmp_path / "plain.jinja"
    path.write_text("{% for m in messages %}### {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}###", encoding="utf-8")
    assert load_template(str(path), tokenizer_of("sentencepiece")).stop == "</s>"


def test_an_answer_that_could_never_stop_is_refused():
    tokenizer = tokenizer_of("characters")
    tokenizer.eos_token = None
    with pytest.raises(BadModel, match="eos_token"):
        load_template("atom", tokenizer)


# --- law 2 begins here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "control", "suggested"),
    [
        ("bytes", "<|im_start|>", "qwen2.5"),
        ("bytes", "<|start_header_id|>", "llama3.1"),
        ("bytes", "[AVAILABLE_TOOLS]", "mistral-tekken"),
        ("sentencepiece", "[AVAILABLE_TOOLS]", "mistral-v3"),
        ("sentencepiece", "<some_token>", "qwen2.5"),
    ],
)
def test_the_template_suggested_for_tools_is_written_with_the_tokenizers_tokens(kind, control, suggested):
    tokenizer = tokenizer_of(kind, CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": [control]})
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    asked = Record((Turn("user", "Rain?"), Turn("assistant", "No.")), "train.jsonl:1", tools=tools)
    with pytest.raises(CannotExpress, match=f"--template {suggested} has one"):
        pieces(load_template("auto", tokenizer), asked)
    assert "weather" in pieces(load_template(suggested, tokenizer), asked)[0].text


def test_control_strings_of_records_are_broken_but_the_templates_own_are_not():
    template = own("sentencepiece", None)
    piece, answer = pieces(
        template, Record((Turn("user", "a</s>b", "<s>"), Turn("assistant", "c</s>")), "train.jsonl:1")
    )
    text = "<s>Human: a</s>b请回答用户问题: <s>\n</s><s>Assistant:"
    assert piece.text == text
    assert piece.breaks == (text.index("</s>b") + 1, text.index("<s>\n") + 1)
    assert answer.breaks == (2,)


def test_control_strings_are_found_in_text_that_the_template_trims():
    # Offsets of breaks in the untrimmed text would be wrong.
    piece = own("sentencepiece", GEMMA).prompt_piece([{"role": "user", "content": "  \n<end_of_turn> x </s>  "}])
    text = "<s><start_of_turn>user\n<end_of_turn> x </s><end_of_turn>\n<start_of_turn>model\n"
    assert piece.text == text
    assert piece.breaks == (text.index("<end_of_turn> x") + 1, text.index("</s>") + 1)


@pytest.mark.parametrize("imitation", ["\ufdd0control0\ufdd1", "\ufdd0control7\ufdd1", "\ufdd0answer\ufdd1"])
@pytest.mark.parametrize("other", ["", "</s>"])
def test_a_record_cannot_imitate_the_internal_escape_marks(imitation, other):
    # Marks replace control strings while the template renders; a record that contains such a mark keeps its text.
    text = f"a{imitation}b{other}c"
    assert f"Human: {text}请回答" in prompt(own("sentencepiece", None), Turn("user", text))


# --- what is trained is what is served ------------------------------------------------------------------------------

KINDS = [("sentencepiece", None), ("sentencepiece", GEMMA), ("bytes", CHATML), ("bytes", None), ("characters", None)]
ASKED = [
    (Turn("user", "把这句话翻译成英文", " 早上好 👩‍🚀"),),
    (Turn("user", "Who are you?"),),
    (Turn("user", "你好"), Turn("assistant", "你好!"), Turn("user", "Add:", "2 + 3")),
]


@pytest.mark.parametrize("turns", ASKED)
@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_the_saved_tokenizer_renders_the_trained_prompt(tmp_path, kind, source, turns):
    # A server loads the folder with AutoTokenizer and calls apply_chat_template: text and ids must be those trained on.
    template = own(kind, source)
    template.tokenizer.chat_template = template.source
    template.tokenizer.save_pretrained(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    piece, _ = pieces(template, record(*turns))
    messages = template.messages(turns)
    assert served.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == piece.text
    ids = served.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == template.tokens.ids_of([piece])[0]


def test_a_lone_sentencepiece_file_is_served_as_it_was_trained(tmp_path):
    # It is saved as tokenizer.json, which must add the same spaces at the beginning of a text.
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    lone_sentencepiece(before)
    template = load_template("auto", load_tokenizer(str(before)))
    template.tokenizer.chat_template = template.source
    template.tokenizer.save_pretrained(after)
    piece, _ = pieces(template, record(Turn("user", "早上好", " a  b")))
    served = AutoTokenizer.from_pretrained(after)
    ids = served.apply_chat_template(template.messages([Turn("user", "早上好", " a  b")]), add_generation_prompt=True)
    assert ids["input_ids"] == template.tokens.ids_of([piece])[0]


@pytest.mark.parametrize(("kind", "source"), KINDS)
def test_a_restored_template_is_the_saved_one(tmp_path, kind, source):
    template = own(kind, source)
    template.tokenizer.chat_template = template.source
    template.tokenizer.save_pretrained(tmp_path)
    restored = restore_template(template.name, template.instruction_role, AutoTokenizer.from_pretrained(tmp_path))
    assert (restored.source, restored.stop) == (template.source, template.stop)
    assert restored.messages(ASKED[0]) == template.messages(ASKED[0])


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",  # hours
        # A list that contains itself, doubled sixty times, is small; written out it has 2^60 numbers.
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    ],
    ids=["time", "memory"],
)
def test_an_endless_template_is_refused_by_name(models, tmp_path, source, monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 2.0)
    (tmp_path / "endless.jinja").write_text(source)
    tokenizer = load_tokenizer(str(models("llama")))
    with pytest.raises(BadModel, match=r"the template endless\.jinja .*(\d seconds|2 GB of memory)"):
        load_template(str(tmp_path / "endless.jinja"), tokenizer)
