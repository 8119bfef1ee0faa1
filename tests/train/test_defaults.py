"""Defaults of a run: enough steps for few records, a rate that fits the width, and the best adapter is kept."""

import math

import pytest
from transformers import PreTrainedConfig, TrainingArguments

from atomtune.console import Console
from atomtune.errors import BadSettings
from atomtune.model.base_shape import NO_LIMIT, BaseShape, tokens_in_memory
from atomtune.settings.read import read_train
from atomtune.settings.run_settings import LoraSettings
from atomtune.train.arguments import trainer_arguments
from atomtune.train.checkpoint.start import Fresh
from atomtune.train.defaults import (
    FEW_STEPS,
    HIGHEST_RATE,
    LOWEST_RATE,
    MOST_EPOCHS,
    SMALLEST_STEP,
    WANTED_STEPS,
    DataSize,
    derive,
    largest_batch,
    learning_rate,
    records_to_hold_out,
    with_defaults,
)
from atomtune.train.run_context import RunContext
from atomtune.train.run_report import RunRecord

SHAPE = BaseShape(width=2000, longest=4096, longest_why="the base has 4,096 positions")


def derived(tmp_path, *flags: str, records: int | None = 200, held_out: int = 20, longest: int = 90) -> dict:
    settings = read_train(
        ["--model_path", "m", "--dataset_path", "d.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "true", *flags]
    )
    size = DataSize(records=records, held_out=held_out, eval_size=held_out, longest_tokens=longest)
    return derive(settings, trainer_arguments(settings), size, SHAPE).values


@pytest.mark.parametrize("records", [10, 50, 180, 450, 900, 4000, 100_000])
def test_every_dataset_size_gets_enough_steps_or_the_most_epochs_allowed(tmp_path, records):
    values = derived(tmp_path, records=records)
    batch, epochs = values["per_device_train_batch_size"], values["num_train_epochs"]
    steps = epochs * math.ceil(records / batch)
    assert steps >= WANTED_STEPS or (epochs == MOST_EPOCHS and batch == SMALLEST_STEP)
    assert 1 <= batch <= 16 and 3 <= epochs <= MOST_EPOCHS
    assert steps >= FEW_STEPS or records < 50


def test_a_larger_set_never_gets_smaller_batches_or_more_epochs(tmp_path):
    sizes = [derived(tmp_path, records=records) for records in range(20, 3000, 61)]
    batches = [values["per_device_train_batch_size"] for values in sizes]
    epochs = [values["num_train_epochs"] for values in sizes]
    assert batches == sorted(batches) and epochs == sorted(epochs, reverse=True)


def test_what_the_user_sets_is_not_derived(tmp_path):
    flags = {
        "learning_rate": "1e-4", "num_train_epochs": "2", "per_device_train_batch_size": "16", "logging_steps": "10",
        "save_steps": "40000", "max_seq_length": "256", "eval_size": "0", "load_best_model_at_end": "false",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert not flags.keys() & derived(tmp_path, *words, held_out=0).keys()


def test_auto_is_the_same_as_leaving_it_out(tmp_path):
    names = ("learning_rate", "num_train_epochs", "max_seq_length", "eval_size", "save_steps", "eval_strategy")
    words = [word for name in names for word in (f"--{name}", "auto")]
    assert derived(tmp_path, *words) == derived(tmp_path)


def test_max_steps_keeps_the_usual_batch_size(tmp_path):
    values = derived(tmp_path, "--max_steps", "30", records=40)
    assert values["per_device_train_batch_size"] == 16
    assert "num_train_epochs" not in values


def test_processes_share_the_batch_size_when_max_steps_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 4))
    assert derived(tmp_path, "--max_steps", "30")["per_device_train_batch_size"] == 4


def test_gradient_accumulation_counts_toward_the_batch_size(tmp_path):
    one, eight = (TrainingArguments(use_cpu=True, gradient_accumulation_steps=batches) for batches in (1, 8))
    assert largest_batch(1000, one, epochs=3) == 8
    assert largest_batch(1000, eight, epochs=3) == 1
    assert derived(tmp_path, "--gradient_accumulation_steps", "4", records=5000)["per_device_train_batch_size"] == 16


def rate_of(width: int | None, *, steps: int = 1000, **lora) -> tuple[float, str]:
    return learning_rate(width, LoraSettings(**lora), steps=steps)


@pytest.mark.parametrize(("width", "rate"), [(2000, 5e-4), (4096, 2.9e-4), (576, 1.3e-3), (192, 3.1e-3)])
def test_a_wider_base_gets_a_lower_rate(width, rate):
    assert rate_of(width)[0] == pytest.approx(rate, rel=0.02)


