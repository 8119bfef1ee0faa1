"""Merge: base + adapter as one plain model folder, and a check that the written model is the tuned one.

The check has three parts. Weights: every adapted number in the written files is base + adapter, rounded once; every
other tensor equals the base's bit for bit, or the adapter's if the adapter stores it in full (merged_weights.py).
Prompts: the written folder renders them to the same ids. Answers: the written model's next-token distributions differ
from the adapter's by rounding only (merged_answers.py).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.filesize import decimal

from atomtune.choices import MODEL_CONFIG, Quantize
from atomtune.console import Console, as_command
from atomtune.data.encoding.chat_template import Template
from atomtune.errors import BadModel, BadSettings, CheckFailed, RunFailed, listing
from atomtune.export.carried_tensors import carry_over, changed, keep_unrounded
from atomtune.export.merged_answers import PROBES, compare_answers, refuse_other_answers, refuse_other_prompts
from atomtune.export.merged_weights import Weights, compare_weights, merge_weights, refuse_other_weights
from atomtune.export.output_folder import NOT_KEPT, filling
from atomtune.export.weighted import Weighted, load_weighted, weighted
from atomtune.folders import is_free
from atomtune.language import translated
from atomtune.model.adapter import refuse_damaged, why_not_merged
from atomtune.model.adapter_folder import AdapterMetadata, template_of
from atomtune.model.agreement import Measure
from atomtune.model.base_as_trained import adapter_and_base
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import folder_of, is_at_hand, refuse_other_base, weight_files
from atomtune.model.generate import ready_to_answer
from atomtune.model.load import (
    BaseSpec,
    dtype_name,
    is_stored_quantized,
    load_base,
    load_dequantized,
    quiet_libraries,
    stored_dtype,
)
from atomtune.settings.command_settings import MergeSettings, base_of_adapter
from atomtune.settings.spelled import base_words

CPU = torch.device("cpu")
#: No program loads a folder as a model without this file.
LAST_WRITTEN = MODEL_CONFIG
#: Least size of the merged weights, as a share of the base's files, which may have a tied matrix twice.
_LEAST_SHARE_OF_FILES = 0.6
#: If rounding to the dtype keeps a smaller share of the adapter's change, the user gets a notice.
LEAST_SHARE_KEPT = 0.9
#: Of one written file. `keep_unrounded` needs room for a second copy of one file at a time.
_SHARD = "5GB"


def merge(settings: MergeSettings) -> int:
    """Run `atomtune merge`. Raises CheckFailed if the written model is not base + adapter, and leaves no files then."""
    out = Path(settings.output_dir)
    if not is_free(out):
        raise BadSettings([f"--output_dir {out} is not an empty folder. Pass a new one."])
    quiet_libraries()
    console = Console()
    with filling(out, last=LAST_WRITTEN) as folder:
        write_merged(settings, folder, console)
    console.say(f"The merged model is in {out}; transformers, vLLM and others load it as it is.")
    console.next_steps(_next_commands(settings))
    return 0


def _next_commands(settings: MergeSettings) -> list[str]:
    """Commands to chat with the merged model and, if it is one adapter as trained, to certify a server with it."""
    commands = [["chat", "--adapter_path", settings.output_dir]]
    if len(settings.adapter_paths) == 1 and settings.weights in ([], [1.0]):
        adapter = ["--adapter_path", settings.adapter_paths[0], *base_words(settings)]
        commands.append(["certify", *adapter, "--served", settings.output_dir])
    return [as_command(words) for words in commands]


def write_merged(
    settings: MergeSettings, out: Path, console: Console, *, unrounded: tuple[str, str] = ("--dtype", "float32")
) -> None:
    """Write the merged model into a folder and check it. Raises CheckFailed if it is not base + adapter.

    out        a temporary folder, not --output_dir: nothing may appear there before it is checked
    unrounded  the flag with which this command rounds nothing and its value, for a notice
    """
    trained = _trained_model(settings, console)
    _refuse_small_disk(trained, out, settings.output_dir)

    console.say(f"loading {trained.spec.path} in {dtype_name(trained.spec.dtype)} …")
    was_at_hand = is_at_hand(trained.spec.path)
    base = load_dequantized(trained.spec, trained_in=trained.metadata.dtype)
    if not was_at_hand:
        for fingerprint in trained.bases:
            refuse_other_base(trained.spec.path, fingerprint, anyway=settings.other_base, notice=console.notice)
    if len(trained.adapters) > 1:
        console.say(translated(f"merging {' + '.join(map(str, trained.adapters))} …"))
    else:
        console.say(translated("merging …"))
    copied = _save_merged(base, trained, out, console)
    del base  # the check loads two models, and memory may not suffice for three

    console.say("checking the written folder …")
    weights, measures = _check_written(trained, out)
    _refuse_changed(trained, out, copied)
    _say_checked(weights, measures, trained.spec.dtype, console, unrounded=unrounded)
    if copied.carried:
        console.say(
            f"copied from the base unchanged: {len(copied.carried):,} tensors that transformers does not load "
            f"({', '.join(_first_parts(copied.carried))})."
        )
    if copied.unrounded:
        console.say(
            f"not rounded, because servers may use the unrounded values: {len(copied.unrounded):,} tensors that the "
            "base's files hold in more bits than the rest."
        )


class _Copied(NamedTuple):
    """Names of the tensors that were copied unchanged from the base's files into the merged folder.

    carried    tensors that transformers does not load
    unrounded  tensors that transformers would have rounded while loading
    """

    carried: tuple[str, ...] = ()
    unrounded: tuple[str, ...] = ()
    prefix: str = ""


@dataclass(frozen=True)
class _TrainedModel:
    """What is merged: the adapters, their base, and the template of their prompts.

    bases             for each adapter, the fingerprint of the base that it was trained on; "" if unknown
    stored_quantized  whether the base's own files are quantized
    """

    adapters: tuple[Weighted, ...]
    spec: BaseSpec
    template: Template
    metadata: AdapterMetadata
    bases: tuple[str, ...]
    stored_quantized: bool


def _trained_model(settings: MergeSettings, console: Console) -> _TrainedModel:
    """Read what is to be merged. Raises BadModel or BadSettings if an adapter is damaged or does not fit the rest."""
    adapters = weighted(settings.adapter_paths, settings.weights)
    first, *others = (adapter.folder for adapter in adapters)
    trust = settings.trust_remote_code
    template, metadata, base_path = adapter_and_base(first, **base_of_adapter(settings), notice=console.notice)
    bases = [metadata.base]
    for folder in others:
        refuse_damaged(folder)
        another_template, another = template_of(
            folder, model_path=settings.model_path, trust_remote_code=trust, notice=console.notice
        )
        refuse_other_base(base_path, another.base, anyway=settings.other_base, notice=console.notice)
        bases.append(another.base)
        if (another_template.source, another.instruction) != (template.source, metadata.instruction):
            console.notice(
                f"{folder} was trained with a different chat template or shared instruction; the merged model uses "
                f"those of {first}."
            )
    quantize = None if settings.stored_base else metadata.quantize
    dtype = stored_dtype(base_path, trust_remote_code=trust)
    if settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    stored_quantized = is_stored_quantized(base_path, trust_remote_code=trust)
    _say_quantized(quantize, metadata, stored_quantized=stored_quantized, console=console)
    spec = BaseSpec(path=base_path, dtype=dtype, device=CPU, quantize=quantize, trust_remote_code=trust)
    metadata = replace(metadata, quantize=quantize)
    return _TrainedModel(adapters, spec, template, metadata, tuple(bases), stored_quantized)


def _refuse_small_disk(trained: _TrainedModel, out: Path, output_dir: str) -> None:
    """Raise RunFailed if the disk has no room for the merged weights, before a large base is loaded for minutes."""
    folder = folder_of(trained.spec.path)
    if folder is None or trained.stored_quantized:
        return
    stored = stored_dtype(trained.spec.path, trust_remote_code=trained.spec.trust_remote_code)
    bytes_stored = sum(file.stat().st_size for file in weight_files(folder))
    bytes_needed = bytes_stored * trained.spec.dtype.itemsize // stored.itemsize
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    bytes_free = shutil.disk_usage(place).free
    if bytes_free < _LEAST_SHARE_OF_FILES * bytes_needed:
        raise RunFailed(
            f"--output_dir {output_dir}: the merged model takes about {decimal(bytes_needed)}, and the disk there "
            f"has {decimal(bytes_free)} free.\nFree some space there, or pass an --output_dir on another disk."
        )


def _say_quantized(
    quantize: Quantize | None, metadata: AdapterMetadata, *, stored_quantized: bool, console: Console
) -> None:
    """Tell the user which weights the merged model gets if training or the base's files were quantized."""
    if quantize:
        console.notice(
            f"the adapter was trained on the base in {quantize}, so it is merged into the weights used in training: "
            "quantized and dequantized again. --stored_base merges into the weights as they are stored."
        )
    elif metadata.quantize:
        console.notice(
            f"the adapter was trained on the base in {metadata.quantize} and is merged into the weights as they are "
            "stored (--stored_base): the merged model is not quite the one that was trained."
        )
    if stored_quantized:
        console.notice("the base's files are quantized; the merged model has dequantized weights, and is larger.")


