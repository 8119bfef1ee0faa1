"""Folder: the output folder, held by one run, looked at for space, and named in what a failure is answered with."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout
from rich.filesize import decimal

from atomtune.data.cache import tokenizer_text
from atomtune.disk import disk_failed
from atomtune.errors import AtomtuneError, BadSettings, RunFailed, Stopped
from atomtune.model.memory import is_out_of_memory
from atomtune.settings.fields import TrainSettings
from atomtune.train.checkpoint.atomic import checkpoints, damage
from atomtune.train.run_context import Job


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The output folder, made if need be, held against every other run. Raises BadSettings when one holds it."""
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSettings([f"--output_dir {folder} cannot be made: {error.strerror}."]) from None
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise BadSettings([f"{folder}: another run is writing here now. Pass another --output_dir."]) from None
    except OSError as error:
        raise BadSettings([f"--output_dir {folder} cannot be written: {error.strerror}."]) from None
    try:
        yield
    finally:
        lock.release()
        if made and not any(path.name != ".lock" for path in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)  # refused before it wrote anything


def check_space(job: Job, model: Any, tokenizer: Any) -> None:
    """Say what the checkpoints will take; raise RunFailed when not even one fits."""
    args, folder = job.args, Path(job.args.output_dir)
    weights = sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad)
    states = 0 if args.save_only_model else 2 * weights  # AdamW's two moments
    beside = len(tokenizer_text(tokenizer)) + 2**16
    one, final, free = weights + states + beside, weights + beside, shutil.disk_usage(folder).free
    kept = args.save_total_limit or 1
    needed = (kept + 1) * one + final  # one more while it is written, and the adapter
    said = (
        f"a checkpoint takes about {decimal(one)}; {args.save_total_limit or 'all'} are kept; "
        f"{decimal(free)} are free in {folder}"
    )
    if args.save_strategy != "no" and one + final > free:
        raise RunFailed(f"The disk is full: {said}. Free some space, or pass another --output_dir.")
    if needed > free:
        job.console.notice(f"the disk may not suffice: {said}. --save_total_limit 1 keeps fewer.")
    else:
        job.console.say(f"{said[0].upper()}{said[1:]}.")


def same_command(settings: TrainSettings) -> str:
    """How a user goes on: --resume does not stand beside what began the run from another place."""
    ways = {"--continue_training --checkpoint": settings.run.continue_training}
    ways["--resume_from_checkpoint"] = bool(settings.run.resume_from_checkpoint)
    instead = next((f" in place of {way}" for way, given in ways.items() if given), "")
    return f"The same command with --resume{instead}"


def answer(error: BaseException, folder: Path, *, again: str) -> BaseException:
    """What the user is told about an error that nobody below has put into words.

    again  same_command
    """
    if isinstance(error, AtomtuneError):
        return error
    kept = next((path for path in checkpoints(folder) if not damage(path)), None)
    if isinstance(error, KeyboardInterrupt):
        name = error.args[0] if error.args else "SIGINT"
        where = f"the last whole checkpoint is {kept}" if kept else "there is no checkpoint yet, nothing is kept"
        return Stopped(
            f"{name} received; stopped at once, {where}.\n"
            f"{again if kept else 'The same command'} {'goes on from there' if kept else 'begins again'} "
            f"(--output_dir {folder})."
        )
    if disk_failed(error):
        store = Path(datasets.config.HF_DATASETS_CACHE)  # of the encoded records; often on another disk
        full = min((path for path in (folder, store) if path.is_dir()), key=lambda path: shutil.disk_usage(path).free)
        return RunFailed(
            f"The disk is full, or it fails: {full} could not be written ({error}).\nLast whole checkpoint: "
            f"{kept or 'none'}. Free some space (--save_total_limit keeps fewer checkpoints; HF_DATASETS_CACHE names "
            "another place for encoded records), then go on with --resume."
        )
    if is_out_of_memory(error):
        return RunFailed(
            "Out of memory while the model was loaded or prepared. What helps, first things first: --quantize nf4 (a "
            "quarter of the memory), --dtype bfloat16, --device_map auto, a smaller model."
        )
    return error