def test_the_learning_rate_is_bounded_and_inversely_scaled_by_lora_alpha():
    assert rate_of(8)[0] == HIGHEST_RATE
    assert rate_of(10**6)[0] == LOWEST_RATE
    assert rate_of(2000, lora_alpha=64)[0] == pytest.approx(rate_of(2000)[0] / 2)
    assert 0 < rate_of(None)[0] < HIGHEST_RATE


def test_with_rslora_the_rate_counts_the_root_of_the_rank_as_alpha():
    (plain, _), (rate, why) = (rate_of(2000, lora_rank=4, use_rslora=rslora) for rslora in (False, True))
    assert rate == pytest.approx(plain / 2)
    assert why == "by the width of the base, 2,000 and --use_rslora, whose scale is larger"


def test_a_short_run_gets_1_5_times_the_learning_rate_and_states_why():
    (short, why), (long, usual) = rate_of(2000, steps=499), rate_of(2000, steps=500)
    assert short == pytest.approx(1.5 * long)
    assert why == f"{usual}; 1.5 times that in under 500 steps"
    assert rate_of(None, steps=10) == rate_of(None), "a guess stays careful"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--num_train_epochs", "1"],
        ["--num_train_epochs", "30"],
        ["--max_steps", "7"],
        ["--save_steps", "20"],
        ["--eval_steps", "7"],
        ["--eval_steps", "0.1"],
        ["--save_strategy", "epoch"],
        ["--eval_strategy", "epoch"],
        ["--eval_strategy", "steps"],
    ],
)
def test_a_checkpoint_is_saved_with_each_evaluation_so_the_best_can_be_kept(tmp_path, flags):
    """The library refuses load_best_model_at_end otherwise, so its own arguments are the oracle."""
    values = derived(tmp_path, *flags)
    assert values["load_best_model_at_end"] and values["eval_on_start"]
    settings = read_train(
        ["--model_path", "m", "--dataset_path", "d", "--output_dir", str(tmp_path), "--use_cpu", "true", *flags]
    )
    args = trainer_arguments(settings.with_derived(values, {}))
    assert args.eval_strategy == args.save_strategy != "no"


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_strategy", "steps", "--eval_steps", "0.5", "--save_steps", "2"],  # a share of the run, and steps
        ["--eval_strategy", "steps", "--eval_steps", "4", "--save_steps", "6"],
        ["--fsdp", "full_shard"],
    ],
    ids=" ".join,
)
def test_the_best_is_not_kept_where_the_library_cannot_keep_it(tmp_path, flags):
    assert derived(tmp_path, *flags)["load_best_model_at_end"] is False


def held_out(*flags: str, records: int = 40, derived_before: dict | None = None) -> float:
    settings = read_train(["--model_path", "m", "--dataset_path", "d.jsonl", *flags])
    return records_to_hold_out(settings, records, derived_before=derived_before or {})


@pytest.mark.parametrize("size", ["0.01", "40", "41"])
def test_a_size_that_holds_out_no_record_or_all_of_them_is_refused(size):
    with pytest.raises(BadSettings, match=f"--eval_size {size} holds out"):
        held_out("--eval_size", size)


def test_a_resumed_run_holds_out_as_many_records_as_it_began_with():
    assert (held_out("--eval_size", "39"), held_out("--eval_size", "0")) == (39, 0)
    assert (held_out(records=500), held_out(records=40)) == (50, 0)
    assert held_out(records=500, derived_before={"eval_size": 7}) == 7
    assert held_out("--eval_size", "9", records=500, derived_before={"eval_size": 7}) == 9
    # With --resume_anyway, a file of records to evaluate on was read and then ignored.
    assert held_out("--eval_path", "e.jsonl", records=500, derived_before={"eval_size": 7}) == 0