def _save_merged(base: CausalLM, trained: _TrainedModel, out: Path, console: Console) -> _Copied:
    """Write the merged model with its tokenizer, template and metadata. Changes the base's matrices in memory."""
    adapted = load_weighted(base, trained.adapters)
    if why := why_not_merged(adapted):
        raise BadModel(
            f"This adapter cannot be merged:\n{why}\nchat, serve and evaluate load it together with its base."
        )
    merged = merge_weights(adapted)
    ready_to_answer(merged, trained.template, notice=console.notice)
    merged.save_pretrained(out, max_shard_size=_SHARD)
    tokenizer = trained.template.tokenizer
    tokenizer.chat_template = trained.template.source  # another tool may have saved the adapter without it
    tokenizer.save_pretrained(out)
    trained.metadata.save(out)
    folder = folder_of(trained.spec.path)
    if folder is None or trained.stored_quantized:  # tensors that are not loaded belong to the quantization
        return _Copied()
    prefix = str(merged.base_model_prefix)
    unrounded = keep_unrounded(folder, out, prefix=prefix)
    carried = carry_over(folder, out, loaded=merged.state_dict().keys(), prefix=prefix)
    return _Copied(carried, unrounded, prefix)


def _first_parts(names: Sequence[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})


def _check_written(trained: _TrainedModel, out: Path) -> tuple[Weights, Sequence[Measure]]:
    """Read the written folder back and compare it with base + adapter. Raises CheckFailed if they differ."""
    base = load_dequantized(trained.spec, trained_in=trained.metadata.dtype)
    adapted = load_weighted(base, trained.adapters)
    written = load_base(replace(trained.spec, path=str(out), quantize=None)).eval()
    written_template, _ = template_of(out, trust_remote_code=trained.spec.trust_remote_code)

    weights = compare_weights(adapted, written)
    refuse_other_weights(weights)
    refuse_other_prompts(trained.template, written_template)
    measures = compare_answers(adapted, written, trained.template, dtype=trained.spec.dtype)
    refuse_other_answers(measures)
    return weights, measures


