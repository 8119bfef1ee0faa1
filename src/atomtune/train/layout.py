"""Layout: how this run's batches are laid out, chosen by what is exact for the model and what the data saves.

Before: prepare.py has read the data and loaded the model.  After: trainer.py.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from atomtune.batch.attention_plan import padded_length
from atomtune.batch.collate import Collator, Layout
from atomtune.batch.row import padded_tokens
from atomtune.batch.tree import graft
from atomtune.data.records import Example
from atomtune.data.cache import as_examples
from atomtune.errors import BadSettings
from atomtune.model.layout_support import why_padded, windows_of
from atomtune.model.load import device_in_use, pad_id_of
from atomtune.train.dataset import Data
from atomtune.train.run_context import Job
from atomtune.train.model import dtype_of
from atomtune.verify import compare, say

#: Batches drawn to see what a layout saves.
_TRIED = 32
#: A tree that saves less than this share of the packed tokens is not worth its planning.
_WORTH = 0.02


def check_equal(job: Job, data: Data, *, pad_id: int) -> None:
    """What `--verify` asks for: this run's model, dtype, layout and records against plain transformers + PEFT."""
    settings, args = job.settings, job.args
    device = torch.device("cpu") if args.use_cpu else device_in_use()
    compared = compare(
        _draw(data, per_batch=args.per_device_train_batch_size, seed=args.seed)[0],
        model=settings.model,
        lora=settings.lora,
        asked=settings.data.layout,
        dtype=dtype_of(job, device),
        device=device,
        pad_id=pad_id,
        per_batch=args.per_device_train_batch_size,
        voice=job.voice,
    )
    job.record.update(verified=compared.figures())
    say(compared, job.voice)


def choose_layout(job: Job, model: nn.Module, tokenizer: Any, data: Data) -> Collator:
    """The collator of the run; says which layout, why, and what it saves. Raises BadSettings if it were not exact."""
    asked = job.settings.data.layout
    drawn = _draw(data, per_batch=job.args.per_device_train_batch_size, seed=job.args.seed)
    padded, packed, tree = (sum(each) for each in zip(*map(_tokens, drawn), strict=True))
    reason = why_padded(model) if asked != "padded" else "it was asked for"
    if asked in ("tree", "packed") and reason is not None:
        raise BadSettings([f"--layout {asked} would not be exact for this model: {reason}.\nPass --layout padded."])
    chosen: Layout
    if reason is not None:
        chosen = "padded"
    elif asked == "auto":
        chosen = "tree" if tree < packed * (1 - _WORTH) else "packed"
    else:
        chosen = asked
    computed = {"padded": padded, "packed": packed, "tree": tree}[chosen]
    why = {
        "tree": "records that begin alike share that beginning",
        "packed": "records stand end to end without padding",
        "padded": f"one record a row, because {reason}",
    }[chosen]
    saved = f"; tokens {padded:,} → {computed:,}, {padded / computed:.1f}× less work ({len(drawn)} batches tried)"
    job.voice.say(f"layout {chosen}: {why}{saved if chosen != 'padded' else ''}.")
    job.record.update(layout=chosen)
    return Collator(
        layout=chosen,
        pad_id=pad_id_of(tokenizer),
        as_examples=as_examples,
        windows=windows_of(model) if chosen != "padded" else (None,),
    )


def _draw(data: Data, *, per_batch: int, seed: int) -> list[list[Example]]:
    """Batches as the run may draw them."""
    records = [as_examples(row) for row in data.some(per_batch * _TRIED, seed=seed)]
    return [list(chain(*records[i : i + per_batch])) for i in range(0, len(records), per_batch)]


def _tokens(examples: Sequence[Example]) -> tuple[int, int, int]:
    """What the padded, packed and tree layouts compute for one batch."""
    return (
        padded_tokens(examples),
        padded_length(sum(len(example.ids) for example in examples)),
        padded_length(len(graft(examples))),
    )
