"""Verify: the fast path against plain transformers + PEFT, on the user's own model and records.

The plain side is dumber than what it checks and shares nothing with it but the weights: one record at a time, all
its logits, PEFT's own layers, the library's attention.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from atomtune.batch.collate import Collator
from atomtune.batch.cost import sample_rows
from atomtune.batch.row import padded_tokens
from atomtune.choices import Layout
from atomtune.console import Console
from atomtune.data.cache import Rules, as_examples, concatenate, examples_of
from atomtune.data.encoding.choose_template import load_template
from atomtune.data.records import Example
from atomtune.errors import BadData, BadSettings, CheckFailed
from atomtune.model.adapter import LoraSpec, new_adapter
from atomtune.model.fused_lora import compute_together
from atomtune.model.layout_support import cut_of, why_padded, windows_of
from atomtune.model.load import (
    BaseSpec,
    device_in_use,
    load_base,
    load_tokenizer,
    pad_id_of,
    quiet_libraries,
    resolve_dtype,
)
from atomtune.model.lora_targets import match_targets
from atomtune.model.loss import target_log_probabilities, target_nats
from atomtune.settings.fields import LoraSettings, ModelSettings, VerifySettings


@dataclass(frozen=True)
class Allowed:
    """How far two right computations may lie apart, and why."""

    loss: float  # relative
    log_probability: float  # absolute, the worst target
    gradient: float  # relative L2 norm, the worst layer
    reason: str


ALLOWED = {
    torch.float64: Allowed(
        1e-6, 1e-5, 1e-5, "the library computes its loss and its RMSNorm in float32 whatever the dtype"
    ),
    torch.float32: Allowed(1e-5, 1e-3, 1e-3, "float32 keeps 7 digits; sums are taken in another order"),
    torch.bfloat16: Allowed(1e-3, 0.25, 0.1, "bfloat16 keeps 2 to 3 digits; every layer rounds"),
    torch.float16: Allowed(1e-3, 0.05, 0.05, "float16 keeps 3 to 4 digits; every layer rounds"),
}


@dataclass(frozen=True)
class Result:
    """What one side computed: loss in nats per target, log-probability of every target, gradient of every weight."""

    loss: float
    log_probabilities: list[torch.Tensor]  # one [targets] per record, in the order of the records
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """The two sides side by side."""

    layout: Layout
    dtype: torch.dtype
    loss: float
    log_probability: float
    gradient: float
    worst_layer: str
    layers: int
    targets: int
    tokens_padded: int
    tokens_computed: int

    def figures(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "loss": self.loss,
            "log_probability": self.log_probability,
            "gradient": self.gradient,
            "targets": self.targets,
            "holds": self.holds,
        }

    @property
    def holds(self) -> bool:
        allowed = ALLOWED[self.dtype]
        return (
            self.loss <= allowed.loss
            and self.log_probability <= allowed.log_probability
            and self.gradient <= allowed.gradient
        )


def verify(settings: VerifySettings) -> int:
    """Run `atomtune verify`. Raises CheckFailed (exit code 4) when the two sides differ by more than rounding."""
    problems = [f"--{name} is needed." for name in ("model_path", "dataset_path") if not getattr(settings, name)]
    if problems:
        raise BadSettings(problems)
    quiet_libraries()
    console = Console()
    device = device_in_use()
    dtype = resolve_dtype(settings.dtype, device, fp16=False, bf16=False, notice=console.notice)
    examples, pad_id = _examples(settings)
    console.say(
        f"{len(examples)} records of {', '.join(Path(source).name for source in settings.dataset_paths)}, on {device}"
    )
    compared = compare(
        examples,
        model=settings,
        lora=settings,
        asked=settings.layout,
        dtype=dtype,
        device=device,
        pad_id=pad_id,
        per_batch=settings.per_device_train_batch_size,
        console=console,
    )
    say(compared, console)
    return 0


def _examples(settings: VerifySettings) -> tuple[list[Example], int]:
    tokenizer = load_tokenizer(str(settings.model_path), trust_remote_code=settings.trust_remote_code)
    template, rules = load_template(settings.template, tokenizer), Rules(**settings.rules())
    data = concatenate([examples_of(source, template, rules) for source in settings.dataset_paths])
    if not len(data.examples):
        raise BadData(f"{', '.join(settings.dataset_paths)}: none of {data.ledger.records_read:,} records can be used.")
    rows = data.examples.select(sample_rows(len(data.examples), settings.records, seed=settings.seed))
    return [example for row in rows for example in as_examples(row)], pad_id_of(tokenizer)


def compare(
    examples: Sequence[Example],
    *,
    model: ModelSettings,
    lora: LoraSettings,
    asked: str,
    dtype: torch.dtype,
    device: torch.device,
    pad_id: int,
    per_batch: int,
    console: Console,
) -> Comparison:
    """Compute the examples in both ways, one model in memory at a time, at dropout 0."""

    def load() -> Any:
        base = load_base(BaseSpec(**model.base(), dtype=dtype, device=device))
        match_targets(base, lora.lora_targets)
        adapted = new_adapter(base, LoraSpec(**{**lora.lora(), "dropout": 0.0}))
        _fill(adapted)
        return adapted.eval()  # a base's own dropout would draw differently in rows of another shape

    fast = load()
    reason = why_padded(fast) if asked != "padded" else "it was asked for"
    if reason and asked in ("tree", "packed"):
        raise BadSettings([f"--layout {asked} would not be exact for this model: {reason}."])
    layout: Layout = "padded" if reason else "packed" if asked == "packed" else "tree"
    compute_together(fast, input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    windows = windows_of(fast) if layout != "padded" else (None,)
    collator = Collator(layout=layout, pad_id=pad_id, as_examples=as_examples, windows=windows, cut=cut_of(fast))
    console.say("the fast path …")
    ours, computed = in_batches(fast, examples, collator, per_batch=per_batch)
    del fast
    console.say("plain transformers + PEFT, one record at a time …")
    plain = one_at_a_time(load(), examples)
    apart = {
        name: ((ours.gradients[name] - one).norm() / max(one.norm().item(), 1e-30)).nan_to_num(nan=math.inf).item()
        for name, one in plain.gradients.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    return Comparison(
        layout=layout,
        dtype=dtype,
        loss=abs(ours.loss - plain.loss) / plain.loss,
        log_probability=(torch.cat(ours.log_probabilities) - torch.cat(plain.log_probabilities)).abs().max().item(),
        gradient=apart[worst],
        worst_layer=worst,
        layers=len(plain.gradients),
        targets=sum(len(one) for one in plain.log_probabilities),
        tokens_padded=sum(padded_tokens(examples[i : i + per_batch]) for i in range(0, len(examples), per_batch)),
        tokens_computed=computed,
    )


def _fill(adapted: torch.nn.Module) -> None:
    """A fresh adapter's B is zero, so A would have no gradient to compare; these are as after some training."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            scale = weight.shape[-1] ** -0.5 * (1.0 if "lora_A" in name else 0.05)
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)


