"""Defaults: values for settings on `auto`, derived from the records and the base, each with a reason.

Defaults that are the same for every run are in settings/run_settings.py. The measurements behind the numbers here are
in docs/defaults.md; benchmarks/defaults.py made them. A resumed run keeps the values of the original run, which are in
the manifests of its checkpoints, except for when it logs, evaluates and saves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainingArguments

from atomtune.errors import BadSettings
from atomtune.language import message
from atomtune.model.base_shape import BaseShape, base_shape
from atomtune.settings.run_settings import LoraSettings
from atomtune.settings.train_settings import TrainSettings
from atomtune.train.arguments import needs_records, trainer_arguments
from atomtune.train.run_context import RunContext
from atomtune.train.run_length import RunLength, run_length

#: Steps that a run should have; with fewer records, it makes more epochs and smaller batches.
WANTED_STEPS = 200
#: Smallest value chosen for max_seq_length, unless the base allows less.
LEAST_LENGTH = 256
#: A run with fewer steps than this rarely teaches an adapter much.
FEW_STEPS = 100
#: The largest batch size that leaves WANTED_STEPS is chosen, but a step has at least SMALLEST_STEP records.
BATCH_SIZES, SMALLEST_STEP = (16, 8, 4, 2, 1), 4
USUAL_EPOCHS, MOST_EPOCHS = 3, 10
#: Settings that put several records into a step; a smaller value of one above 1 gives more steps.
_RECORDS_A_STEP = ("gradient_accumulation_steps", "per_device_train_batch_size")
#: With fewer records, all are trained on: a few held-out ones would say little and be missing in training.
LEAST_TO_SPLIT = 50
HELD_OUT_SHARE, FEWEST_HELD_OUT, MOST_HELD_OUT = 0.1, 5, 200
#: Number of logged losses, if a run has that many steps; and the most steps between two of them.
LOGGED_LINES, LONGEST_SILENCE = 50, 10
#: A run with FEWEST_EPOCHS to MANY_EPOCHS is evaluated and saved after each epoch; any other one TIMES times.
FEWEST_EPOCHS, MANY_EPOCHS, TIMES = 2, 12, 10
#: Without evaluation, a run with fewer than SHORT_RUN steps keeps only its last checkpoint; a longer one saves at least
#: every CHECKPOINT_STEPS.
SHORT_RUN, CHECKPOINT_STEPS = 50, 500
#: "LoRA without regret" (Thinking Machines, 2025) fits the best rate of LoRA with alpha 32 and any rank, for Llama
#: models, as 5e-4 * (2000 / width) ** 0.78. At a width of 576 that was the best rate tried; at 192 a slightly higher
#: one is better. The rate is bounded where nothing was measured.
RATE, RATE_WIDTH, RATE_POWER, RATE_ALPHA = 5e-4, 2000, 0.78, 32
LOWEST_RATE, HIGHEST_RATE, UNKNOWN_RATE = 1e-4, 4e-3, 2e-4
#: "LoRA without regret" finds that the best rate of short runs is about 15 times that of full fine-tuning, not 10
#: times. In runs with fewer steps than this, a factor of 1.5 ended at most 5 % above the best loss tried, without it 14
#: %; one column (fifty style records on SmolLM2) is an exception.
SHORT_RUN_STEPS, SHORT_RUN_TIMES = 500, 1.5
#: A rate this many times the automatic one never helped: four times is too high for each kind of records.
FAR_TOO_HIGH = 10

#: Settings that a resumed run keeps as the original run chose them. When it logs, evaluates and saves is chosen again:
#: the user may have changed the run's length or one of these intervals, and only together do they fit each other.
_KEPT = ("max_seq_length", "per_device_train_batch_size", "num_train_epochs", "learning_rate")

#: Key in a checkpoint's manifest: the length limit when records were encoded with max_seq_length on auto.
_LONGEST = "longest_record"


@dataclass(frozen=True)
class DataSize:
    """How much there is to learn from.

    records         per epoch; None for a stream
    held_out        records to evaluate on
    eval_size       --eval_size, or the value chosen for it
    longest_tokens  of the longest example
    """

    records: int | None
    held_out: int
    eval_size: float
    longest_tokens: int


@dataclass
class Derived:
    """Values chosen for settings on auto, and the reason for each, in the order in which they are printed.

    own_rate  the automatic learning rate, even if the setting is not on auto
    """

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    own_rate: float = UNKNOWN_RATE

    def take(self, name: str, value: Any, reason: str) -> None:
        self.values[name], self.reasons[name] = value, reason


def with_sequence_limit(run: RunContext) -> tuple[RunContext, BaseShape]:
    """The run with max_seq_length set to the base's limit if it is on auto, and the base's shape.

    Records are encoded with this limit, whatever their lengths turn out to be.
    """
    model = run.settings.model
    shape = base_shape(str(model.model_path), trust_remote_code=model.trust_remote_code, use_cpu=run.args.use_cpu)
    if run.settings.data.max_seq_length is not None:
        return run, shape
    shape = replace(shape, longest=run.derived_before.get(_LONGEST, shape.longest))
    data = replace(run.settings.data, max_seq_length=shape.longest)
    return replace(run, settings=replace(run.settings, data=data)), shape


def records_to_hold_out(settings: TrainSettings, records: int, *, derived_before: Mapping[str, Any]) -> float:
    """--eval_size, or the value that auto means: a number of records, or a share below 1; 0 for none.

    records     how many there are; with --mix, those of a file count as much as an epoch uses them
    derived_before  values chosen by the run that is resumed; empty for a new one
    Raises BadSettings if it would hold out none or all of the records.
    """
    size = settings.data.eval_size
    if size is None and "eval_size" in derived_before and not settings.data.eval_path:
        size = float(derived_before["eval_size"])
    if size is not None:
        wanted = held_out_count(size, records)
        if size and not 0 < wanted < records:
            raise BadSettings([f"--eval_size {size:g} holds out {wanted} of {records} records."])
        return size
    if settings.data.eval_path or settings.trainer.get("eval_strategy") == "no" or records < LEAST_TO_SPLIT:
        return 0
    return min(round(HELD_OUT_SHARE * records), MOST_HELD_OUT)


def held_out_count(eval_size: float, records: int) -> int:
    """--eval_size, a share if it is below 1, as a number of records."""
    return round(eval_size * records) if eval_size < 1 else int(eval_size)


def with_defaults(run: RunContext, size: DataSize, shape: BaseShape) -> RunContext:
    """The run with a value for every setting on auto; the values are in force, printed and recorded."""
    before = run.derived_before
    kept = {name: before[name] for name in _KEPT if name in before and _is_auto(run.settings, name)}
    reasons = dict.fromkeys(kept, message("as in the run that is resumed"))
    # If a folder was chosen for the run, it stays the run's folder.
    settings = run.settings.with_derived({**kept, "output_dir": run.args.output_dir}, reasons)
    derived = derive(settings, trainer_arguments(settings) if kept else run.args, size, shape)
    derived.values, derived.reasons = {**kept, **derived.values}, {**reasons, **derived.reasons}
    if before.get("eval_size") == 0 and "eval_size" in derived.values and not run.settings.data.eval_path:
        derived.reasons["eval_size"] = "the run that is resumed held none out"
    settings = settings.with_derived(derived.values, derived.reasons)
    of_manifest = {**derived.values, _LONGEST: shape.longest}
    run = replace(run, settings=settings, args=trainer_arguments(settings), derived=of_manifest)
    _say(run, derived, size)
    if shape.width is not None:
        _warn_of_rate(run, derived.own_rate)
    return run


def derive(settings: TrainSettings, args: TrainingArguments, size: DataSize, shape: BaseShape) -> Derived:
    """A value for every setting that the user left on auto."""
    derived = Derived()
    if _is_auto(settings, "max_seq_length"):
        derived.take("max_seq_length", *_longest(size, shape))
    if _is_auto(settings, "eval_size"):
        derived.take("eval_size", size.eval_size, _held_out_why(size, settings))
    epochs, batch = _epochs_and_batch(derived, settings, args, size)
    length = run_length(size.records, args, batch=batch, epochs=epochs)
    derived.own_rate, why = learning_rate(shape.width, settings.lora, steps=length.steps)
    if _is_auto(settings, "learning_rate"):
        derived.take("learning_rate", derived.own_rate, why)
    if _is_auto(settings, "logging_steps"):
        derived.values["logging_steps"] = min(max(length.steps // LOGGED_LINES, 1), LONGEST_SILENCE)
    if _is_auto(settings, "logging_first_step"):
        derived.values["logging_first_step"] = True
    _evaluations(derived, settings, size, length)
    _checkpoints(derived, settings, size, length)
    _best(derived, settings, size)
    return derived


def _is_auto(settings: TrainSettings, name: str) -> bool:
    """Whether the user left this setting on auto."""
    return name not in settings.origins


def _longest(size: DataSize, shape: BaseShape) -> tuple[int, str]:
    """The length of the longest record, rounded up to 64 tokens, so that only the base's limit shortens records."""
    if size.records is None or size.longest_tokens >= shape.longest:
        return shape.longest, shape.longest_why
    tokens = 64 * math.ceil(size.longest_tokens / 64)
    least = min(LEAST_LENGTH, shape.longest)
    if tokens < least:
        return least, f"the longest record has {size.longest_tokens:,} tokens, and the minimum is {least}"
    return min(tokens, shape.longest), f"the longest record has {size.longest_tokens:,} tokens"


