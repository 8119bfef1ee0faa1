"""Contradictions: settings that are valid alone but cannot be combined."""

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import date
from typing import Any

from atomtune.choices import METRICS, SHORTEST_RECORD

#: Most brackets in a JSON value on the command line; Python's json nests at most a thousand deep.
_MOST_BRACKETS = 500
#: Schedules that need the held-out loss.
FOLLOWS_THE_LOSS = ("reduce_lr_on_plateau", "greedy")
#: Most characters of such a value in a message.
_SHOWN = 200


def contradictions(values: Mapping[str, Any], written: Collection[str]) -> Iterator[str]:
    """A message for each contradiction. written: the settings that the user set; all others have their defaults."""
    yield from _of_the_template(values)
    if 0 < (values.get("max_seq_length") or 0) < SHORTEST_RECORD:  # 0 has a meaning only in `evaluate`
        yield f"--max_seq_length {values['max_seq_length']}: expected at least {SHORTEST_RECORD} tokens."
    yield from _of_data(values, written)
    if values.get("use_dora") and values.get("lora_experts"):
        yield "--use_dora and --lora_experts: PEFT has no DoRA for experts. Leave one of them out."
    yield from _of_the_start(values)
    yield from _of_the_trainer(values)


def _of_the_template(values: Mapping[str, Any]) -> Iterator[str]:
    text, day = values.get("chat_template_kwargs"), values.get("template_date")
    if text is not None:
        variables = _object_in(text)
        if variables is None:
            yield (
                f"--chat_template_kwargs {text[:_SHOWN]}: expected a JSON object, for example --chat_template_kwargs "
                "'{\"enable_thinking\": false}'."
            )
        elif not isinstance(variables.get("enable_thinking", True), bool):
            # In a template, the text "false" would count as true.
            yield f"--chat_template_kwargs {text[:_SHOWN]}: enable_thinking is true or false, without quotes."
    if day is not None:
        try:
            date.fromisoformat(day)
        except ValueError:
            yield f"--template_date {day}: expected a date, for example 2026-01-31."


def _object_in(text: str) -> dict[str, Any] | None:
    """The JSON object in a text; None if it is none, or has too many brackets."""
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _of_data(values: Mapping[str, Any], written: Collection[str]) -> Iterator[str]:
    def on(name: str) -> bool:
        return bool(values.get(name))

    overlength = values.get("overlength")
    if on("skip_overlength") and "overlength" in written and overlength != "skip":
        yield f"--skip_overlength and --overlength {overlength} contradict each other. Pass one of them."
    if on("eval_path") and on("eval_size"):
        yield "--eval_path and --eval_size each choose the records to evaluate on. Pass one of them."
    size = values.get("eval_size") or 0
    if size > 1 and not float(size).is_integer():
        yield f"--eval_size {size:g}: expected a share below 1, or a whole number of records."
    if not on("streaming"):
        return
    if values.get("max_steps", 1) <= 0:  # missing beside an invalid setting, which is reported
        yield "--streaming needs --max_steps: how many records there are is not known before they are read."
    is_sorted = values.get("train_sampling_strategy", "random") != "random"
    for name in ("eval_size", "mix", *(["train_sampling_strategy"] if is_sorted else [])):
        if on(name):
            yield f"--{name} chooses among all records, which --streaming never holds. Leave one of them out."
    if on("dataloader_num_workers"):
        yield (
            "--dataloader_num_workers and --streaming: every worker would read all the files. Leave one of them out; "
            "reading uses all processor cores anyway."
        )


def _of_the_start(values: Mapping[str, Any]) -> Iterator[str]:
    ways = [f"--{name}" for name in ("resume", "resume_from_checkpoint", "continue_training") if values.get(name)]
    if len(ways) > 1:
        yield f"{' and '.join(ways)} each name a checkpoint to resume from. Pass one of them."
    if values.get("continue_training") and not values.get("checkpoint"):
        yield "--continue_training needs --checkpoint with the folder to resume from. --resume finds the newest one."
    if values.get("checkpoint") and not values.get("continue_training"):
        yield "--checkpoint is only used with --continue_training. Add it, or use --resume_from_checkpoint."


def needs_evaluations(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings, as flags, that have no effect or end the run if nothing is evaluated."""
    if values.get("early_stopping_patience"):
        yield f"--early_stopping_patience {values['early_stopping_patience']}"
    if values.get("save_strategy") == "best":
        yield "--save_strategy best"
    if values.get("lr_scheduler_type") in FOLLOWS_THE_LOSS:
        yield f"--lr_scheduler_type {values['lr_scheduler_type']}"


def _of_the_trainer(values: Mapping[str, Any]) -> Iterator[str]:
    if values.get("max_steps") == 0:
        yield "--max_steps 0 trains nothing. Pass 1 or more, or leave it out: --num_train_epochs decides."
    if values.get("fp16") and values.get("bf16"):
        yield "--fp16 and --bf16 contradict each other. Pass one of them, or neither to use what suits the device."
    metric = values.get("metric_for_best_model")
    if metric is not None and metric.removeprefix("eval_") not in METRICS:
        yield f"--metric_for_best_model {metric!r}: expected one of {', '.join(METRICS)}."
    if values.get("eval_strategy") == "no":
        for setting in needs_evaluations(values):
            yield f"{setting} needs evaluations, and --eval_strategy no makes none. Leave one of them out."
    if values.get("parallelism_config") is not None:
        yield "--parallelism_config takes an object of accelerate's, which cannot be written as text. Leave it out."
    if values.get("debug"):
        yield "--debug cannot look into layers that are fused here. Leave it out."
