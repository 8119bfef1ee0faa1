"""Layout: how this run's batches are laid out, chosen by what is exact for the model and what the data saves.

Before: prepare.py has read the data and loaded the model.  After: trainer.py.
"""

from typing import Any

import torch
from torch import nn

from atomtune.batch.collate import Collator
from atomtune.batch.cost import SAMPLED_BATCHES, LayoutTokens, batches_of
from atomtune.choices import Layout
from atomtune.data.cache import as_examples
from atomtune.data.records import Example
from atomtune.errors import BadSettings
from atomtune.model.layout_support import cut_of, why_padded, windows_of
from atomtune.model.load import device_in_use, pad_id_of
from atomtune.train.dataset import Data
from atomtune.train.model import dtype_of
from atomtune.train.run_context import Job
from atomtune.verify import compare, say

#: A tree that saves less than this share of the packed tokens is not worth its planning.
_WORTH = 0.02


def check_equal(job: Job, data: Data, *, pad_id: int) -> None:
    """What `--verify` asks for: this run's model, dtype, layout and records against plain transformers + PEFT."""
    settings, args = job.settings, job.args
    device = torch.device("cpu") if args.use_cpu else device_in_use()
    compared = compare(
        _sampled_batches(data, per_batch=args.per_device_train_batch_size, seed=args.seed)[0],
        model=settings.model,
        lora=settings.lora,
        asked=settings.data.layout,
        dtype=dtype_of(job, device),
        device=device,
        pad_id=pad_id,
        per_batch=args.per_device_train_batch_size,
        console=job.console,
    )
    job.record.update(verified=compared.figures())
    say(compared, job.console)


def choose_layout(job: Job, model: nn.Module, tokenizer: Any, data: Data) -> Collator:
    """The collator of the run; says which layout, why, and what it saves. Raises BadSettings if it were not exact."""
    asked = job.settings.data.layout
    batches = _sampled_batches(data, per_batch=job.args.per_device_train_batch_size, seed=job.args.seed)
    tokens = LayoutTokens.of(batches)
    reason = why_padded(model) if asked != "padded" else "it was asked for"
    if asked in ("tree", "packed") and reason is not None:
        raise BadSettings([f"--layout {asked} would not be exact for this model: {reason}.\nPass --layout padded."])
    chosen: Layout
    if reason is not None:
        chosen = "padded"
    elif asked == "auto":
        chosen = "tree" if tokens.tree < tokens.packed * (1 - _WORTH) else "packed"
    else:
        chosen = asked
    computed = getattr(tokens, chosen)
    why = {
        "tree": "records that begin alike share that beginning",
        "packed": "records stand end to end without padding",
        "padded": f"one record a row, because {reason}",
    }[chosen]
    saved = (
        f"; tokens {tokens.padded:,} → {computed:,}, {tokens.padded / computed:.1f}× less work "
        f"({len(batches)} batches tried)"
    )
    job.console.say(f"layout {chosen}: {why}{saved if chosen != 'padded' else ''}.")
    job.record.update(layout=chosen)
    return Collator(
        layout=chosen,
        pad_id=pad_id_of(tokenizer),
        as_examples=as_examples,
        windows=windows_of(model) if chosen != "padded" else (None,),
        cut=cut_of(model),
    )


def _sampled_batches(data: Data, *, per_batch: int, seed: int) -> list[list[Example]]:
    """Batches as the run may draw them."""
    return batches_of(data.some(per_batch * SAMPLED_BATCHES, seed=seed), per_batch, as_examples)