def resumed(tmp_path, before: dict, *flags: str, held_out: int = 11) -> RunContext:
    """A run of 99 records, resumed with these flags, whose first part had chosen the values `before`."""
    words = ["--model_path", "m", "--dataset_path", "d.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    settings = read_train([*words, *flags])
    args, record = trainer_arguments(settings), RunRecord(tmp_path, writes=False)
    run = RunContext(settings, args, Fresh(), {}, Console(speaks=False), record, derived_before=before)
    return with_defaults(run, DataSize(99, held_out=held_out, eval_size=held_out, longest_tokens=90), SHAPE)


def resumed_for_more_epochs(tmp_path, *flags: str) -> RunContext:
    """A run of 99 records that began with 8 epochs and is resumed for 20."""
    before = derived(tmp_path, *flags, records=99, held_out=11)
    assert (before["per_device_train_batch_size"], before["num_train_epochs"]) == (4, 8)
    return resumed(tmp_path, before, *flags, "--num_train_epochs", "20")


@pytest.mark.parametrize("flags", [[], ["--eval_size", "0"]])
def test_a_run_that_held_none_out_can_be_resumed_with_eval_size_0(tmp_path, flags):
    # With the flag, which says what the run does anyway, it ended in a traceback.
    run = resumed(tmp_path, {"eval_size": 0}, *flags, held_out=0)
    assert run.settings.data.eval_size == 0
    assert run.settings.origins["eval_size"] == (
        "--eval_size" if flags else "auto: the run that is resumed held none out"
    )


def test_a_run_resumed_for_more_epochs_logs_evaluates_and_saves_at_intervals_of_its_new_length(tmp_path):
    # Its intervals were those of 260 steps, which other batches would have made, and the reason for its batch size said
    # so too.
    run = resumed_for_more_epochs(tmp_path)
    assert run.args.per_device_train_batch_size == 4  # 20 epochs would allow 8
    assert (run.args.eval_steps, run.args.save_steps, run.args.logging_steps) == (50, 50, 10)  # of 20 * 25 steps
    names = ("per_device_train_batch_size", "learning_rate")
    assert {run.settings.origins[name] for name in names} == {"auto: as in the run that is resumed"}


def test_a_run_that_evaluates_as_often_as_it_logs_can_be_resumed_for_more_epochs(tmp_path):
    # It was refused: its checkpoints were a multiple of new intervals, and its evaluations had the old ones.
    args = resumed_for_more_epochs(tmp_path, "--eval_strategy", "steps").args
    assert (args.eval_steps, args.save_steps, args.load_best_model_at_end) == (10, 50, True)


def test_a_delayed_evaluation_is_not_made_at_the_start(tmp_path):
    assert derived(tmp_path, "--eval_delay", "1")["eval_on_start"] is False


def test_infrequent_saves_leave_evaluation_at_once_per_epoch(tmp_path):
    values = derived(tmp_path, "--save_steps", "40000")
    assert values["eval_strategy"] == "epoch"
    assert not values["load_best_model_at_end"]


def test_no_records_to_evaluate_on_means_no_evaluation(tmp_path):
    values = derived(tmp_path, held_out=0)
    assert values["eval_strategy"] == "no" and not values["load_best_model_at_end"]
    with pytest.raises(BadSettings, match="needs records"):
        derived(tmp_path, "--eval_strategy", "epoch", held_out=0)


@pytest.mark.parametrize(
    "flags",
    [
        ["--save_strategy", "best"],
        ["--save_strategy", "best", "--load_best_model_at_end", "false"],
        ["--lr_scheduler_type", "reduce_lr_on_plateau"],
        ["--lr_scheduler_type", "greedy"],
    ],
    ids=" ".join,
)
def test_settings_that_follow_the_held_out_loss_work_with_records_held_out_automatically(tmp_path, flags):
    # Once the library refused them: it knew no evaluation yet, or no metric.
    values = derived(tmp_path, *flags)
    settings = read_train(
        ["--model_path", "m", "--dataset_path", "d", "--output_dir", str(tmp_path), "--use_cpu", "true", *flags]
    )
    args = trainer_arguments(settings.with_derived(values, {}))
    assert args.eval_strategy == "epoch" and args.metric_for_best_model == "loss" and not args.greater_is_better
    with pytest.raises(BadSettings, match=f"{flags[0]} {flags[1]} needs records"):
        derived(tmp_path, *flags, held_out=0)


def test_the_loss_curve_gets_enough_logged_points(tmp_path):
    for records in (60, 500, 20_000):
        values = derived(tmp_path, records=records)
        batch, epochs = values["per_device_train_batch_size"], values["num_train_epochs"]
        steps = epochs * math.ceil(records / batch)
        assert steps / values["logging_steps"] >= min(50, steps)
        assert values["logging_steps"] <= 10


def test_max_seq_length_follows_the_longest_record_up_to_the_bases_limit(tmp_path):
    assert derived(tmp_path, longest=90)["max_seq_length"] == 256
    assert derived(tmp_path, longest=1000)["max_seq_length"] == 1024
    assert derived(tmp_path, longest=4090)["max_seq_length"] == 4096
    assert derived(tmp_path, longest=4096)["max_seq_length"] == 4096
    assert derived(tmp_path, "--max_steps", "5", records=None, held_out=0)["max_seq_length"] == 4096


def test_more_memory_allows_longer_records():
    config = PreTrainedConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    limits = [tokens_in_memory(config, gigabytes * 10**9) for gigabytes in (1, 8, 24, 80)]
    assert limits == sorted(limits) and limits[0] >= 256
    assert all(limit & (limit - 1) == 0 for limit in limits), "powers of two, so that two runs cut alike"
    nothing = PreTrainedConfig(hidden_size=0, intermediate_size=0, num_hidden_layers=32)
    assert tokens_in_memory(nothing, 10**9) == NO_LIMIT
