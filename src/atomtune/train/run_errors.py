"""Run errors: messages for errors that end a run: what happened, what is saved, what to do."""

import os
import shutil
import tempfile
from pathlib import Path

import datasets
from transformers import TrainingArguments

from atomtune.disk import disk_failed, disk_reason
from atomtune.errors import AtomtuneError, RunFailed, Stopped
from atomtune.model.failures import of_the_model
from atomtune.train.checkpoint.atomic import newest_undamaged
from atomtune.train.dataloader import lost_worker
from atomtune.train.ranks import lost_processes


def told_to_user(error: BaseException, args: TrainingArguments, *, again: str) -> BaseException:
    """Turn an error without a message for users into one that says what happened and what to do.

    again  the text of how_to_resume
    """
    if isinstance(error, AtomtuneError):
        return error
    folder = Path(args.output_dir)
    newest_whole = newest_undamaged(folder)
    if lost := lost_processes(error, args) or lost_worker(error, workers=args.dataloader_num_workers):
        if newest_whole is None:
            return RunFailed(
                "\n".join([lost, "There is no checkpoint yet, so nothing is kept.", _from_the_start(folder)])
            )
        return RunFailed(f"{lost}\nLast complete checkpoint: {newest_whole}. {again}")
    if isinstance(error, KeyboardInterrupt):
        signal_name = error.args[0] if error.args else "SIGINT"
        return _stopped_at_once(signal_name, newest_whole, folder, again, processes=args.world_size)
    if disk_failed(error):
        full = _full_folder(error, folder)
        reason = disk_reason(error, full)
        return RunFailed(
            f"The disk is full or failing: {full} could not be written ({reason}).\nLast complete checkpoint: "
            f"{newest_whole or 'none'}. Free some space (--save_total_limit keeps fewer checkpoints; HF_DATASETS_CACHE "
            "names another place for encoded records, TMPDIR for temporary files), then continue with --resume."
        )
    return of_the_model(error) or error


def _full_folder(error: BaseException, output_dir: Path) -> Path:
    """The folder that could not be written: the output folder, or one that is often on another disk.

    These are the cache of encoded records, whose library, Arrow, raises an OSError without a file name, and the folder
    for temporary files, which have no name. Checkpoints are written by torch and safetensors, which have errors of
    their own.
    """
    if not isinstance(error, OSError):
        return output_dir
    if error.filename is not None:
        return Path(os.fsdecode(error.filename)).parent
    places = [output_dir, Path(datasets.config.HF_DATASETS_CACHE)]
    if tempfile.tempdir is not None:  # None until the first temporary file
        places.append(Path(tempfile.tempdir))
    there = [path for path in places if path.is_dir()]
    return min(there, key=lambda path: shutil.disk_usage(path).free, default=output_dir)


def _stopped_at_once(
    signal_name: str, newest_whole: Path | None, folder: Path, again: str, *, processes: int
) -> Stopped:
    if newest_whole is None:
        lines = [
            f"{signal_name} received; stopped at once. There is no checkpoint yet, so nothing is kept.",
            _from_the_start(folder),
        ]
    else:
        lines = [f"{signal_name} received; stopped at once. The last complete checkpoint is {newest_whole}.", again]
    if signal_name == "SIGTERM" and processes > 1:  # this process cannot tell the two apart
        lines.append(
            "If nobody stopped the run, another of its processes has ended, and its output says why: torchrun then "
            "sends SIGTERM to the others."
        )
    return Stopped("\n".join(lines))


def _from_the_start(folder: Path) -> str:
    return f"The same command starts over (--output_dir {folder})."
