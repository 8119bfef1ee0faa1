"""Help: the settings that most users change come first, each setting appears once, and no word is broken."""

import pytest

from atomtune.cli import COMMANDS
from atomtune.errors import ExitCode
from atomtune.settings.flags import flag_of, types_of
from atomtune.settings.help import help_text
from atomtune.settings.library import library_types
from atomtune.settings.read import GROUPS

#: The Trainer's settings that most users change.
USUAL = (
    "output_dir learning_rate num_train_epochs per_device_train_batch_size gradient_accumulation_steps max_steps "
    "warmup_steps lr_scheduler_type save_steps"
)


def page(command: str, *, everything: bool = False) -> str:
    return help_text(command, COMMANDS[command].summary, GROUPS[command], everything=everything)


def names(text: str) -> list[str]:
    return [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize("command", sorted(COMMANDS))
@pytest.mark.parametrize("columns", ["1", "40", "80", "200"])
def test_help_wraps_only_between_words_at_any_width(command, columns, monkeypatch):
    unwrapped = page(command, everything=True).split()
    monkeypatch.setenv("COLUMNS", columns)
    wrapped = page(command, everything=True)
    assert wrapped.split() == unwrapped, "a word was cut, or lost"
    for line in wrapped.partition("\nExamples:\n")[0].splitlines():
        # Only a word longer than a line may exceed it: it stays in one piece, so that it can be copied.
        assert len(line) <= min(max(int(columns), 40), 110) or len(line.split()) == 1


def test_train_help_shows_the_most_used_settings():
    shown = names(page("train"))
    assert 20 <= len(shown) <= 26
    assert set(USUAL.split()) <= set(shown)
    assert "`atomtune train --help all`" in page("train")


def test_the_whole_page_shows_every_setting_once():
    shown = names(page("train", everything=True))
    assert sorted(shown) == sorted(library_types().keys() | types_of(GROUPS["train"]).keys())
    for command in COMMANDS:
        assert "--help all`" not in page(command, everything=True)
        assert {flag_of(name)[2:] for name in types_of(GROUPS[command])} <= set(names(page(command, everything=True)))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_page_has_examples_and_the_exit_codes(command):
    assert page(command).count(f"\n  atomtune {command} ") >= 2
    codes = page(command).partition("Exit codes:")[2]
    assert all(f" {code}  " in codes for code in map(int, ExitCode))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_setting_in_help_has_a_value_and_a_description(command):
    lines = page(command, everything=True).splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            assert len(line.split()) >= 2, f"{line} takes what?"
            assert lines[number + 1].strip(), f"{line} does what?"


def test_sweep_help_describes_output_dir_and_resume_for_a_sweep():
    """Both are also settings of `train`, where they refer to one run."""
    words = " ".join(page("sweep", everything=True).split())
    assert "--output_dir FOLDER folder for the trials" in words
    assert "--resume true|false continue the sweep" in words and "newest complete checkpoint" not in words
