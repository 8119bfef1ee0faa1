"""Disk space: whether the disk has room for a run's checkpoints, before the first step."""

import shutil
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from atomtune.data.cache import tokenizer_text
from atomtune.errors import RunFailed
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
