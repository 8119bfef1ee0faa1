"""Merge: base + adapter as one plain model folder, and a proof that nothing was lost on the way.

The proof has three parts. The weights: every adapted number in the written files is base + adapter, rounded once, and
every other tensor is the base's bit by bit. The prompts: the written folder renders them to the same ids. The answers:
the written model's next-token distributions differ from the adapter's by no more than rounding (model/agreement.py).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from atomtune.console import Console
from atomtune.data.encoding.chat_template import Template
from atomtune.errors import BadSettings, CheckFailed, listing
from atomtune.model.adapter import load_trained
from atomtune.model.adapter_folder import base_of, template_of
from atomtune.model.agreement import Measure, another_plain_way, distribution_measures
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.generate import prompt_ids, ready_to_answer
from atomtune.model.load import BaseSpec, dtype_name, load_base, quiet_libraries, stored_dtype
from atomtune.settings.fields import MergeSettings

CPU = torch.device("cpu")
#: Probe prompts of the check: several languages, digits, code, several lines.
PROBES = (
    "你是谁？",
    "Who are you?",
    "1 + 1 = ?\n请一步一步地想。",
    "今天天气怎么样？",
    "Write a short poem about the sea, and explain what it means to you.",
    "def fibonacci(n):",
    "Translate into German: I would like a cup of tea, please.",
)
#: Below this share of the adapter, rounding to the dtype took so much of it that the user should know.
LEAST_SHARE_KEPT = 0.9


def merge(settings: MergeSettings) -> int:
    """Write the merged model and prove it equal. Raises CheckFailed otherwise; the folder is kept for a look."""
    out = Path(settings.output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadSettings([f"--output_dir {out} is not an empty folder. Pass a new one."])
    quiet_libraries()
    console = Console()
    write_merged(settings, console)
    console.say(f"The merged model lies in {out}; transformers, vLLM and others load it as it is.\n\nNext:")
    console.say(f"  atomtune chat --adapter_path {out}", wrap=False)
    return 0


def write_merged(settings: MergeSettings, console: Console) -> None:
    """Write the merged model into --output_dir and prove it equal. Raises CheckFailed where it is not."""
    adapter, out = Path(settings.adapter_path), Path(settings.output_dir)
    trust = settings.trust_remote_code
    template, metadata = template_of(adapter, trust_remote_code=trust)
    base_path = base_of(adapter, settings.model_path)
    stored = stored_dtype(base_path, trust_remote_code=trust)
    dtype = stored if settings.dtype == "auto" else getattr(torch, settings.dtype)
    spec = BaseSpec(path=base_path, dtype=dtype, device=CPU, trust_remote_code=trust)

    console.say(f"loading {base_path} in {dtype_name(dtype)} …")
    base = load_base(spec)
    refuse_other_base(base_path, metadata.base, anyway=settings.other_base, notice=console.notice)
    console.say("merging …")
    merged = merge_weights(load_trained(base, adapter))
    ready_to_answer(merged, template, notice=console.notice)
    merged.save_pretrained(out)
    template.tokenizer.chat_template = template.source  # an adapter of another tool may have been saved without one
    template.tokenizer.save_pretrained(out)
    metadata.save(out)
    del base, merged

    console.say("checking the written folder …")
    adapted = load_trained(load_base(spec), adapter)
    written = load_base(BaseSpec(path=str(out), dtype=dtype, device=CPU, trust_remote_code=trust)).eval()
    weights = compare_weights(adapted, written)
    _refuse_other_weights(weights, out)
    _refuse_other_prompts(template, template_of(out, trust_remote_code=trust)[0], out)
    measures = _compare_answers(adapted, written, template, dtype=dtype)
    _refuse_other_answers(measures, out)
    if weights.share_kept < LEAST_SHARE_KEPT:
        console.notice(
            f"{dtype_name(dtype)} is too coarse for this adapter: rounding loses {1 - weights.share_kept:.0%} of its "
            "change. --dtype float32 keeps it."
        )
    divergence = measures[0]
    console.say(
        f"Checked: {weights.adapted:,} adapted matrices are base + adapter, rounded once to {dtype_name(dtype)}, and "
        f"{weights.same:,} other tensors are the base's.\n"
        f"Answers to {len(PROBES)} prompts differ from the adapter's by {divergence.apart:.1e} nats a token (KL); two "
        f"plain runs differ by {divergence.noise:.1e}."
    )


@torch.no_grad()
def merge_weights(model: PeftModel) -> CausalLM:
    """The plain model with W + BA in its matrices, summed in float32 and rounded once.

    PEFT rounds BA to the base's dtype before it adds, which rounds twice.
    """
    for layer in _lora_layers(model).values():
        matrix = layer.get_base_layer()
        dtype = matrix.weight.dtype
        matrix.to(torch.promote_types(dtype, torch.float32))
        layer.merge()
        matrix.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        return model.merge_and_unload()  # takes PEFT's layers out


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


@dataclass(frozen=True)
class Weights:
    """How the written weights compare with base + adapter."""

    adapted: int  # matrices that the adapter changes
    same: int  # other tensors, equal bit by bit
    share_kept: float  # of the adapter's change, what rounding to the dtype left; 1 is all
    problems: tuple[str, ...]


@torch.no_grad()
def compare_weights(adapted: PeftModel, written: CausalLM) -> Weights:
    """Compare every tensor of a written model with base + adapter.

    Each number must be the nearest one to the exact sum that its dtype has, so any fault of any size shows: a wrong
    base, a layer left out, an adapter scaled by 1.01.
    """
    tensors = dict(written.named_parameters())
    problems, asked, kept = [], 0.0, 0.0
    layers = _lora_layers(adapted)
    for name, layer in layers.items():
        base = layer.get_base_layer().weight.double()
        delta = _delta(layer)
        merged = tensors.pop(f"{name}.weight", None)
        if merged is None or merged.shape != base.shape:
            problems.append(f"{name}.weight: not in the written files as it should be")
            continue
        problems += [f"{name}.weight: {fault}" for fault in _not_nearest(merged, base, delta)]
        change = merged.double() - base
        kept += (change * delta).sum().item()
        asked += delta.square().sum().item()
    # Under PEFT a matrix that is adapted is called …base_layer.weight; all other names are those of the plain model.
    plain = {
        name: weight
        for name, weight in adapted.get_base_model().named_parameters()
        if "lora_" not in name and ".base_layer.weight" not in name
    }
    plain = {name.replace(".base_layer.", "."): weight for name, weight in plain.items()}
    for name, weight in tensors.items():
        if name not in plain or not torch.equal(plain[name], weight):
            problems.append(f"{name}: is not the base's")
    problems += [f"{name}: not in the written files" for name in plain.keys() - tensors.keys()]
    return Weights(len(layers), len(tensors), kept / asked if asked else 1.0, tuple(sorted(problems)))


def _delta(layer: LoraLayer) -> torch.Tensor:
    """What LoRA adds to a matrix, in float64: scale * B A, written out here and not asked of PEFT's merging."""
    name = layer.active_adapters[0]
    if layer.lora_variant.get(name) is not None:  # DoRA and others have formulas of their own
        return layer.get_delta_weight(name).double()
    delta = layer.scaling[name] * (layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double())
    return delta.T if layer.fan_in_fan_out else delta


