"""Plan: the command, which estimates a run from the command line that the run would have."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table
from transformers import TrainingArguments

from atomtune.batch.cost import SAMPLED_BATCHES, LayoutTokens, batches_of, heaviest_of_the_run, sample_rows
from atomtune.choices import Layout
from atomtune.console import Console, as_command, print_json
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.example_table import as_examples
from atomtune.durations import rough_duration
from atomtune.errors import BadSettings
from atomtune.language import listed, translated
from atomtune.model.adapter import LoraSpec
from atomtune.model.base_shape import base_shape
from atomtune.model.load import device_in_use, dtype_name, load_tokenizer, quiet_libraries, resolve_dtype
from atomtune.model.memory import (
    USABLE,
    USABLE_ON_GPU,
    StepShape,
    free_bytes,
    held_bytes,
    input_bytes,
    layers_to_recompute,
    mapped_bytes,
    ways_to_save,
)
from atomtune.plan.epoch import Epoch, encoded, epoch_of
from atomtune.plan.estimate import (
    CUDA_CONTEXT,
    StepMemory,
    StepSpec,
    Work,
    fits_on_gpu,
    matmul_rate,
    seconds,
    step_memory,
)
from atomtune.plan.model_size import ModelSize, measure
from atomtune.settings.train_settings import PlanSettings, TrainSettings
from atomtune.train.arguments import shuffling_seed, trainer_arguments
from atomtune.train.defaults import DataSize, derive, records_to_hold_out
from atomtune.train.layout import SAVING, layout_problems, why_padded_by_settings
from atomtune.train.resume_command import without_start
from atomtune.train.run_length import run_length

#: Memory of common GPUs in GB, as they are sold: 2^30 bytes each.
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """The amount of computation of a run, estimated from its records.

    steps            optimizer steps
    tokens_computed  tokens in all batches of the run, in its layout
    tokens_padded    the same in the padded layout
    targets          learned tokens
    mean_context     number of tokens that a token sees, on average
    heaviest         tokens of the heaviest batch that the run is expected to have
    batches          number of batches that are computed
    lengths          number of different lengths among the batches
    """

    layout: Layout
    steps: int
    tokens_computed: int
    tokens_padded: int
    targets: int
    mean_context: float
    heaviest: int
    batches: int
    lengths: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The estimates for a run.

    device    of this process
    memories  device or card → memory of the heaviest step on it; this process's device comes first
    fits      device or card → whether its memory suffices; None if the system does not report it
    free      bytes of `device` that the run may take; None likewise
    shape     of a step, for what to change if it does not fit
    seconds   of the training loop on `device`
    rate      its matmul rate in `dtype`, in operations per second
    learning_rate  that the run would use
    held_out  number of records that --eval_size holds out
    """

    size: ModelSize
    run: RunSize
    device: str
    dtype: torch.dtype
    memories: dict[str, StepMemory]
    fits: dict[str, bool | None]
    free: int | None
    shape: StepShape
    seconds: float
    rate: float
    learning_rate: float
    held_out: int

    def to_json(self) -> dict[str, Any]:
        memory = self.memories[self.device]
        return {
            "peak_bytes": memory.peak,
            "parts": memory.parts,
            "activations_recomputed": memory.recomputed > 0,
            "share_of_layers_recomputed": round(memory.recomputed, 3),
            "fits": self.fits,
            "layout": self.run.layout,
            "steps": self.run.steps,
            "tokens_computed": self.run.tokens_computed,
            "tokens_padded": self.run.tokens_padded,
            "seconds": round(self.seconds, 1),
            "learning_rate": self.learning_rate,
            "records_held_out": self.held_out,
        }


def plan(settings: PlanSettings) -> int:
    """Read the records, count the model's weights without loading them, and print the estimates.

    Raises BadSettings, BadData or BadModel as the run would, as far as that is known without the weights.
    """
    if settings.train.data.streaming:
        raise BadSettings(
            [
                "plan reads and stores all records, which --streaming avoids. Leave --streaming out; if there are too "
                "many to store, also pass a file with a few thousand of them: --max_steps decides the length of the "
                "run."
            ]
        )
    quiet_libraries()
    console = Console(stderr=settings.json)
    forecast = forecast_of(settings.train, console)
    if settings.json:
        print_json(forecast.to_json())
    _say(forecast, console, quantized=settings.train.model.quantize is not None)
    if not settings.json:
        console.next_steps([as_command(["train", *without_start(settings.train.argv or ())])])
    return 0


