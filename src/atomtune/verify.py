"""Verify: compares the fast path with plain transformers + PEFT, on the user's own model and records.

The plain side is simpler than what it checks and shares only the weights with it: one record at a time, all its
logits, PEFT's own layers, the library's attention. It runs twice, since two correct runs differ by rounding. The fast
path's difference is judged by that noise (model/agreement.py). In 16 bits a record can be so sensitive that two plain
runs agree by chance and are both far from the exact gradient. So what does not hold in 16 bits is computed in float32
too, where rounding is small, and the distance of the fast path from that is judged by the distance of a plain run.
Not compared are dropout, the Trainer's autocast (--fp16, --bf16), steps replayed as CUDA graphs (a run compares each
recording, model/step_graphs.py), and Liger's kernels on sharded weights, where the Trainer applies them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table

from atomtune.batch.collate import Collator
from atomtune.batch.cost import sample_rows
from atomtune.batch.row import padded_tokens
from atomtune.batch.targets import TargetPlaces
from atomtune.choices import USUAL_BATCH, Layout
from atomtune.console import Console, as_command
from atomtune.data.cache import EncodedData, concatenate, examples_of
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.chat_template import Template
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.example_table import as_examples
from atomtune.data.ledger import Ledger, about_broken, refuse_unusable
from atomtune.data.reading.sources import distinct_names
from atomtune.data.records import Example
from atomtune.durations import rough_duration
from atomtune.errors import BadSettings, CheckFailed
from atomtune.language import translated
from atomtune.model import liger
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.agreement import (
    TIMES_NOISE,
    Measure,
    another_plain_way,
    gradient_measures,
    log_probability_measures,
    worst_gradient,
)
from atomtune.model.base_shape import base_shape
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fused_layers import fuse_for_a_run
from atomtune.model.layout_support import collator_for, why_padded
from atomtune.model.load import (
    BaseSpec,
    device_in_use,
    dtype_name,
    embedding_rows,
    load_base,
    load_tokenizer,
    pad_id_of,
    quiet_libraries,
    resolve_dtype,
)
from atomtune.model.lora_targets import match_targets
from atomtune.model.loss import target_log_probabilities, target_nats
from atomtune.model.memory import free_memory, is_out_of_memory
from atomtune.model.rotary import refuse_mixed
from atomtune.model.token_rows import refuse_tokens_without_row
from atomtune.settings.command_settings import VerifySettings
from atomtune.settings.run_settings import LoraSettings, ModelSettings, RecordSettings
from atomtune.settings.spelled import words_of

#: Bytes of a number in bfloat16 and float16.
HALF = 2
#: If it takes longer than this, that is announced.
LONG_SECONDS = 20.0


@dataclass(frozen=True)
class Result:
    """What one side computed: loss in nats per target, log-probability of each target, gradient of each weight."""

    loss: float
    log_probabilities: torch.Tensor  # [targets], one record after another
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """The differences between the fast path and the plain one, with the model's own noise."""

    layout: Layout
    dtype: torch.dtype
    measures: tuple[Measure, ...]
    worst_weight: str  # the weight whose gradient differs most
    targets: int
    tokens_padded: int
    tokens_computed: int
    in_float32: "Comparison | None" = None  # if made: then the measures are distances from its plain side

    @property
    def holds(self) -> bool:
        return all(measure.holds for measure in self.measures) and (self.in_float32 is None or self.in_float32.holds)

    def figures(self) -> dict[str, Any]:
        """Figures for run.json."""
        measures: dict[str, dict[str, float]] = {}
        for measure in self.measures:
            figures = {"apart": measure.difference, "noise": measure.noise, "allowed": measure.allowed}
            measures[measure.name] = figures
        return {
            "layout": self.layout,
            "dtype": dtype_name(self.dtype),
            "targets": self.targets,
            "measures": measures,
            "holds": self.holds,
            **({} if self.in_float32 is None else {"in_float32": self.in_float32.figures()}),
        }


def verify(settings: VerifySettings) -> int:
    """Run `atomtune verify`. Raises CheckFailed (exit code 4) if the two sides differ by more than rounding."""
    quiet_libraries()
    console = Console()
    device = device_in_use()
    dtype = resolve_dtype(settings.dtype, device, notice=console.notice)
    examples, pad_id, ledger = _examples(settings, console)
    console.say(
        f"{len(examples)} records of {', '.join(Path(source).name for source in settings.dataset_paths)}, on {device}"
    )
    compared = Check(
        examples=examples,
        model=settings,
        lora=settings,
        wanted=settings.layout,
        kernels=liger.Circumstances(wanted=None, device=device.type, is_installed=liger.is_installed()),
        device=device,
        pad_id=pad_id,
        per_batch=settings.per_device_train_batch_size or USUAL_BATCH,
        console=console,
    ).compare(dtype)
    say_comparison(compared, console)
    if ledger.broken and not settings.skip_bad:
        console.notice(about_broken(ledger))
        settings = replace(settings, skip_bad=True)
    of_the_run = words_of(settings, ModelSettings, RecordSettings, LoraSettings, also=["per_device_train_batch_size"])
    console.next_steps([as_command(["train", *of_the_run])])
    return 0