def _not_nearest(merged: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> list[str]:
    """What is wrong with a merged matrix: numbers that are not the nearest to base + delta in its dtype."""
    exact = base + delta
    # Half a unit in the last place for the rounding, and the float32 sums before it.
    rounding = torch.finfo(merged.dtype).eps / 2 * exact.abs()
    sums = 8 * torch.finfo(torch.float32).eps * (base.abs() + delta.abs().max())
    wrong = int(((merged.double() - exact).abs() > rounding + sums).sum())
    if not wrong and bool(torch.isfinite(merged).all()):
        return []
    return [f"{wrong:,} of {merged.numel():,} numbers are not base + adapter"]


def _refuse_other_weights(weights: Weights, out: Path) -> None:
    if weights.problems:
        raise CheckFailed(
            f"The weights in {out} are not base + adapter; do not serve them:\n{listing(weights.problems)}"
        )


def _refuse_other_prompts(template: Template, written: Template, out: Path) -> None:
    for probe in PROBES:
        messages = [{"role": "user", "content": probe}]
        if prompt_ids(template, messages) != prompt_ids(written, messages):
            raise CheckFailed(f"{out} writes {probe!r} with other tokens than training did; do not serve it.")


@torch.no_grad()
def _compare_answers(
    adapted: PeftModel, written: CausalLM, template: Template, *, dtype: torch.dtype
) -> Sequence[Measure]:
    prompts = [prompt_ids(template, [{"role": "user", "content": probe}]) for probe in PROBES]
    plain = _log_probabilities(adapted, prompts)
    with another_plain_way(adapted):
        again = _log_probabilities(adapted, prompts)
    return distribution_measures(_log_probabilities(written, prompts), plain, again, dtype=dtype)


def _log_probabilities(model: CausalLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[N, V] of the token after each position of the prompts."""
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        rows.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().log_softmax(-1))
    return torch.cat(rows)


def _refuse_other_answers(measures: Sequence[Measure], out: Path) -> None:
    failed = [
        f"  {measure.name}: {measure.apart:.1e} (two plain runs: {measure.noise:.1e}, allowed: {measure.allowed:.1e})"
        for measure in measures
        if not measure.holds
    ]
    if failed:
        raise CheckFailed(
            f"The merged model in {out} does not answer as the adapter does; do not serve it.\n" + "\n".join(failed)
        )