def forecast_of(settings: TrainSettings, console: Console) -> Forecast:
    """Encode the records, measure the model and this device's matmul rate, and compute the estimates.

    Raises BadSettings, BadData or BadModel as the run would.
    """
    model = settings.model
    tokenizer = load_tokenizer(str(model.model_path), trust_remote_code=model.trust_remote_code)
    template = load_template(settings.data.template, tokenizer, **settings.data.template_options())
    settings, epoch = _as_it_would_run(settings, template, console)
    args = trainer_arguments(settings)
    lora = LoraSpec(**settings.lora.lora())
    measured = measure(str(model.model_path), lora, trust_remote_code=model.trust_remote_code)
    size = replace(measured, why_padded=why_padded_by_settings(args) or measured.why_padded)
    run = _run_size(settings, args, epoch, why_padded=size.why_padded)

    here = _Here.of(settings)
    device, memory = str(here.device), here.memory(settings, size, run)
    memories = {device: memory}
    fits = {device: None if here.free is None else memory.peak <= here.free}
    for gigabytes in CARDS:
        card = f"{gigabytes} GB GPU"
        memories[card] = _on_card(settings, size, run, gigabytes)
        fits[card] = fits_on_gpu(memories[card], gigabytes)

    rate = matmul_rate(here.device, here.dtype)
    work = Work(
        steps=run.steps,
        tokens=run.tokens_computed,
        targets=run.targets,
        mean_context=run.mean_context,
        dora=settings.lora.use_dora,
    )
    return Forecast(
        size=size,
        run=run,
        device=device,
        dtype=here.dtype,
        memories=memories,
        fits=fits,
        free=here.free,
        shape=_shape(settings, args, epoch, memory, on_gpu=here.device.type == "cuda"),
        seconds=seconds(size, work, recomputed=memory.recomputed, kind=here.device.type, rate=rate),
        rate=rate,
        learning_rate=float(args.learning_rate),
        held_out=epoch.held_out(settings.data.eval_size or 0),
    )


def _shape(
    settings: TrainSettings, args: TrainingArguments, epoch: Epoch, memory: StepMemory, *, on_gpu: bool
) -> StepShape:
    return StepShape(
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        max_seq_length=settings.data.max_tokens,
        longest_tokens=epoch.longest_tokens,
        checkpointing=memory.recomputed == 1,
        quantize=settings.model.quantize,
        on_gpu=on_gpu,
        peak=memory.peak,
    )


def _as_it_would_run(settings: TrainSettings, template: Template, console: Console) -> tuple[TrainSettings, Epoch]:
    """The settings with the values that the run would derive, and its encoded records."""
    model = settings.model
    use_cpu = bool(settings.trainer.get("use_cpu"))
    shape = base_shape(str(model.model_path), trust_remote_code=model.trust_remote_code, use_cpu=use_cpu)
    if settings.data.max_seq_length is None:
        settings = replace(settings, data=replace(settings.data, max_seq_length=shape.longest))
    args = trainer_arguments(settings)
    epoch = epoch_of(settings, template, console, seed=shuffling_seed(args))
    eval_size = records_to_hold_out(settings, epoch.records, derived_before={})
    held_out = epoch.held_out(eval_size)
    if settings.data.eval_path:
        (evaluation,) = encoded([settings.data.eval_path], settings, template, console)
        held_out = len(evaluation.examples)
    size = DataSize(
        records=epoch.learned(eval_size),
        held_out=held_out,
        eval_size=eval_size,
        longest_tokens=epoch.longest_tokens,
    )
    derived = derive(settings, args, size, shape)
    return settings.with_derived({**derived.values, "eval_size": eval_size}, derived.reasons), epoch


