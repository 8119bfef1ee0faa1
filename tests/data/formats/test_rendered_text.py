"""Laws of parsing rendered texts: the turns that were written, or nothing. The oracle writes each format by hand."""

import time
from collections.abc import Callable, Sequence
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atomtune.data.formats.rendered_text import turns_of
from atomtune.data.records import Turn
from tests.tiny import tokenizer_of

Said = Sequence[tuple[str, str]]
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def every(**forms: str) -> Callable[[Said], str]:
    """A writer for a format in which each turn is written by itself, depending on its role."""
    return lambda said: "".join(forms[role].replace("@", text) for role, text in said)


def llama2(said: Said) -> str:
    system = f"<<SYS>>\n{said[0][1]}\n<</SYS>>\n\n" if said[0][0] == "system" else ""
    turns = [text for role, text in said if role != "system"]
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return "".join(f"<s>[INST] {system * (not i)}{q} [/INST] {a} </s>" for i, (q, a) in enumerate(pairs))


def mistral(said: Said) -> str:
    return "<s>" + every(user="[INST] @[/INST]", assistant=" @</s>")(said)


def llama3(said: Said) -> str:
    turns = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in said)
    return "<|begin_of_text|>" + turns


def with_preamble(own: str, behind: str, **forms: str) -> Callable[[Said], str]:
    def write(said: Said) -> str:
        given = said[0][0] == "system"
        return (said[0][1] if given else own) + behind + every(**forms)(said[given:])

    return write


SIDES = {"user": "Human", "assistant": "Assistant"}
WRITERS: dict[str, Callable[[Said], str]] = {
    "atom-official": every(system="<s>System: @\n</s>", user="<s>Human: @\n</s>", assistant="<s>Assistant: @</s>"),
    "chatml": every(**{role: f"<|im_start|>{role}\n@<|im_end|>\n" for role in ("system", "user", "assistant")}),
    "llama3": llama3,
    "gemma": lambda said: (
        "<bos>"
        + every(user="<start_of_turn>user\n@<end_of_turn>\n", assistant="<start_of_turn>model\n@<end_of_turn>\n")(said)
    ),
    "mistral-v3": mistral,
    "llama2": llama2,
    "alpaca": with_preamble(ALPACA, "\n\n", user="### Instruction:\n@\n\n", assistant="### Response:\n@</s>\n\n"),
    "guanaco": lambda said: "".join(f"### {SIDES[role]}: {text}" for role, text in said),
    "hh-rlhf": lambda said: "".join(f"\n\n{SIDES[role]}: {text}" for role, text in said),
    "vicuna": with_preamble(VICUNA, " ", user="USER: @ ", assistant="ASSISTANT: @</s>"),
}
NO_STOP = ("guanaco", "hh-rlhf")  # an answer ends at the next question's marker or at the text's end
NO_SYSTEM = ("gemma", "mistral-v3", "guanaco", "hh-rlhf")  # the first two put a system text into the first user turn
MARKERS = {
    "atom-official": ["<s>", "</s>", "<s>Human: ", "\n</s>", "</s><s>Assistant: "],
    "chatml": [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>\n<|im_start|>user\n",
    ],
    "llama3": [
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|begin_of_text|>",
    ],
    "gemma": ["<start_of_turn>", "<end_of_turn>", "<end_of_turn>\n", "<start_of_turn>model\n", "<bos>"],
    "mistral-v3": ["[INST]", "[/INST]", "[INST] ", "</s>", "<s>", " [/INST] ", "[TOOL_CALLS]"],
    "llama2": ["[INST]", "[/INST]", " [/INST] ", " </s>", "<s>", "<<SYS>>\n", "\n<</SYS>>\n\n"],
    "alpaca": ["### Instruction:\n", "\n\n### Response:\n", "</s>", "</s>\n\n", "### Input:"],
    "guanaco": ["### Human: ", "### Assistant:", "\n### Assistant: "],
    "hh-rlhf": ["\n\nHuman: ", "\n\nAssistant:"],
    "vicuna": ["USER: ", " ASSISTANT: ", "</s>", "ASSISTANT:", "USER:"],
}
# Texts do not begin or end with characters that a format trims or writes, and contain no marker by chance.
TEXT = st.text(st.sampled_from("abé你好 \n{}%#:/|[]()🙂.'\""), min_size=1, max_size=20).filter(lambda t: t == t.strip())