def _say_checked(
    weights: Weights, measures: Sequence[Measure], dtype: torch.dtype, console: Console, *, unrounded: tuple[str, str]
) -> None:
    if weights.share_kept < LEAST_SHARE_KEPT:
        console.notice(
            f"{dtype_name(dtype)} is too coarse for this adapter: rounding loses {1 - weights.share_kept:.0%} of its "
            f"change. {' '.join(unrounded)} keeps it."
        )
    if weights.whole:
        console.say(f"{weights.whole:,} tensors are stored in full in the adapter, in place of the base's.")
    answers = measures[0]  # divergence of the next token, mean
    console.say(
        f"Checked: {weights.adapted:,} adapted matrices are base + adapter, rounded once to {dtype_name(dtype)}, and "
        f"{weights.same - weights.whole:,} other tensors are the base's.\n"
        f"Answers to {len(PROBES)} prompts differ from the adapter's by {answers.difference:.1e} nats per token (KL); "
        f"two plain runs differ by {answers.noise:.1e}."
    )


def _refuse_changed(trained: _TrainedModel, out: Path, copied: _Copied) -> None:
    folder = folder_of(trained.spec.path)
    names = changed(folder, out, (*copied.carried, *copied.unrounded), prefix=copied.prefix) if folder else []
    if names:
        raise CheckFailed(f"These merged tensors are not the base's:\n{listing(names)}\n{NOT_KEPT}")