def _run_size(settings: TrainSettings, args: TrainingArguments, epoch: Epoch, *, why_padded: str | None) -> RunSize:
    """Estimate the computation from sampled batches, scaled to the number of records that the run sees.

    why_padded  the reason for padded rows, if there is one
    """
    per_batch = args.per_device_train_batch_size
    rows = sample_rows(len(epoch.rows), per_batch * SAMPLED_BATCHES, seed=args.seed)
    batches = batches_of(epoch.rows.select(rows), per_batch, as_examples)
    sampled = LayoutTokens.of(batches)
    layout = _layout(settings, sampled, why_padded)
    computed = sampled.of_layout(layout)
    examples = [example for batch in batches for example in batch]
    records = epoch.learned(settings.data.eval_size or 0)
    steps = run_length(records, args).steps
    per_step = per_batch * args.gradient_accumulation_steps * args.world_size
    # The last batch of an epoch may be smaller than the others; with --max_steps that is ignored.
    most = math.inf if args.max_steps > 0 else records * args.num_train_epochs
    seen = min(steps * per_step, most)
    share = seen / len(rows)  # factor from the sampled rows to the whole run
    batch_count = math.ceil(seen / per_batch)
    return RunSize(
        layout=layout,
        steps=steps,
        tokens_computed=round(computed * share),
        tokens_padded=round(sampled.padded * share),
        targets=round(epoch.target_tokens * seen / len(epoch.rows)),
        # With causal attention, a token sees half of its example on average.
        mean_context=sum(len(example.ids) for example in examples) / len(examples) / 2,
        heaviest=heaviest_of_the_run(sampled, layout, per_batch=per_batch, longest_tokens=epoch.longest_tokens),
        batches=batch_count,
        lengths=math.ceil(sampled.lengths[layout] / len(batches) * batch_count),
    )


def _layout(settings: TrainSettings, sampled: LayoutTokens, reason: str | None) -> Layout:
    """The layout of the run, provided that the trial at its start finds it exact. Raises BadSettings as the run would.

    reason  why the settings or the model's config require padded rows, or None
    """
    choice = settings.data.layout
    if problems := layout_problems(choice, reason):
        raise BadSettings(problems)
    if choice == "auto":
        return "padded" if reason else sampled.cheapest()
    return choice


@dataclass(frozen=True, kw_only=True)
class _Here:
    """The device of this process, the base's dtype on it, its free bytes (None if unknown), and those of libraries."""

    device: torch.device
    dtype: torch.dtype
    free: int | None
    libraries: int

    @classmethod
    def of(cls, settings: TrainSettings) -> "_Here":
        device = torch.device("cpu") if settings.trainer.get("use_cpu") else device_in_use()
        dtype = resolve_dtype(
            settings.model.dtype,
            device,
            fp16=bool(settings.trainer.get("fp16")),
            bf16=bool(settings.trainer.get("bf16")),
            notice=lambda _: None,
        )
        free, libraries = free_bytes(device), 0
        if device.type == "cpu":
            libraries = held_bytes() or 0
            free = None if free is None else free + libraries - mapped_bytes()
        return cls(device=device, dtype=dtype, free=free, libraries=libraries)

    def memory(self, settings: TrainSettings, size: ModelSize, run: RunSize) -> StepMemory:
        on_cpu = self.device.type == "cpu"
        step = StepSpec(
            tokens=run.heaviest,
            element_bytes=self.dtype.itemsize,
            quantize=settings.model.quantize,
            dropout=settings.lora.lora_dropout > 0,
            dora=settings.lora.use_dora,
            libraries=self.libraries,
            row_tokens=run.tokens_computed // run.batches,
            lengths=run.lengths if on_cpu else 0,
            attention_weights=on_cpu and run.layout != "padded",
        )
        return _kept_or_recomputed(settings, size, step, free=self.free, usable=USABLE if on_cpu else USABLE_ON_GPU)


def _on_card(settings: TrainSettings, size: ModelSize, run: RunSize, gigabytes: int) -> StepMemory:
    """The memory of the heaviest step on a GPU with this many GB, in bfloat16 unless --dtype is set."""
    dtype = torch.bfloat16 if settings.model.dtype == "auto" else getattr(torch, settings.model.dtype)
    step = StepSpec(
        tokens=run.heaviest,
        element_bytes=dtype.itemsize,
        quantize=settings.model.quantize,
        dropout=settings.lora.lora_dropout > 0,
        dora=settings.lora.use_dora,
        libraries=CUDA_CONTEXT,
    )
    return _kept_or_recomputed(settings, size, step, free=gigabytes * 2**30, usable=USABLE_ON_GPU)


