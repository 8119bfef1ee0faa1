"""Layout: chooses how a run's batches are laid out, by what is exact for the model and what saves most tokens."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

from transformers import TrainingArguments

from atomtune.batch.collate import Collator
from atomtune.batch.cost import SAMPLED_BATCHES, LayoutTokens, batches_of, heaviest_of_the_run
from atomtune.choices import Layout, LayoutChoice
from atomtune.data.example_table import as_examples
from atomtune.data.records import Example
from atomtune.errors import BadSettings
from atomtune.model.causal_lm import CausalLM
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.load import pad_id_of
from atomtune.model.memory import free_memory
from atomtune.model.mixer_kernels import kernels_of
from atomtune.train.dataset import Data
from atomtune.train.model import activation_memory, device_of, dtype_of, liger_circumstances
from atomtune.train.ranks import is_sharded
from atomtune.train.run_context import RunContext
from atomtune.verify import Check, say_comparison

#: A larger batch is suggested if it computes this many times fewer tokens.
_WORTH_SAYING = 1.2
#: A layout that saves less than this factor is reported as saving nothing.
SAVING = 1.05


def check_equal(run: RunContext, data: Data, *, pad_id: int) -> None:
    """--verify: compare this run's model, dtype, layout and records with plain transformers + PEFT."""
    settings, args = run.settings, run.args
    compared = Check(
        examples=_sampled_batches(data, per_batch=args.per_device_train_batch_size, seed=args.seed)[0],
        model=settings.model,
        lora=settings.lora,
        wanted="padded" if why_padded_by_settings(args) else settings.data.layout,
        kernels=liger_circumstances(settings.trainer, args),
        device=device_of(args),
        pad_id=pad_id,
        per_batch=args.per_device_train_batch_size,
        console=run.console,
    ).compare(dtype_of(run))
    free_memory()  # for the run's own model
    run.record.update(verified=compared.figures())
    say_comparison(compared, run.console)


def why_padded_by_settings(args: TrainingArguments) -> str | None:
    """Why a run's settings require one record per row, for any model; None if they do not."""
    if args.neftune_noise_alpha:
        # transformers divides the noise by the root of the tokens in a row. In rows of many records it would be a third
        # as large, and the records of a tree would share one noise on their common beginning instead of each having its
        # own.
        return "the noise of --neftune_noise_alpha is drawn for each record, by the length of its row"
    return None


def layout_problems(choice: LayoutChoice, reason: str | None) -> list[str]:
    """Why the layout in the settings cannot be used; empty if it can.

    reason  why rows must be padded; None if they need not be
    """
    if reason is None or choice not in ("tree", "packed"):
        return []
    return [f"--layout {choice} would not be exact for this run: {reason}.\nPass --layout padded."]


@dataclass(frozen=True)
class ChosenLayout:
    """A run's collator, and the number of tokens that one of its heaviest steps computes."""

    collator: Collator
    heaviest_tokens: int


def choose_layout(run: RunContext, model: CausalLM, tokenizer: Any, data: Data, *, longest_tokens: int) -> ChosenLayout:
    """Choose the run's collator and print the layout, the reason, and what it saves.

    longest_tokens  of the longest example
    Raises BadSettings if the settings name a layout that would not be exact.
    """
    per_batch = run.args.per_device_train_batch_size
    batches = _sampled_batches(data, per_batch=per_batch, seed=run.args.seed)
    tokens = LayoutTokens.of(batches)
    choice = run.settings.data.layout
    reason = "--layout padded" if choice == "padded" else why_padded_by_settings(run.args)
    reason = reason or why_padded(model, sharded=is_sharded(run.args))
    if problems := layout_problems(choice, reason):
        raise BadSettings(problems)
    layout: Layout
    if reason is not None:
        layout = "padded"
    elif choice == "auto":
        layout = tokens.cheapest()
    else:
        layout = choice
    run.console.say(_described(layout, reason, tokens, len(batches)))
    if reason is None and choice in ("auto", "tree"):
        _name_larger_batch(run, model, batches, layout, longest_tokens=longest_tokens)
    if kernels := kernels_of(model):
        run.console.say(kernels.described(device_of(run.args)))
    run.record.update(layout=layout)
    collator = collator_for(model, layout, pad_id=pad_id_of(tokenizer), as_examples=as_examples)
    heaviest = heaviest_of_the_run(tokens, layout, per_batch=per_batch, longest_tokens=longest_tokens)
    return ChosenLayout(collator, heaviest)


def _described(layout: Layout, reason: str | None, tokens: LayoutTokens, batches: int) -> str:
    """The layout, the reason, and what it saves in the sampled batches, as a line to print."""
    if layout == "padded":
        return f"layout padded: one record per row, because {reason}."
    if layout == "tree":
        why, computed = "records with a common prefix share it", tokens.tree
    else:
        why, computed = "records are laid end to end without padding", tokens.packed
    gain = tokens.padded / computed
    if gain < SAVING:  # one record per batch, or records of equal length
        return f"layout {layout}: {why}, as many tokens as padded rows have ({batches} batches tried)."
    return (
        f"layout {layout}: {why}; tokens {tokens.padded:,} → {computed:,}, {gain:.1f}× less work "
        f"({batches} batches tried)."
    )


def _name_larger_batch(
    run: RunContext, model: CausalLM, batches: list[list[Example]], layout: Layout, *, longest_tokens: int
) -> None:
    """Suggest a larger batch without accumulation if it makes the same updates from fewer tokens and fits in memory.

    Records share their beginnings only within a batch; accumulating small batches computes them again in each.
    """
    per_batch, accumulated = run.args.per_device_train_batch_size, run.args.gradient_accumulation_steps
    firsts = range(0, len(batches) - accumulated + 1, accumulated)
    if accumulated == 1 or not firsts:
        return
    apart = LayoutTokens.of(batches[: len(firsts) * accumulated])
    joined = LayoutTokens.of(list(chain.from_iterable(batches[first : first + accumulated])) for first in firsts)
    gain = apart.of_layout(layout) / joined.tree
    heaviest = heaviest_of_the_run(joined, "tree", per_batch=per_batch * accumulated, longest_tokens=longest_tokens)
    memory = activation_memory(run, model, layout="tree", tokens=heaviest)
    if gain >= _WORTH_SAYING and memory.fits:
        run.console.notice(
            f"--per_device_train_batch_size {per_batch * accumulated} --gradient_accumulation_steps 1 makes the same "
            f"updates from {gain:.1f}× fewer tokens: records share their beginnings within a batch. It fits in memory: "
            f"{memory}."
        )


def _sampled_batches(data: Data, *, per_batch: int, seed: int) -> list[list[Example]]:
    """A sample of batches as the run may draw them."""
    return batches_of(data.some(per_batch * SAMPLED_BATCHES, seed=seed), per_batch, as_examples)