@st.composite
def conversations(draw: st.DrawFn, *, system: bool = True) -> list[tuple[str, str]]:
    said = [("system", draw(TEXT))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        said += [("user", draw(TEXT)), ("assistant", draw(TEXT))]
    return said


def as_turns(said: Said) -> tuple[Turn, ...]:
    return tuple(Turn(role, text) for role, text in said)


# --- what was written is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data(), before=st.sampled_from(["", "\n", "  "]), behind=st.sampled_from(["", "\n", " \n\n"]))
def test_a_rendered_conversation_is_read_back(name, data, before, behind):
    said = data.draw(conversations(system=name not in NO_SYSTEM))
    assert turns_of(before + WRITERS[name](said) + behind) == (name, as_turns(said))


@pytest.mark.parametrize(
    ("name", "bos", "stop"),
    [
        ("chatml", "", "<|im_end|>\n"),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>"),
        ("gemma", "<bos>", "<end_of_turn>\n"),
        ("mistral-v3", "<s>", "</s>"),
        ("alpaca", "", "</s>\n\n"),
        ("vicuna", "", "</s>"),
        ("atom-official", "", "</s>"),
    ],
)
def test_the_bos_and_the_last_stop_token_may_be_missing(name, bos, stop):
    said = [("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")]
    whole = WRITERS[name](said)
    assert whole.startswith(bos) and whole.endswith(stop)
    for text in (whole.removeprefix(bos), whole.removesuffix(stop), whole.removeprefix(bos).removesuffix(stop)):
        assert turns_of(text) == (name, as_turns(said))


def test_the_tutorials_text_is_split_into_instruction_and_input():
    read = (Turn("user", "请模仿甄嬛的口吻。", "你是谁?"), Turn("assistant", "我是甄嬛。"))
    text = "<s>Human: 请模仿甄嬛的口吻。请回答用户问题: 你是谁?\n</s><s>Assistant:我是甄嬛。</s>"
    assert turns_of(text) == ("atom", read)
    assert turns_of(text.removesuffix("</s>")) == ("atom", read)


def test_the_tutorials_text_of_several_exchanges_is_read_too():
    assert turns_of(
        "<s>Human: 你好请回答用户问题: \n</s><s>Assistant:你好!</s>"
        "<s>Human: 译请回答用户问题: 早\n</s><s>Assistant:Morning.</s>"
    ) == (
        "atom",
        (Turn("user", "你好"), Turn("assistant", "你好!"), Turn("user", "译", "早"), Turn("assistant", "Morning.")),
    )


def test_llama_chinese_text_without_newlines_is_read():
    text = (
        "<s>Human: 用一句话描述地球为什么是独一无二的。</s><s>Assistant: 因为地球是目前为止唯一已知存在生命的行星。</s>"
    )
    assert turns_of(text) == (
        "atom-official",
        (
            Turn("user", "用一句话描述地球为什么是独一无二的。"),
            Turn("assistant", "因为地球是目前为止唯一已知存在生命的行星。"),
        ),
    )


def test_llama_chinese_newline_after_each_turn_is_not_part_of_its_text():
    # As in data/dev_sft.csv: the newline was once trained in all of its 200 answers.
    text = "<s>Human: 地球？\n</s><s>Assistant: 唯一。\n</s>"
    assert turns_of(text) == ("atom-official", (Turn("user", "地球？"), Turn("assistant", "唯一。")))
    assert turns_of(text.removesuffix("\n</s>")) == turns_of(text)
    own_line_end = "<s>Human: 地球？\n</s><s>Assistant: 唯一。\n\n</s>"
    assert turns_of(own_line_end) == ("atom-official", (Turn("user", "地球？"), Turn("assistant", "唯一。\n")))


def test_an_unanswered_last_turn_and_consecutive_user_turns_are_read():
    ask, more, tell = Turn("user", "a"), Turn("user", "b"), Turn("assistant", "c")
    human, assistant = "<s>Human: {}\n</s>", "<s>Assistant: c\n</s>"
    unanswered = human.format("a") + assistant + human.format("b")
    twice = human.format("a") + human.format("b") + assistant
    assert turns_of(unanswered) == ("atom-official", (ask, tell, more))
    assert turns_of(twice) == ("atom-official", (ask, more, tell))
    assert turns_of(human.format("a")) == ("atom-official", (ask,))
    assert turns_of("<|im_start|>user\na<|im_end|>\n") == ("chatml", (ask,))


def test_stanford_alpaca_text_with_an_input_is_read():
    text = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n"
        "### Response:\n5"
    )
    assert turns_of(text) == ("alpaca", (Turn("user", "Add.", "2, 3"), Turn("assistant", "5")))
    assert turns_of(f"{text}<|endoftext|>") == ("alpaca", (Turn("user", "Add.", "2, 3"), Turn("assistant", "5")))