def one_at_a_time(model: Any, examples: Sequence[Example]) -> Result:
    """The dumb side: each record alone through the model's own forward; the loss from its logits, in full."""
    targets = sum(sum(example.learn) for example in examples)
    total, log_probabilities = 0.0, []
    for example in examples:
        ids = torch.tensor([example.ids], device=model.device)
        learned = [i for i, times in enumerate(example.learn) if times]
        logits = model(input_ids=ids).logits[0, [i - 1 for i in learned]].double()
        scores = logits.log_softmax(-1).gather(1, ids[0, learned][:, None])[:, 0]
        share = -scores.sum() / targets
        share.backward()
        total += share.item()
        log_probabilities.append(scores.detach().cpu())
    return Result(total, log_probabilities, _gradients(model))


def in_batches(model: Any, examples: Sequence[Example], collator: Collator, *, per_batch: int) -> tuple[Result, int]:
    """The fast side, and the tokens it computed. A target that records share is looked up for each of them."""
    targets = sum(sum(example.learn) for example in examples)
    total, computed, log_probabilities = 0.0, 0, []
    for start in range(0, len(examples), per_batch):
        some = examples[start : start + per_batch]
        batch: Any = collator.lay(some)
        batch = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        computed += batch["input_ids"].numel()
        nats, _ = target_nats(model, batch)
        (nats / targets).backward()
        total += nats.item() / targets
        found = target_log_probabilities(model, batch).double().cpu()
        log_probabilities += _by_record(batch, found, some)
    return Result(total, log_probabilities, _gradients(model)), computed


def _by_record(batch: Any, found: torch.Tensor, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Log-probabilities of each record's targets, found by the path of tokens that leads to them; NaN if none does."""
    plan = batch["plan"]
    ids = batch["input_ids"].cpu()
    by_path: dict[tuple[int, ...], float] = {}
    rows = zip(
        batch["row"].tolist(), batch["predicted_from"].tolist(), batch["target"].tolist(), found.tolist(), strict=True
    )
    for row, source, target, value in rows:
        if plan is None:
            path = tuple(ids[row, : source + 1].tolist())
        else:
            until = plan.until.cpu()
            above = [k for k in range(source + 1) if source < until[k]]
            path = tuple(ids[0, above].tolist())
        by_path[(*path, target)] = value
    return [
        torch.tensor(
            [by_path.get(example.ids[: i + 1], math.nan) for i, times in enumerate(example.learn) if times],
            dtype=torch.float64,
        )
        for example in examples
    ]


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad}


def say(compared: Comparison, console: Console) -> None:
    """The comparison as a table and a sentence. Raises CheckFailed when it does not hold."""
    allowed, name = ALLOWED[compared.dtype], str(compared.dtype).removeprefix("torch.")
    table = Table(title=f"layout {compared.layout} against one record at a time, {name}", title_justify="left")
    for column in ("", "largest difference", "allowed", ""):
        table.add_column(column)
    for what, found, limit in (
        ("loss (relative)", compared.loss, allowed.loss),
        (f"log-probability of {compared.targets:,} targets", compared.log_probability, allowed.log_probability),
        (f"gradients of {compared.layers} adapter weights (relative)", compared.gradient, allowed.gradient),
    ):
        table.add_row(what, f"{found:.1e}", f"{limit:g}", "holds" if found <= limit else "DOES NOT HOLD")
    console.print(table)
    saved = compared.tokens_padded / compared.tokens_computed
    console.say(
        f"Allowed because {allowed.reason}.\nWork: {compared.tokens_padded:,} tokens padded, "
        f"{compared.tokens_computed:,} computed, {saved:.1f}× less."
    )
    if not compared.holds:
        raise CheckFailed(
            f"The fast path is not equal to plain transformers + PEFT here (worst: {compared.worst_layer}).\n"
            "Train with --layout padded, and please report the model's name and this table."
        )
    console.say("The fast path is equal to plain transformers + PEFT on these records.")
