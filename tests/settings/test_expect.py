"""Expectations: a message on a wrong value says in words what is expected, with the range, always in one form."""

import re

import pytest

from atomtune.errors import BadSettings
from atomtune.settings.read import read, read_train

BOTH = ("--dataset_path", "train.jsonl", "--model_path", "base")
SEED = "a whole number, at least 0 and at most 4,294,967,295"


def problem(*flags: str) -> str:
    with pytest.raises(BadSettings) as caught:
        read_train([*BOTH, *flags])
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("name", "value", "expectation"),
    [
        ("lora_rank", "x", "a whole number, at least 1 and at most 65,536"),
        ("lora_rank", "2.5", "a whole number, at least 1 and at most 65,536"),
        ("lora_dropout", "1", "a number, at least 0 and less than 1"),
        ("lora_alpha", "inf", "a number, at least 0 and at most 1,000,000"),
        ("overlength", "cut", "one of shorten, skip, error"),
        ("quantize", "fp4", "one of nf4, int8"),
        ("skip_bad", "perhaps", "true or false"),
        ("mix", "a", "numbers"),
        ("save_total_limit", "0", "a whole number, 1 or more"),
        ("gradient_checkpointing", "often", "one of auto, true, false"),
        # Settings of the Trainer. Regression: pydantic and argparse accepted these values, and a library crashed.
        ("per_device_train_batch_size", "0", "a whole number, 1 or more"),
        ("per_device_eval_batch_size", "0", "a whole number, 1 or more"),
        ("gradient_accumulation_steps", "0", "a whole number, 1 or more"),
        ("learning_rate", "nan", "a number, 0 or more"),
        ("learning_rate", "-1", "a number, 0 or more"),
        ("learning_rate", "-1e-4", "a number, 0 or more"),
        ("learning_rate", "inf", "a number, 0 or more"),
        ("seed", "-1", SEED),
        ("seed", "4294967296", SEED),
        ("data_seed", "-1", SEED),
        ("adam_beta1", "2", "a number, at least 0 and less than 1"),
        ("adam_beta2", "1", "a number, at least 0 and less than 1"),
        ("adam_epsilon", "0", "a number, more than 0"),
        ("weight_decay", "-0.1", "a number, at least 0 and at most 1,000"),
        ("max_grad_norm", "-1", "a number, 0 or more"),
        ("num_train_epochs", "0", "a number, more than 0 and at most 1,000,000"),
        ("max_steps", "-2", "a whole number, -1 or more"),
        ("warmup_steps", "-1", "a number, 0 or more"),
        ("logging_steps", "0", "a number, more than 0"),
        ("save_steps", "0", "a number, more than 0"),
        ("dataloader_num_workers", "-1", "a whole number, 0 or more"),
        ("label_smoothing_factor", "1", "a number, at least 0 and less than 1"),
        ("fp16", "perhaps", "true or false"),
        ("eval_strategy", "sometimes", "one of no, steps, epoch"),
        ("hub_strategy", "never", "one of end, every_save, checkpoint, all_checkpoints"),
    ],
)
def test_an_invalid_value_is_reported_with_what_was_expected(name, value, expectation):
    assert problem(f"--{name}", value) == f"--{name} '{value}': expected {expectation}."


@pytest.mark.parametrize("name", ["lr_scheduler_type", "optim"])
def test_a_long_list_of_choices_is_shown_in_full(name):
    assert re.match(rf"--{name} 'cosin': expected one of (\w+, )+\w+\.( |$)", problem(f"--{name}", "cosin"))


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [("lr_scheduler_type", "cosin", "cosine"), ("layout", "pack", "packed"), ("dtype", "Float_32", "float32")],
)
def test_the_closest_choice_is_suggested_for_a_misspelled_value(name, value, meant):
    assert problem(f"--{name}", value).endswith(f". Did you mean {meant}?")


def test_a_setting_that_is_missing_is_explained():
    with pytest.raises(BadSettings) as caught:
        read("merge", ["--adapter_path", "a"])
    assert str(caught.value) == "--output_dir is missing: folder for the merged model."


def test_a_very_long_value_is_truncated_in_the_message():
    # For example a whole file pasted as a number, or a YAML alias that expands to millions of values.
    line = problem("--lora_rank", "9" * 5000)
    assert len(line) < 200 and "…" in line


@pytest.mark.parametrize("flags", [("--lora_rank", "x"), ("--mix", "a", "b"), ("--fp16", "7"), ("--report_to", "{1}")])
def test_no_sentence_of_a_library_reaches_the_user(flags):
    with pytest.raises(BadSettings) as caught:
        read_train([*BOTH, *flags])
    assert not re.search("Input should|unable to parse|valid (integer|number)|Field required", str(caught.value))
