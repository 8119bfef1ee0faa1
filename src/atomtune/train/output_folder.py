"""Output folder: its disk has room for the checkpoints; an error names it, and how the run goes on."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from rich.filesize import decimal
from transformers import TrainingArguments

from atomtune.console import as_command
from atomtune.data.cache import tokenizer_text
from atomtune.disk import disk_failed
from atomtune.errors import AtomtuneError, RunFailed, Stopped
from atomtune.model.failures import of_the_model
from atomtune.settings.fields import TrainSettings, is_secret
from atomtune.train.checkpoint.atomic import checkpoints, damage
from atomtune.train.dataloader import lost_worker
from atomtune.train.ranks import lost_processes
from atomtune.train.run_context import RunContext

#: A little more than what a checkpoint holds beside tensors and tokenizer, in bytes.
_SMALL_FILES = 2**16
#: What the checkpoints take is said where it is so large a share of the disk's free space.
_WORTH_SAYING = 0.1


def check_space(run: RunContext, model: Any, tokenizer: Any) -> None:
    """Say what the checkpoints will take where the disk has little left; raise RunFailed when not even one fits."""
    args, folder = run.args, Path(run.args.output_dir)
    weights = sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad)
    states = 0 if args.save_only_model else 2 * weights  # AdamW's two moments
    adapter = weights + len(tokenizer_text(tokenizer)) + _SMALL_FILES
    checkpoint, free = adapter + states, shutil.disk_usage(folder).free
    checkpoints_at_once = (args.save_total_limit or 1) + 1
    needed = checkpoints_at_once * checkpoint + adapter  # one more while it is written, and the adapter
    figures = (
        f"a checkpoint takes about {decimal(checkpoint)}; {args.save_total_limit or 'all'} are kept; "
        f"{decimal(free)} are free in {folder}"
    )
    if args.save_strategy != "no" and checkpoint + adapter > free:
        raise RunFailed(f"The disk is full: {figures}. Free some space, or pass another --output_dir.")
    if needed > free:
        run.console.notice(f"the disk may be too small: {figures}. --save_total_limit 1 keeps fewer.")
    elif needed > _WORTH_SAYING * free:
        run.console.say(f"{figures[0].upper()}{figures[1:]}.")


def goes_on(run: RunContext) -> str:
    """How a user goes on, with the command on a line of its own where it is known whole."""
    settings, folder = run.settings, run.args.output_dir
    if settings.argv is None:
        return f"The same call with resume=True continues from there (output_dir={folder!r})."
    if run.args.world_size > 1:  # a launcher's own words stand in front of the command
        return f"The same command with --resume{_in_place_of(settings)} continues from there (--output_dir {folder})."
    words = [word for word in without_start(settings.argv) if word != "--resume"]
    if "output_dir" not in settings.origins:
        words += ["--output_dir", folder]
    return f"To continue from there:\n  {as_command(['train', *words, '--resume'])}"


def _in_place_of(settings: TrainSettings) -> str:
    """--resume does not stand beside what began the run from another place."""
    if settings.run.continue_training:
        return " in place of --continue_training --checkpoint"
    return " in place of --resume_from_checkpoint" if settings.run.resume_from_checkpoint else ""


def without_start(argv: Sequence[str]) -> Iterator[str]:
    """The words of a command without the flags that began the run from another place, and without secrets."""
    is_value_left_out = False
    for word in argv:
        flag, equals, _ = word.partition("=")
        name = flag.replace("-", "_").lstrip("_")
        if word.startswith("--"):
            is_left_out = name in ("continue_training", "checkpoint", "resume_from_checkpoint") or is_secret(name)
            is_value_left_out = is_left_out and not equals
        else:
            is_left_out, is_value_left_out = is_value_left_out, False  # one word: the next may be run.yaml
        if not is_left_out:
            yield word


def explained(error: BaseException, args: TrainingArguments, *, again: str) -> BaseException:
    """An error that nobody below has put into words, as one that tells the user what happened and what to do.

    again  goes_on
    """
    if isinstance(error, AtomtuneError):
        return error
    folder = Path(args.output_dir)
    newest_whole = next((path for path in checkpoints(folder) if not damage(path)), None)
    if lost := lost_processes(error, args) or lost_worker(error, workers=args.dataloader_num_workers):
        return RunFailed(f"{lost}\nLast complete checkpoint: {newest_whole or 'none'}. {again}")
    if isinstance(error, KeyboardInterrupt):
        signal_name = error.args[0] if error.args else "SIGINT"
        return _stopped_at_once(signal_name, newest_whole, folder, again)
    if disk_failed(error):
        cache = Path(datasets.config.HF_DATASETS_CACHE)  # of the encoded records; often on another disk
        there = [path for path in (folder, cache) if path.is_dir()]
        full = min(there, key=lambda path: shutil.disk_usage(path).free, default=folder)
        return RunFailed(
            f"The disk is full or failing: {full} could not be written ({error}).\nLast complete checkpoint: "
            f"{newest_whole or 'none'}. Free some space (--save_total_limit keeps fewer checkpoints; HF_DATASETS_CACHE "
            "names another place for encoded records), then continue with --resume."
        )
    return of_the_model(error) or error


def _stopped_at_once(signal_name: str, newest_whole: Path | None, folder: Path, again: str) -> Stopped:
    if newest_whole is None:
        return Stopped(
            f"{signal_name} received; stopped at once. There is no checkpoint yet, so nothing is kept.\nThe same "
            f"command starts over (--output_dir {folder})."
        )
    return Stopped(f"{signal_name} received; stopped at once. The last complete checkpoint is {newest_whole}.\n{again}")