def _examples(settings: VerifySettings, console: Console) -> tuple[list[Example], int, Ledger]:
    """The Examples of some records, the id for padding, and what became of all records.

    Raises BadData, BadModel or BadSettings as a run would for records that cannot be used or computed.
    """
    tokenizer = load_tokenizer(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    template = load_template(settings.template, tokenizer, **settings.template_options())
    shape = base_shape(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    if settings.max_seq_length is None:
        settings = replace(settings, max_seq_length=shape.longest)
    data = _encoded(settings, template)
    refuse_unusable(data.ledger, settings.dataset_paths)
    rows = data.examples.select(sample_rows(len(data.examples), settings.records, seed=settings.seed))
    examples = [example for row in rows for example in as_examples(row)]
    longest = max(len(example.ids) for example in examples)
    batches = {"per_device_train_batch_size": settings.per_device_train_batch_size or USUAL_BATCH}
    refuse_mixed(shape.rotary_limit, longest, batches=batches)
    known = embedding_rows(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    if known is not None:
        ids = ((example.origin, example.ids) for example in examples)
        refuse_tokens_without_row(tokenizer, known, ids, path=str(settings.model_path), notice=console.notice)
    return examples, pad_id_of(tokenizer), data.ledger


def _encoded(settings: VerifySettings, template: Template) -> EncodedData:
    """All records of all files, from the cache if a run has encoded them."""
    rules = Rules(**settings.rules())
    parts: list[EncodedData] = []
    for source, name in zip(settings.dataset_paths, distinct_names(settings.dataset_paths), strict=True):
        parts.append(examples_of(source, template, rules, name=name))
    return concatenate(parts)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What is compared.

    wanted     --layout
    kernels    what decides whether a run tries Liger's kernels
    pad_id     the token that fills rows
    per_batch  records in a batch of the fast path
    """

    examples: Sequence[Example]
    model: ModelSettings
    lora: LoraSettings
    wanted: str
    kernels: liger.Circumstances
    device: torch.device
    pad_id: int
    per_batch: int
    console: Console

    def compare(self, dtype: torch.dtype) -> Comparison:
        """Compute the examples by the fast path and plainly; what does not hold in 16 bits, in float32 too."""
        if self.model.quantize == "int8":
            self.console.notice(
                "in training, the 8-bit layers compute the columns of large values of a whole batch in more bits, so a "
                "record's loss depends a little on its batch in any program. This effect is left out of the comparison."
            )
        compared, ours, plain = self._compare_in(dtype)
        if compared.holds or dtype.itemsize != HALF:
            return compared
        self.console.say(
            "the difference is larger than that of two plain runs; all again in float32, which rounds little …"
        )
        try:
            exact, _, plain_in_float32 = self._compare_in(torch.float32)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.console.notice(
                "the memory does not hold the base in float32, so whether rounding alone makes the difference is not "
                "known."
            )
            return compared
        measures = _measures(ours, plain_in_float32, plain, dtype=dtype)
        worst_weight = worst_gradient(ours.gradients, plain_in_float32.gradients)
        return replace(compared, measures=measures, worst_weight=worst_weight, in_float32=exact)

    def _compare_in(self, dtype: torch.dtype) -> tuple[Comparison, Result, Result]:
        """The comparison in one dtype, what the fast path computed, and what a plain run did; without dropout."""
        examples, per_batch = self.examples, self.per_batch
        layout, ours, tokens_computed = self._fast(dtype)
        plain, again = self._plain_twice(dtype)
        compared = Comparison(
            layout=layout,
            dtype=dtype,
            measures=_measures(ours, plain, again, dtype=dtype),
            worst_weight=worst_gradient(ours.gradients, plain.gradients),
            targets=len(plain.log_probabilities),
            tokens_padded=sum(padded_tokens(examples[i : i + per_batch]) for i in range(0, len(examples), per_batch)),
            tokens_computed=tokens_computed,
        )
        return compared, ours, plain

    def _fast(self, dtype: torch.dtype) -> tuple[Layout, Result, int]:
        """The layout, what the fast path computed, and the number of its tokens."""
        model = self._loaded(dtype)
        _say_how_long(model, self.examples, self.console)
        try:
            fuse_for_a_run(model, self.kernels, say=self.console.say)
            layout = _layout(model, self.wanted)
            collator = collator_for(model, layout, pad_id=self.pad_id, as_examples=as_examples)
            self.console.say(f"layout {layout}, as a run computes it …")
            return layout, *in_batches(model, self.examples, collator, per_batch=self.per_batch)
        finally:
            liger.leave_files()  # the plain side computes with transformers' own code

    def _plain_twice(self, dtype: torch.dtype) -> tuple[Result, Result]:
        """What two plain runs computed, which differ by rounding only."""
        model = self._loaded(dtype)
        self.console.say("plain transformers + PEFT, one record at a time …")
        plain = one_at_a_time(model, self.examples)
        self.console.say("plain again with another attention, to see how much rounding differs …")
        with another_plain_way(model):
            # The library's loss computes the softmax of the whole vocabulary in float32, which rounds more than its
            # attention. So the noise includes both.
            softmax_dtype = torch.promote_types(dtype, torch.float32)
            return plain, one_at_a_time(model, self.examples, softmax_dtype=softmax_dtype)

    def _loaded(self, dtype: torch.dtype) -> PeftModel:
        """The base with an adapter. One model is in memory at a time: the one before is freed first."""
        free_memory()
        base = load_base(BaseSpec(**self.model.base(), dtype=dtype, device=self.device))
        _keep_tokens_apart(base)
        return _as_after_training(base, self.lora)


def _say_how_long(model: PeftModel, examples: Sequence[Example], console: Console) -> None:
    """Announce how long all records will take if that is long, estimated from the time of one record.

    The time grows with the records, and with the weights of base and adapter: a rank of 65,536 takes a minute even on a
    base with two small layers.
    """
    began = time.perf_counter()
    one_at_a_time(model, examples[:1])
    tokens = sum(len(example.ids) for example in examples)
    # All records are computed three times.
    seconds = (time.perf_counter() - began) * 3 * tokens / len(examples[0].ids)
    if seconds >= LONG_SECONDS:
        trainable, total = model.get_nb_trainable_parameters()
        console.say(
            f"this takes about {rough_duration(seconds)}: an adapter of {trainable:,} weights on {total - trainable:,} "
            "of the base, three times over each record; --records takes fewer …"
        )


def _layout(fast: CausalLM, wanted: str) -> Layout:
    """The layout to verify. Raises BadSettings if --layout names one that is not exact for this model."""
    if wanted == "padded":
        return "padded"
    reason = why_padded(fast)
    if reason is None:
        return "packed" if wanted == "packed" else "tree"
    if wanted in ("tree", "packed"):
        raise BadSettings([f"--layout {wanted} would not be exact for this model: {reason}."])
    return "padded"


def _keep_tokens_apart(base: CausalLM) -> None:
    """Let LLM.int8 compute each token alone, as every other layer does.

    It takes the columns in which any token of a batch is large out of its 8 bits, so that a token's values depend on
    what else is in the batch, padded or not: 2e-2 of a gradient on a tiny Llama, where a wrong layout would not show.
    """
    for module in base.modules():
        state: Any = getattr(module, "state", None)
        if hasattr(state, "threshold"):
            state.threshold = 0.0


def _as_after_training(base: CausalLM, lora: LoraSettings) -> PeftModel:
    """The base with an adapter as after some training: in a new one B is zero, so A would have no gradient."""
    match_targets(base, lora.lora_targets)
    adapted = new_adapter(base, LoraSpec(**{**lora.lora(), "dropout": 0.0}))
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            scale = weight.shape[-1] ** -0.5 * (1.0 if "lora_A" in name else 0.05)
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return adapted.eval()  # a base's own dropout would draw other numbers in rows of another shape


def _measures(ours: Result, plain: Result, again: Result, *, dtype: torch.dtype) -> tuple[Measure, ...]:
    """The measures to compare.

    The loss is a weighted mean of log-probabilities, so their mean noise bounds its noise.
    """
    of_targets = log_probability_measures(
        ours.log_probabilities, plain.log_probabilities, again.log_probabilities, dtype=dtype
    )
    per_nat = 1 / max(plain.loss, 1e-9)
    mean = of_targets[0]
    loss = Measure("loss (relative)", abs(ours.loss - plain.loss) * per_nat, mean.noise * per_nat, mean.least)
    of_gradients = gradient_measures(ours.gradients, plain.gradients, again.gradients, dtype=dtype)
    return (loss, *of_targets, *of_gradients)


def one_at_a_time(
    model: CausalLM, examples: Sequence[Example], *, softmax_dtype: torch.dtype = torch.float64
) -> Result:
    """The plain side: each record alone through the model's own forward, with the loss computed from all its logits."""
    model.zero_grad()
    targets = sum(sum(example.learn) for example in examples)
    loss, log_probabilities = 0.0, []
    for example in examples:
        ids = torch.tensor([example.ids], device=model.device)  # [1, T]
        learned = [i for i, times in enumerate(example.learn) if times]
        times = torch.tensor([example.learn[i] for i in learned], device=model.device)  # [N]
        logits = model(input_ids=ids).logits[0, [i - 1 for i in learned]]  # [N, V]
        scores = logits.to(softmax_dtype).log_softmax(-1).gather(1, ids[0, learned][:, None])[:, 0]  # [N]
        share = -(scores.double() * times).sum() / targets
        share.backward()
        loss += share.item()
        log_probabilities.append(scores.detach().double().cpu())
    return Result(loss, torch.cat(log_probabilities), _gradients(model))


def in_batches(
    model: CausalLM, examples: Sequence[Example], collator: Collator, *, per_batch: int
) -> tuple[Result, int]:
    """The fast side, and the number of tokens it computed. A target that records share is repeated for each of them."""
    model.zero_grad()
    targets = sum(sum(example.learn) for example in examples)
    loss, tokens_computed, log_probabilities = 0.0, 0, []
    for start in range(0, len(examples), per_batch):
        records = examples[start : start + per_batch]
        batch: Any = collator.lay(records)
        batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        tokens_computed += batch["input_ids"].numel()
        nats, _ = target_nats(model, batch)
        (nats / targets).backward()
        loss += nats.item() / targets
        scores = target_log_probabilities(model, batch).double().cpu()  # [N]
        log_probabilities += _by_record(batch, scores, records)
    return Result(loss, torch.cat(log_probabilities), _gradients(model)), tokens_computed


def _by_record(batch: Any, scores: torch.Tensor, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Each record's part of a batch's scores, in its order; NaN for a target that the batch lacks."""
    places, by_place = TargetPlaces(batch), scores.tolist()
    log_probabilities = []
    for example in examples:
        own = [math.nan if place is None else by_place[place] for place in places.of(example)]
        log_probabilities.append(torch.tensor(own, dtype=torch.float64))
    return log_probabilities


def _gradients(model: CausalLM) -> dict[str, torch.Tensor]:
    """Gradients of all trained weights; zero for weights that the loss does not reach."""
    gradients = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients[name] = gradient.double().cpu()
    return gradients


def say_comparison(compared: Comparison, console: Console) -> None:
    """Print the comparison as a table and a sentence. Raises CheckFailed if it does not hold."""
    dtype, exact = dtype_name(compared.dtype), compared.in_float32
    if exact is None:
        title = f"layout {compared.layout} against one record at a time, {dtype}, {compared.targets:,} targets"
        _say_measures(compared, title, "of two plain runs", console)
        console.say(f"Allowed: {TIMES_NOISE:g} times what two plain runs differ by, which is rounding in {dtype}.")
    else:
        title = f"layout {exact.layout} against one record at a time, float32, {exact.targets:,} targets"
        _say_measures(exact, title, "of two plain runs", console)
        title = f"layout {compared.layout} in {dtype} against one record at a time in float32"
        _say_measures(compared, title, "of a plain run", console)
        console.say(
            f"These records are sensitive to rounding. Allowed in {dtype}: {TIMES_NOISE:g} times what a plain run in "
            f"{dtype} differs by from float32."
        )
    saved = compared.tokens_padded / compared.tokens_computed
    console.say(
        f"Work: {compared.tokens_padded:,} tokens padded, {compared.tokens_computed:,} computed, {saved:.1f}× less."
    )
    if not compared.holds:
        worst_weight = compared.worst_weight if exact is None or exact.holds else exact.worst_weight
        raise CheckFailed(
            f"Layout {compared.layout} is not equal to plain transformers + PEFT here (worst weight: {worst_weight}).\n"
            "Train with --layout padded, and please report the model's name and this table."
        )
    console.say(f"Layout {compared.layout} is equal to plain transformers + PEFT on these records.")


def _say_measures(compared: Comparison, title: str, noise: str, console: Console) -> None:
    table = Table(title=translated(title), title_justify="left")
    for column in ("", translated("difference"), translated(noise), translated("allowed"), ""):
        table.add_column(column)
    for measure in compared.measures:
        figures = (f"{value:.1e}" for value in (measure.difference, measure.noise, measure.allowed))
        verdict = translated("holds") if measure.holds else translated("DOES NOT HOLD")
        table.add_row(translated(measure.name), *figures, verdict)
    console.print(table)
