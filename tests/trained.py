"""Tiny runs whose adapters have memorized their records, so that their answers are known."""

from collections.abc import Callable
from pathlib import Path

from atomtune.cli import main
from tests.conftest import numbered_dialogues, write_jsonl


def train_by_heart(model: Path, folder: Path, records: list[dict], *more: str, steps: int = 120) -> Path:
    """Train a run until it has memorized these records; returns its output folder."""
    data = write_jsonl(folder / "data.jsonl", records)
    flags = ["--model_path", str(model), "--dataset_path", str(data), "--output_dir", str(folder / "out")]
    learning = ["--max_steps", str(steps), "--learning_rate", "1e-2", "--lora_rank", "16", "--lora_dropout", "0"]
    assert main(["train", *flags, *learning, "--dtype", "float32", *more]) == 0
    return folder / "out"


#: A template with thoughts and calls, in marks that servers know.
CALLING = """{{ bos_token }}{% if tools %}Tools: {{ tools | tojson }}
{% endif %}{% for m in messages %}{% if m.role == 'assistant' %}Assistant: {% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}</s>{% else %}{{ m.role }}: {{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"""


#: The tool that calling_by_heart's run calls.
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def calling_by_heart(model: Path, folder: Path, *, max_seq_length: int = 512) -> Path:
    """A run that memorizes an answer with a thought and an answer with a call; returns its output folder."""
    (folder / "t.jinja").write_text(CALLING)
    thinking = {"role": "assistant", "reasoning_content": "想一想", "content": "看守人。"}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "x"}}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    records = [
        {"messages": [{"role": "user", "content": "你是谁？"}, thinking]},
        {"messages": [{"role": "user", "content": "今天天气怎么样？"}, calling], "tools": [WEATHER]},
    ]
    more = ["--template", str(folder / "t.jinja"), "--max_seq_length", str(max_seq_length)]
    return train_by_heart(model, folder, records, *more, steps=200)


def whole_run(folder: Path, command: Callable[[Path, Path], list[str]]) -> tuple[Path, Path]:
    """A file of the numbered dialogues, and the folder of the undisturbed run of `command(file, folder)`."""
    data = write_jsonl(folder / "dialogues.jsonl", numbered_dialogues())
    assert main(command(data, folder / "whole")) == 0
    return data, folder / "whole"
