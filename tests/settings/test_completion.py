"""Completion: through argcomplete, the Tab key offers commands, settings and choices."""

import os
import subprocess
import sys

import pytest


def offered(line: str, tmp_path) -> set[str]:
    """The completions that a shell gets for this line, with the cursor at its end."""
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
    }
    subprocess.run([sys.executable, "-m", "atomtune"], check=True, timeout=60, env=os.environ | asked)
    return set(answer.read_text(encoding="utf-8").split("\n"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("atomtune me", {"merge"}),
        ("atomtune train --lora_r", {"--lora_rank"}),
        ("atomtune train --gradient_acc", {"--gradient_accumulation_steps"}),
        ("atomtune train --overlength ", {"shorten", "skip", "error"}),
        ("atomtune train --lr_scheduler_type cosine_with", {"cosine_with_restarts", "cosine_with_min_lr"}),
        ("atomtune merge --dtype float", {"float64", "float32", "float16"}),
        ("atomtune train --help al", {"all"}),
        ("atomtune merge --lora", set()),
    ],
)
def test_tab_completion_offers_commands_settings_and_choices(tmp_path, line, words):
    assert {word.strip() for word in offered(line, tmp_path)} - {""} == words