def _kept_or_recomputed(
    settings: TrainSettings, size: ModelSize, step: StepSpec, *, free: int | None, usable: float
) -> StepMemory:
    """The memory of the step, with layers recomputed as `--gradient_checkpointing` decides once the model is loaded.

    free    bytes free before the model is loaded, or None if unknown
    usable  share of the memory left then that activations may take
    """
    choice = settings.run.gradient_checkpointing
    without = step_memory(size, step, recomputed=choice == "true")
    if choice != "auto":
        return without
    activations = without.parts["activations"]
    if free is None:
        return step_memory(size, step, recomputed=1.0)
    layers = layers_to_recompute(
        size.layers,
        kept=activations,
        inputs=input_bytes(size.config, tokens=step.tokens, element_bytes=step.element_bytes),
        room=usable * (free - without.loaded),
    )
    return step_memory(size, step, recomputed=layers / max(size.layers, 1))


def _say(forecast: Forecast, console: Console, *, quantized: bool) -> None:
    """Print the size of the run, its memory part by part, the devices that it fits on, and its time."""
    run, memory = forecast.run, forecast.memories[forecast.device]
    console.say(
        f"{forecast.size.weights:,} parameters, {forecast.size.trained:,} in the adapter.\n"
        f"{run.steps:,} steps; layout {run.layout}: tokens {run.tokens_padded:,} → {run.tokens_computed:,}, "
        f"{_gain(run)}."
    )
    if reason := forecast.size.why_padded:
        console.say(f"layout padded: one record per row, because {reason}.")
    parts = listed(f"{translated(name)} {decimal(part)}" for name, part in memory.parts.items())
    needs = decimal(memory.peak)
    console.say(f"Memory of a heavy step ({run.heaviest:,} tokens) on {forecast.device}: {needs} = {parts}.")
    console.print(_table_of_devices(forecast))
    if forecast.free is not None and not forecast.fits[forecast.device]:
        lines = [
            f"It does not fit on {forecast.device}, where {decimal(forecast.free)} are free. What to change, the least "
            "costly first:",
            *ways_to_save(forecast.shape),
        ]
        console.say("\n".join(lines))
    elif not quantized and not forecast.fits[f"{CARDS[-2]} GB GPU"]:
        console.say("--quantize nf4 keeps the base in a quarter of the memory.")
    trillions = forecast.rate / 1e12
    rate = f"{trillions:.3f}" if trillions < 1 else f"{trillions:,.0f}"
    console.say(
        f"\nTime: about {rough_duration(forecast.seconds)} on {forecast.device} (matrix products in "
        f"{dtype_name(forecast.dtype)}: {rate} TFLOP/s). Loading, evaluation and saving are "
        "extra.\nThese are estimates; docs/guide.md says how far they were off."
    )


def _gain(run: RunSize) -> str:
    """What the layout saves; it may also have a few more tokens than padded rows, as row lengths are rounded up."""
    gain = run.tokens_padded / run.tokens_computed
    return f"{gain:.1f}× less work than with padding" if gain >= SAVING else "about as much work as with padding"


def _table_of_devices(forecast: Forecast) -> Table:
    """This device, and the cards up to the first on which the run fits without recomputing; larger ones add nothing."""
    table = Table(*map(translated, ("device", "needs", "activations", "fits")), box=None)
    for name, memory in forecast.memories.items():
        fits = forecast.fits[name]
        answer = translated("yes" if fits else "no")
        if fits is None:
            answer = translated("unknown")
        table.add_row(translated(name), decimal(memory.peak), _activations(memory), answer)
        if fits and not memory.recomputed and name != forecast.device:
            break
    return table


def _activations(memory: StepMemory) -> str:
    if 0 < memory.recomputed < 1:
        share = f"{memory.recomputed:.0%}"
        return translated(f"{share} recomputed")
    return translated("recomputed" if memory.recomputed else "kept")
