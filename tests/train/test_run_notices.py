"""Notices about a run's length and settings: given when they apply, and not otherwise."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from atomtune.console import Console
from atomtune.train.run_notices import say_changed_length, say_contradictions, say_length


@pytest.fixture
def run_of(tmp_path):
    """A run with these training arguments; its console collects the notices."""

    def make(resumed: bool = False, earlier: dict[str, Any] | None = None, **values: Any) -> Any:
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **values)
        return SimpleNamespace(args=args, console=Console(), resumed=resumed, earlier_record=earlier or {})

    return make


def notices_of_length(run: Any, records: int | None = 40) -> list[str]:
    say_length(run, records)
    return run.console.notices


def test_the_steps_and_epochs_are_printed_before_training(run_of, capsys):
    say_length(run_of(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=1), 40)
    say_length(run_of(per_device_train_batch_size=64, num_train_epochs=2.5), 40)
    assert capsys.readouterr().out.split("\n")[1::2][:2] == [
        "Training: 5 steps of 8 records, 1 epoch of 40.",
        "Training: 3 steps of 40 records, 2.5 epochs of 40.",
    ]


def test_the_length_of_a_stream_is_not_printed(run_of, capsys):
    assert notices_of_length(run_of(max_steps=1000), None) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("steps", "is_given"), [(2, True), (1, False)])
def test_a_warmup_that_outlasts_the_run_is_reported(run_of, steps, is_given):
    # The learning rate once silently stayed at a thousandth of the requested one.
    notices = notices_of_length(run_of(max_steps=2, warmup_steps=steps, learning_rate=0.01))
    assert ["never reaches 0.01" in notice for notice in notices] == [True] * is_given


def test_a_warmup_that_the_schedule_leaves_out_is_reported(run_of):
    (notice,) = notices_of_length(run_of(max_steps=2, warmup_steps=2, lr_scheduler_type="constant"))
    assert notice.startswith("--warmup_steps has no effect with --lr_scheduler_type constant;")
    assert notices_of_length(run_of(max_steps=3, warmup_steps=2, lr_scheduler_type="constant_with_warmup")) == []


@pytest.mark.parametrize(("steps", "is_given"), [(300, False), (301, True)])
def test_many_passes_through_the_records_are_reported(run_of, steps, is_given):
    notices = notices_of_length(run_of(max_steps=steps, per_device_train_batch_size=4))  # 10 steps are one pass
    assert ["goes through the 40 records 30 times" in notice for notice in notices] == [True] * is_given


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_decaying_learning_rate_with_an_averaging_optimizer_is_reported(run_of, schedule):
    run = run_of(optim="schedule_free_sgd", lr_scheduler_type=schedule)
    say_contradictions(run)
    assert ["--lr_scheduler_type linear lowers it too" in notice for notice in run.console.notices] == [True] * (
        schedule == "linear"
    )


@pytest.mark.parametrize("keeps_best", [True, False])
def test_keeping_the_worst_checkpoint_is_reported(run_of, keeps_best):
    run = run_of(
        load_best_model_at_end=keeps_best, greater_is_better=True, eval_strategy="steps", save_strategy="steps"
    )
    say_contradictions(run)
    assert ["keeps the worst checkpoint" in notice for notice in run.console.notices] == [True] * keeps_best


def test_a_resumed_run_of_another_length_is_reported(run_of):
    def notices(**values: Any) -> list[str]:
        run = run_of(max_steps=20, **values)
        say_changed_length(run)
        return run.console.notices

    shorter, equal = ({"lengths": {"max_steps": steps, "num_train_epochs": 3.0}} for steps in (10, 20))
    assert "the learning-rate schedule is stretched" in notices(resumed=True, earlier=shorter)[0]
    assert notices(resumed=True, earlier=equal) == []
    assert notices(resumed=False, earlier=shorter) == []
    assert notices(resumed=True) == []
