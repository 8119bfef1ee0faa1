"""Run notices: how long a run is, and settings that the Trainer accepts but that hardly do what was meant."""

from atomtune.settings.contradictions import FOLLOWS_THE_LOSS
from atomtune.train.arguments import lengths
from atomtune.train.run_context import RunContext
from atomtune.train.run_length import run_length

#: More passes over the records than this are probably a mistake, because the adapter memorises the records.
MANY_PASSES = 30


def say_length(run: RunContext, records: int | None) -> None:
    """Print how many steps and epochs come, and give notices about repeated records, warm-up and many passes.

    records  training records; None for a stream, whose length nobody knows
    """
    if records is None:
        return
    args, length = run.args, run_length(records, run.args)
    steps, passes = length.steps, length.epochs  # a step uses no record twice
    if args.max_steps <= 0:
        per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        epochs = "1 epoch" if args.num_train_epochs == 1 else f"{args.num_train_epochs:g} epochs"
        run.console.say(f"\nTraining: {steps:,} steps of {min(per_step, records):,} records, {epochs} of {records:,}.")
    _say_repeated(run, records)
    _say_warmup(run, steps)
    if args.max_steps > 0 and passes > MANY_PASSES:
        run.console.notice(
            f"--max_steps {args.max_steps:,} goes through the {records:,} records {passes:,.0f} times; "
            "two to five passes are usual (--num_train_epochs 3)."
        )


def _say_repeated(run: RunContext, records: int) -> None:
    args = run.args
    repeated = -records % (args.per_device_train_batch_size * args.world_size)
    if args.world_size > 1 and repeated and args.accelerator_config.even_batches and not args.dataloader_drop_last:
        run.console.notice(
            f"{repeated:,} of {records:,} records are repeated at the end of each epoch, so that all "
            f"{args.world_size} processes have full batches. A single process would not repeat them."
        )


def _say_warmup(run: RunContext, steps: int) -> None:
    args, warmup = run.args, run.args.get_warmup_steps(steps)
    if warmup and args.lr_scheduler_type in ("constant", *FOLLOWS_THE_LOSS):
        run.console.notice(
            f"--warmup_steps has no effect with --lr_scheduler_type {args.lr_scheduler_type.value}; "
            "constant_with_warmup is constant after a warm-up."
        )
    elif warmup >= steps:
        run.console.notice(
            f"the learning rate warms up over the first {warmup:,} steps (--warmup_steps), and the run has {steps:,}: "
            f"it never reaches {args.learning_rate:g}."
        )


def say_changed_length(run: RunContext) -> None:
    """Give a notice if a resumed run is shorter or longer than it was."""
    before = run.earlier_record.get("lengths")
    if run.resumed and before and before != lengths(run.args):
        run.console.notice(
            "the run's length changed, so the learning-rate schedule is stretched to the new length from here."
        )


def say_contradictions(run: RunContext) -> None:
    """Give notices about settings that work against each other."""
    if run.args.load_best_model_at_end and run.args.greater_is_better:
        run.console.notice(
            "--greater_is_better true keeps the worst checkpoint: for a loss and a perplexity, lower is better."
        )
    optimizer, schedule = run.args.optim.value, run.args.lr_scheduler_type.value
    if optimizer.startswith("schedule_free") and not schedule.startswith("constant"):
        run.console.notice(
            f"--optim {optimizer} averages the weights instead of lowering the learning rate, and "
            f"--lr_scheduler_type {schedule} lowers it too, so that late steps count for little. Pass "
            "--lr_scheduler_type constant."
        )