def test_an_alpaca_text_with_the_heading_of_an_empty_input_is_read():
    # Unsloth's notebooks write it for every record; such texts were learned in full, the instruction too.
    text = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n\n\n"
        "### Response:\n5</s>"
    )
    assert turns_of(text) == ("alpaca", (Turn("user", "Add."), Turn("assistant", "5")))


@pytest.mark.parametrize("stop", ["<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>", "<｜end▁of▁sentence｜>"])
@pytest.mark.parametrize(
    "text",
    [f"{ALPACA}\n\n### Instruction:\na\n\n### Response:\nb", "### Human: a### Assistant: b", "USER: a ASSISTANT: b"],
)
def test_the_stop_token_of_any_base_is_no_part_of_the_answer(text, stop):
    # It was learned as text, in front of the stop token.
    (_, turns) = turns_of(text + stop)
    assert turns == (Turn("user", "a"), Turn("assistant", "b"))
    assert turns_of(f"{text} {stop} c{stop}")[1][-1].text == f"b {stop} c", "inside an answer it is text"


def test_the_default_system_text_of_llama_31_is_kept_verbatim():
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    said = [("system", dates), ("user", "q"), ("assistant", "a")]
    assert turns_of(llama3(said)) == ("llama3", as_turns(said))


def test_chatml_with_a_tools_answer_is_read():
    text = "".join(f"<|im_start|>{role}\nx<|im_end|>\n" for role in ("user", "assistant", "tool", "assistant"))
    assert turns_of(text) == ("chatml", tuple(Turn(r, "x") for r in ("user", "assistant", "tool", "assistant")))


def test_what_transformers_renders_is_read():
    # The writers above are the tests' own; here the built-in templates write, with a tokenizer.
    said = [("system", "S"), ("user", "你好"), ("assistant", "a"), ("user", "q"), ("assistant", "b")]
    messages = [{"role": role, "content": text} for role, text in said]
    for name in ("atom-official", "chatml", "llama3", "alpaca", "vicuna"):
        file = resources.files("atomtune.data") / "templates" / f"{name}.jinja"
        template = file.read_text(encoding="utf-8").rstrip("\n")
        tokenizer = tokenizer_of("sentencepiece")
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert turns_of(text) == (name, as_turns(said))


