"""Ollama: its template writes the same text as the chat template, or there is no Modelfile."""

import re
from pathlib import Path

import pytest

from atomtune.data.encoding.choose_template import load_template
from atomtune.export.ollama import OllamaTemplate, Texts, model_name, modelfile, ollama_template
from tests.tiny import CHATML, GEMMA, tokenizer_of

#: Drops all answers but the last, as Qwen3's template does with thoughts: more than a sequence of messages.
FORGETFUL = (
    "{% for m in messages %}{% if not loop.first or messages | length == 1 %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": 'Say "hi" to {{ .Name }} \\ 你好'},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "Again\nplease"},
]


def of_tokenizer(kind: str, source: str):
    tokenizer = tokenizer_of(kind, source)
    return load_template("auto", tokenizer)


def go_rendered(go_template: str, messages: list[dict[str, str]]) -> str:
    """Render the subset of Go's template language that we write: take the first true condition, unquote its texts."""
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    lines = go_template.split("\n")
    text, last = "", ""
    for message in messages:
        for line in lines[2 : lines.index("{{- end }}")]:
            head = re.match(
                r'\{\{- (?:else )?if and \(eq \$last "(\w*)"\) \(eq \$m\.Role "(\w+)"\)( \$\.System)? \}\}', line
            )
            assert head, line
            if (head[1], head[2]) == (last, message["role"]) and (system or not head[3]):
                body = line[head.end() :].removesuffix("{{- $last = $m.Role }}")
                text += written(body, system, message["content"])
                last = message["role"]
                break
    if lines[-1].startswith("{{- else }}"):
        plain, with_system = lines[-1].removeprefix("{{- else }}").removesuffix("{{ end }}"), lines[-2]
        return text + written(with_system.removeprefix("{{- if $.System }}") if system else plain, system, "")
    return text + written(lines[-1].removeprefix("{{- end }}"), system, "")


def written(actions: str, system: str, content: str) -> str:
    """The text that a sequence of actions writes; nothing may be between them."""
    text = ""
    assert re.sub(r"\{\{ .*? \}\}", "", actions) == ""
    for action in re.findall(r"\{\{ (.*?) \}\}", actions):
        text += {"$.System": system, "$m.Content": content}.get(action) or unquoted(action[1:-1])
    return text


def unquoted(text: str) -> str:
    """A Go string literal's text. `unicode_escape` reads everything else as Latin-1, so that is escaped too."""
    return text.encode("ascii", "backslashreplace").decode("unicode_escape")


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:2]])
def test_the_ollama_template_renders_the_same_text_as_the_chat_template(messages):
    template = of_tokenizer("bytes", CHATML)
    for_ollama = ollama_template(template, adds_bos=False)
    assert for_ollama is not None
    assert for_ollama.render(messages) == template.render(messages)
    assert go_rendered(for_ollama.go_template(), messages) == template.render(messages)


def test_a_template_that_drops_messages_gets_no_ollama_template():
    assert ollama_template(of_tokenizer("bytes", FORGETFUL), adds_bos=False) is None


def test_the_system_text_is_left_out_if_the_template_has_no_place_for_it():
    template = of_tokenizer("sentencepiece", GEMMA)
    for_ollama = ollama_template(template, adds_bos=False)
    assert for_ollama is not None
    assert go_rendered(for_ollama.go_template(), CONVERSATION) == template.render(CONVERSATION[1:])


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[:2]])
def test_the_atom_template_repeats_the_system_text_in_every_user_turn(messages):
    template = load_template("atom", tokenizer_of("sentencepiece"))
    for_ollama = ollama_template(template, adds_bos=False)
    assert for_ollama is not None
    assert go_rendered(for_ollama.go_template(), messages) == template.render(messages)


def test_a_bos_that_the_engine_adds_is_not_written_twice():
    template = of_tokenizer("sentencepiece", "{{ bos_token }}" + CHATML)
    with_bos, without = ollama_template(template, adds_bos=False), ollama_template(template, adds_bos=True)
    assert with_bos is not None and without is not None
    assert with_bos.render(CONVERSATION) == "<s>" + without.render(CONVERSATION) == template.render(CONVERSATION)


def test_the_modelfile_names_file_template_system_and_every_stop():
    plain = OllamaTemplate(Texts({("", "user"): '"""'}, "\n"), None)
    text = modelfile(Path("out/m.gguf"), plain, stops=["<|im_end|>", "</s>"], system="Be kind.")
    assert text.startswith("FROM ./m.gguf\n")
    assert text.count('"""') == 4  # the template's own quotes do not end it
    assert 'SYSTEM """Be kind."""' in text
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n' in text


def test_the_template_has_only_characters_that_ollama_keeps():
    """It reads a Modelfile without the characters that are not printable: a full-width space, a zero-width joiner."""
    template = of_tokenizer("bytes", CHATML.replace("assistant\n", "assistant\u3000\u200d\n"))
    for_ollama = ollama_template(template, adds_bos=False)
    assert for_ollama is not None
    text = for_ollama.go_template()
    assert all(char.isprintable() or char == "\n" for char in text)
    assert go_rendered(text, CONVERSATION) == template.render(CONVERSATION)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("run-1.5_b", "run-1.5_b"),
        ("甄嬛", "tuned"),
        ("甄嬛 my run", "my-run"),
        ("-v2.", "v2"),
        ("x" * 200, "x" * 70),
    ],
)
def test_a_folder_name_becomes_a_name_that_ollama_accepts(folder, name):
    assert model_name(folder) == name


@pytest.mark.parametrize("system", ['say """ three', 'ends with "', "你好\u3000再见", "a\u200db"])
def test_a_system_text_that_a_modelfile_cannot_hold_is_refused(system):
    with pytest.raises(ValueError, match="cannot hold"):
        modelfile(Path("m.gguf"), OllamaTemplate(Texts({}, ""), None), stops=[], system=system)
