"""Disk space: checks before the first step whether the disk has room for a run's checkpoints."""

import shutil
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from atomtune.data.cache_key import tokenizer_text
from atomtune.errors import RunFailed
from atomtune.train.run_context import RunContext

#: Bytes of a checkpoint's files other than tensors and tokenizer, generously rounded.
_SMALL_FILES = 2**16
#: Print how much the checkpoints take if it is more than this share of the free space.
_WORTH_SAYING = 0.1


def check_space(run: RunContext, model: Any, tokenizer: Any) -> None:
    """Give a notice if the disk may be too small for the checkpoints. Raises RunFailed if not even one fits."""
    args, folder = run.args, Path(run.args.output_dir)
    weights = sum(w.numel() * w.element_size() for w in model.parameters() if w.requires_grad)
    states = 0 if args.save_only_model else 2 * weights  # AdamW's two moments
    adapter = weights + len(tokenizer_text(tokenizer)) + _SMALL_FILES
    checkpoint, free = adapter + states, shutil.disk_usage(folder).free
    checkpoints_at_once = (args.save_total_limit or 1) + 1
    needed = checkpoints_at_once * checkpoint + adapter  # one more exists while it is written
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