@pytest.mark.parametrize(
    "text",
    [
        # A second turn without an input; atom's template would write it as the input of the first instruction.
        "<s>Human: I请回答用户问题: x\n</s><s>Assistant:a</s><s>Human: q请回答用户问题: \n</s><s>Assistant:b</s>",
        # Gemma's template trims texts.
        "<start_of_turn>user\n q <end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n",
        # Two different stop tokens come from two tokenizers.
        "### Instruction:\nq\n\n### Response:\na<|endoftext|>\n\n### Instruction:\nq\n\n### Response:\na</s>",
        # Llama 2 has no system text in the middle.
        "<s>[INST] q [/INST] a </s><s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s>",
    ],
)
def test_a_text_that_its_template_would_render_differently_is_rejected(text):
    assert turns_of(text) is None


# --- what is not one for sure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "marker"), [(name, one) for name, ones in MARKERS.items() for one in ones])
def test_a_marker_inside_a_text_is_never_taken_for_a_template_marker(name, marker):
    # Put the marker at the beginning, middle and end of each text in turn: expect the same turns or none.
    said = [("system", "be good"), ("user", "ask"), ("assistant", "say"), ("user", "more"), ("assistant", "end")]
    said = said[1:] if name in NO_SYSTEM else said
    for at, (role, text) in enumerate(said):
        if at == len(said) - 1 and marker.endswith("user\n"):
            continue  # an answer that ends with the start of a question cannot be told from a following question
        for hostile in (marker + text, text[:2] + marker + text[2:], text + marker):
            turns = [*said[:at], (role, hostile), *said[at + 1 :]]
            found = turns_of(WRITERS[name](turns))
            same = {(name, as_turns(turns)), (name, as_turns([(r, t.strip()) for r, t in turns]))}
            assert found is None or found in same, (at, found)


@pytest.mark.parametrize("name", WRITERS)
def test_a_text_cut_anywhere_gives_no_wrong_turns(name):
    said = [("user", "ask me"), ("assistant", "say it"), ("user", "more of it"), ("assistant", "the end")]
    whole, turns = WRITERS[name](said), as_turns(said)
    for at in range(len(whole)):
        found = turns_of(whole[:at])
        if found is None:
            continue
        *before, last = found[1]
        assert tuple(before) == turns[: len(before)]
        expected = turns[len(before)]
        assert last.role == expected.role
        # Without a stop token, an answer may end with the same character that begins the next marker, for example C#.
        holds_more = name in NO_STOP and last.text.startswith(expected.text)
        assert expected.text.startswith(last.text) or holds_more


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "plain text",
        "<s>",
        "<s>Human: a\n</s><s>Assistant: ",
        "<s>Human: a\n</s><s>Assistant: b</s>and more",
        "and before <s>Human: a\n</s><s>Assistant: b</s>",
        "<s>Assistant: b</s><s>Human: a\n</s><s>Assistant: b</s>",
        "<s>Human: a请回答用户问题: b请回答用户问题: c\n</s><s>Assistant:d</s>",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
        "<|im_start|>judge\na<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>",
        "The function takes [INST] and [/INST] as markers.",
        "### Instruction:\nfor the cook: stir.",
        "A form has a field USER: and a field PASSWORD:",
        "<|im_start|>x USER: a ASSISTANT: b",
    ],
)
def test_other_texts_are_not_read_as_conversations(text):
    assert turns_of(text) is None


def test_unrelated_and_hostile_texts_are_rejected_quickly():
    assert turns_of("The quick brown fox jumps over the lazy dog. " * 100) is None
    start = time.process_time()
    for sign, again in [
        ("<s>Human: ", "请回答用户问题: "),
        ("### Instruction:\n", "x\n\n### Input:\n"),
        ("<s>[INST] ", "x [/INST] "),
        ("USER: ", "x ASSISTANT: "),
        ("<|im_start|>user\n", "<|im_start|>user\n"),
    ]:
        assert turns_of(sign + again * 100_000) is None
    assert time.process_time() - start < 5