def _held_out_why(size: DataSize, settings: TrainSettings) -> str:
    if size.eval_size:
        return "records that are not trained on show whether the run works"
    if settings.data.eval_path:
        return "--eval_path has the records to evaluate on"
    if size.records is None:
        return "--streaming holds none out"
    if settings.trainer.get("eval_strategy") == "no":
        return "--eval_strategy no"
    if size.records >= LEAST_TO_SPLIT:
        return "the records are too alike to hold some out"
    return f"fewer than {LEAST_TO_SPLIT} records: all are trained on"


def _epochs_and_batch(
    derived: Derived, settings: TrainSettings, args: TrainingArguments, size: DataSize
) -> tuple[float, int]:
    """(epochs, batch size per device), chosen so that a small data set gets enough steps."""
    free_batch = _is_auto(settings, "per_device_train_batch_size")
    free_epochs = _is_auto(settings, "num_train_epochs")
    batch = BATCH_SIZES[0] if free_batch else args.per_device_train_batch_size
    epochs = USUAL_EPOCHS if free_epochs else args.num_train_epochs
    if size.records is None or args.max_steps > 0:
        if free_batch:
            batch = max(batch // args.world_size, 1)  # a step has the same size on any number of processes
            derived.take("per_device_train_batch_size", batch, "the largest; --max_steps sets the number of steps")
        return epochs, batch
    if free_batch:
        batch = largest_batch(size.records, args, epochs=epochs)
    if free_epochs:
        steps_an_epoch = run_length(size.records, args, batch=batch).steps_an_epoch
        epochs = min(max(USUAL_EPOCHS, math.ceil(WANTED_STEPS / steps_an_epoch)), MOST_EPOCHS)
    steps = run_length(size.records, args, batch=batch, epochs=epochs).steps
    why = f"{size.records:,} records make {steps:,} steps"
    if free_batch:
        derived.take("per_device_train_batch_size", batch, why)
    if free_epochs:
        derived.take("num_train_epochs", float(epochs), why)
    return epochs, batch


def largest_batch(records: int, args: TrainingArguments, *, epochs: float) -> int:
    """The largest batch size that leaves enough steps."""
    batches_a_step = args.gradient_accumulation_steps * args.world_size
    for batch in BATCH_SIZES:
        steps = run_length(records, args, batch=batch, epochs=epochs).steps
        if steps >= WANTED_STEPS or batch * batches_a_step <= SMALLEST_STEP:
            return batch
    return BATCH_SIZES[-1]


def learning_rate(width: int | None, lora: LoraSettings, *, steps: int) -> tuple[float, str]:
    """(rate, reason) for a base of this width and a run of this many steps; the rate is rounded to two digits."""
    if width is None or not lora.lora_alpha:
        return UNKNOWN_RATE, "the width of the base is not known"
    # rsLoRA scales the adapter by alpha / √rank, as plain LoRA does with an alpha that is √rank times as large.
    alpha = lora.lora_alpha * (math.sqrt(lora.lora_rank) if lora.use_rslora else 1)
    rate = RATE * (RATE_WIDTH / width) ** RATE_POWER * RATE_ALPHA / alpha
    rate = min(max(rate, LOWEST_RATE), HIGHEST_RATE)
    of_alpha = "" if lora.lora_alpha == RATE_ALPHA else f" and --lora_alpha {lora.lora_alpha:g}"
    of_kind = " and --use_rslora, whose scale is larger" if lora.use_rslora else ""
    is_short = steps < SHORT_RUN_STEPS
    of_steps = f"; 1.5 times that in under {SHORT_RUN_STEPS} steps" if is_short else ""
    rate *= SHORT_RUN_TIMES if is_short else 1
    return float(f"{rate:.1e}"), f"by the width of the base, {width:,}{of_alpha}{of_kind}{of_steps}"


def _evaluations(derived: Derived, settings: TrainSettings, size: DataSize, length: RunLength) -> None:
    """Evaluate before the first step, and then with each checkpoint that the user set, or a few times in the run."""
    trainer = settings.trainer
    if not size.held_out:
        if setting := needs_records(settings):
            raise BadSettings(
                [
                    f"{setting} needs records to evaluate on: --eval_path or "
                    f"--eval_size. Without them a run holds some out if it has {LEAST_TO_SPLIT} or more."
                ]
            )
        derived.values["eval_strategy"] = "no"
        return
    if _is_auto(settings, "eval_on_start"):
        derived.values["eval_on_start"] = not trainer.get("eval_delay")
    if not _is_auto(settings, "eval_strategy"):
        return
    save_steps = trainer.get("save_steps")
    if "eval_steps" in trainer:
        derived.values["eval_strategy"] = "steps"
    elif save_steps and _is_auto(settings, "save_strategy") and _suits(save_steps, length.steps):
        derived.values |= {"eval_strategy": "steps", "eval_steps": save_steps}
    elif trainer.get("save_strategy") == "epoch" or FEWEST_EPOCHS <= length.epochs <= MANY_EPOCHS:
        derived.values["eval_strategy"] = "epoch"
    else:
        derived.values |= {"eval_strategy": "steps", "eval_steps": max(math.ceil(length.steps / TIMES), 1)}


def _suits(interval: float, steps: int) -> bool:
    """Whether this interval (in steps, or a share of the run) gives at least two and not too many evaluations."""
    times = 1 / interval if interval < 1 else steps / interval
    return 2 <= times <= 2 * TIMES


def _checkpoints(derived: Derived, settings: TrainSettings, size: DataSize, length: RunLength) -> None:
    """A checkpoint with each evaluation, so that the best can be kept; else after each epoch or a number of steps."""
    if not (_is_auto(settings, "save_strategy") and _is_auto(settings, "save_steps")):
        return
    steps, epochs = length.steps, length.epochs
    values = {**settings.trainer, **derived.values}
    if size.held_out:
        eval_steps = values.get("eval_steps") or values["logging_steps"]
        if values["eval_strategy"] == "epoch":
            derived.values["save_strategy"] = "epoch"
        elif eval_steps < 1:
            derived.values |= {"save_strategy": "steps", "save_steps": eval_steps}
        else:  # a multiple of it
            times = max(math.ceil(steps / TIMES / eval_steps), 1)
            derived.values |= {"save_strategy": "steps", "save_steps": int(times * eval_steps)}
    elif steps >= SHORT_RUN and FEWEST_EPOCHS <= epochs <= MANY_EPOCHS and steps / epochs <= CHECKPOINT_STEPS:
        derived.values["save_strategy"] = "epoch"
    else:
        interval = CHECKPOINT_STEPS if steps < SHORT_RUN else min(CHECKPOINT_STEPS, math.ceil(steps / TIMES))
        derived.values |= {"save_strategy": "steps", "save_steps": interval}


def _best(derived: Derived, settings: TrainSettings, size: DataSize) -> None:
    """Keep the best checkpoint as the result, if each one is evaluated and the weights are not sharded."""
    if not _is_auto(settings, "load_best_model_at_end"):
        return
    values = {**settings.trainer, **derived.values}
    strategy, saves = values.get("eval_strategy"), values.get("save_strategy", "steps")
    every, saved_every = values.get("eval_steps") or values.get("logging_steps"), values.get("save_steps", 500)
    together = strategy == saves and (strategy == "epoch" or _is_multiple(saved_every, every))
    sharded = values.get("fsdp") or values.get("deepspeed")
    derived.values["load_best_model_at_end"] = bool(size.held_out and not sharded and (together or saves == "best"))


def _is_multiple(larger: float, smaller: float | None) -> bool:
    if not smaller:
        return False
    times = larger / smaller
    return (larger < 1) == (smaller < 1) and abs(times - round(times)) < 1e-9


def _say(run: RunContext, derived: Derived, size: DataSize) -> None:
    """Print the chosen values with their reasons, and a notice if there are too few steps to learn much."""
    if derived.reasons:
        run.console.say("Chosen for this run; each is a setting of its own:")
        run.console.columns([(name, _shown(derived.values[name]), reason) for name, reason in derived.reasons.items()])
    args = run.args
    if size.records is None or args.max_steps > 0:
        return
    steps = run_length(size.records, args).steps
    if steps < FEW_STEPS:
        smaller = [name for name in _RECORDS_A_STEP if getattr(args, name) > 1]
        run.console.notice(
            f"{size.records:,} records make {steps:,} steps, which may be too few to learn much. More records help "
            f"most; then a higher --num_train_epochs{f', or a smaller --{smaller[0]}' if smaller else ''}."
        )


def _warn_of_rate(run: RunContext, own: float) -> None:
    """Give a notice if the rate is so high that the loss will most likely rise; own is the automatic rate."""
    rate = run.args.learning_rate
    if "adam" in run.args.optim and rate > FAR_TOO_HIGH * own:
        run.console.notice(
            f"--learning_rate {rate:g} is {rate / own:,.0f} times the automatic value ({own:g}); the loss will most "
            "likely rise. Leave the setting out, or lower it."
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
