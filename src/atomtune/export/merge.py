"""Merge: base + adapter as one plain model folder, and a proof that nothing was lost on the way.

The proof has three parts. The weights: every adapted number in the written files is base + adapter, rounded once, and
every other tensor is bit by bit the base's, or the adapter's where that holds it whole. The prompts: the written folder
renders them to the same ids. The answers: the written model's next-token distributions differ from the adapter's by no
more than rounding (model/agreement.py).
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import Embedding
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from rich.filesize import decimal
from torch import nn

from atomtune.choices import Quantize
from atomtune.console import Console, as_command
from atomtune.data.encoding.chat_template import Template
from atomtune.disk import disk_failed, filled, is_free, is_without_temporary_folder
from atomtune.errors import AtomtuneError, BadModel, BadSettings, CheckFailed, RunFailed, listing
from atomtune.export.carried_tensors import carry_over, changed, keep_unrounded
from atomtune.export.weighted import Weighted, load_weighted, weighted
from atomtune.language import translated
from atomtune.model.adapter import why_not_merged
from atomtune.model.adapter_folder import AdapterMetadata, template_of
from atomtune.model.agreement import Measure, another_plain_way, distribution_measures
from atomtune.model.base_as_trained import adapter_and_base
from atomtune.model.causal_lm import CausalLM
from atomtune.model.fingerprint import folder_of, is_at_hand, refuse_other_base, weight_files
from atomtune.model.generate import prompt_ids, ready_to_answer
from atomtune.model.load import (
    BaseSpec,
    dtype_name,
    is_stored_quantized,
    load_base,
    load_dequantized,
    quiet_libraries,
    stored_dtype,
)
from atomtune.settings.fields import MergeSettings
from atomtune.settings.spelled import base_words

#: PEFT's part of a name, between a layer and what it wraps.
_WRAPPED = ".base_layer"
#: Parts of the names of what an adapter holds.
_OF_ADAPTERS = (".lora_", ".modules_to_save.", ".original_module.", ".token_adapter.")
CPU = torch.device("cpu")
#: Without it nobody takes a folder for a model's.
LAST_WRITTEN = "config.json"
#: Behind what a check says.
_NOT_KEPT = "The merged model is not kept."
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
#: A base's files may hold a tied matrix twice, which the merged model has once.
_LEAST_SHARE_OF_FILES = 0.6
#: Below this share of the adapter, rounding to the dtype took so much of it that the user should know.
LEAST_SHARE_KEPT = 0.9


@dataclass(frozen=True)
class Weights:
    """How the written weights compare with base + adapter."""

    adapted: int  # matrices that the adapter changes
    same: int  # other tensors, equal bit by bit
    whole: int  # of these, those that the adapter holds whole; the rest is the base's
    share_kept: float  # of the adapter's change, what rounding to the dtype left; 1 is all
    problems: tuple[str, ...]


def merge(settings: MergeSettings) -> int:
    """Write the merged model and prove it equal. Raises CheckFailed otherwise, and nothing is left."""
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
    """Talk to it; and where one adapter was merged, prove that a server answers as that adapter does."""
    commands = [["chat", "--adapter_path", settings.output_dir]]
    if len(settings.adapter_paths) == 1:
        adapter = ["--adapter_path", settings.adapter_paths[0], *base_words(settings)]
        commands.append(["certify", *adapter, "--served", settings.output_dir])
    return [as_command(words) for words in commands]


@contextlib.contextmanager
def filling(out: Path, *, last: str) -> Iterator[Path]:
    """--output_dir, whose files appear in it when they are whole and checked. Raises BadSettings where it cannot be."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(filled(out, last=last))
        except BlockingIOError:
            problem = f"--output_dir {out}: another command is writing there now. Pass another one."
            raise BadSettings([problem]) from None
        except OSError as error:
            if disk_failed(error):
                raise
            raise BadSettings([f"--output_dir {out} cannot be made: {error.strerror}: {error.filename}."]) from None
        try:
            yield folder
        except AtomtuneError:
            raise
        except Exception as error:
            if not disk_failed(error) or is_without_temporary_folder(error):
                raise
            raise RunFailed(
                f"--output_dir {out}: the disk is full or failing: {error}\nFree some space there, or pass an "
                "--output_dir on another disk."
            ) from None


def write_merged(settings: MergeSettings, out: Path, console: Console) -> None:
    """Write the merged model into a folder and prove it equal. Raises CheckFailed where it is not.

    out  is not --output_dir, where nothing appears before it is proved
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
    del base  # two models are loaded for the check, and memory for a third may be missing

    console.say("checking the written folder …")
    weights, measures = _check_written(trained, out)
    _refuse_changed(trained, out, (*copied.carried, *copied.unrounded))
    _say_checked(weights, measures, trained.spec.dtype, console)
    if copied.carried:
        console.say(
            f"{len(copied.carried):,} tensors that transformers does not load "
            f"({', '.join(_first_parts(copied.carried))}) are copied from the base unchanged."
        )
    if copied.unrounded:
        console.say(
            f"{len(copied.unrounded):,} tensors that the base's files hold in more bits than the rest are written "
            "like that too, because servers may use them unrounded."
        )


class _Copied(NamedTuple):
    """Names of the tensors that a merged folder has from its base's files, as they are there.

    carried    transformers does not load them
    unrounded  transformers rounds them as it loads them
    """

    carried: tuple[str, ...] = ()
    unrounded: tuple[str, ...] = ()


@dataclass(frozen=True)
class _TrainedModel:
    """What is merged: adapters, the base they belong to, and the template that prompts are written with.

    bases             the fingerprint of the base that each adapter was trained on, "" where it is not known
    stored_quantized  whether the base's own files are quantized
    """

    adapters: tuple[Weighted, ...]
    spec: BaseSpec
    template: Template
    metadata: AdapterMetadata
    bases: tuple[str, ...]
    stored_quantized: bool


def _trained_model(settings: MergeSettings, console: Console) -> _TrainedModel:
    """Raises BadModel or BadSettings where the adapters do not go together, or with the base."""
    adapters = weighted(settings.adapter_paths, settings.weights)
    first, *others = (adapter.folder for adapter in adapters)
    trust = settings.trust_remote_code
    template, metadata, base_path = adapter_and_base(
        first,
        model_path=settings.model_path,
        trust_remote_code=trust,
        other_base=settings.other_base,
        notice=console.notice,
    )
    bases = [metadata.base]
    for folder in others:
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
    """Raise RunFailed where the disk cannot hold the merged weights: loading and merging a large base takes minutes."""
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
    """Which weights the merged model has where those of training were quantized."""
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
    """Write the merged model with its tokenizer, template and metadata; the base's matrices change."""
    adapted = load_weighted(base, trained.adapters)
    if why := why_not_merged(adapted):
        raise BadModel(
            f"This adapter cannot be merged: {why}.\nchat, serve and evaluate load it together with its base."
        )
    merged = merge_weights(adapted)
    ready_to_answer(merged, trained.template, notice=console.notice)
    merged.save_pretrained(out)
    tokenizer = trained.template.tokenizer
    tokenizer.chat_template = trained.template.source  # an adapter of another tool may have been saved without one
    tokenizer.save_pretrained(out)
    trained.metadata.save(out)
    folder = folder_of(trained.spec.path)
    if folder is None or trained.stored_quantized:  # what transformers did not load there belongs to the packed weights
        return _Copied()
    stored = stored_dtype(trained.spec.path, trust_remote_code=trained.spec.trust_remote_code)
    unrounded = keep_unrounded(folder, out, dtype=stored)
    carried = carry_over(folder, out, loaded=merged.state_dict().keys(), prefix=str(merged.base_model_prefix))
    return _Copied(carried, unrounded)


def _first_parts(names: Sequence[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in names})


def _check_written(trained: _TrainedModel, out: Path) -> tuple[Weights, Sequence[Measure]]:
    """Read the written folder back and compare it with base + adapter. Raises CheckFailed where they differ."""
    base = load_dequantized(trained.spec, trained_in=trained.metadata.dtype)
    adapted = load_weighted(base, trained.adapters)
    written = load_base(replace(trained.spec, path=str(out), quantize=None)).eval()
    written_template, _ = template_of(out, trust_remote_code=trained.spec.trust_remote_code)

    weights = compare_weights(adapted, written)
    _refuse_other_weights(weights)
    _refuse_other_prompts(trained.template, written_template)
    measures = _compare_answers(adapted, written, trained.template, dtype=trained.spec.dtype)
    _refuse_other_answers(measures)
    return weights, measures


def _say_checked(weights: Weights, measures: Sequence[Measure], dtype: torch.dtype, console: Console) -> None:
    if weights.share_kept < LEAST_SHARE_KEPT:
        console.notice(
            f"{dtype_name(dtype)} is too coarse for this adapter: rounding loses {1 - weights.share_kept:.0%} of its "
            "change. --dtype float32 keeps it."
        )
    if weights.whole:
        console.say(f"{weights.whole:,} tensors are stored in full in the adapter, in place of the base's.")
    divergence = measures[0]
    console.say(
        f"Checked: {weights.adapted:,} adapted matrices are base + adapter, rounded once to {dtype_name(dtype)}, and "
        f"{weights.same - weights.whole:,} other tensors are the base's.\n"
        f"Answers to {len(PROBES)} prompts differ from the adapter's by {divergence.apart:.1e} nats per token (KL); "
        f"two plain runs differ by {divergence.noise:.1e}."
    )


@torch.no_grad()
def merge_weights(model: PeftModel) -> CausalLM:
    """The plain model with W + BA in its matrices, summed in float32 and rounded once.

    PEFT rounds BA to the base's dtype before it adds, which rounds twice.
    """
    for layer in _lora_layers(model).values():
        weight = _adapted_weight(layer)
        dtype = weight.dtype
        weight.data = weight.data.to(torch.promote_types(dtype, torch.float32))
        layer.merge()
        weight = _adapted_weight(layer)
        weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        warnings.filterwarnings("ignore", message="Already following adapters")  # a layer has some of them only
        return model.merge_and_unload()  # takes PEFT's layers out


def _lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """By the name that the adapted weight has in the plain model."""
    layers = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            # Two adapted tensors of one module (an expert's up and down) are wrapped one in the other.
            plain = name.replace(_WRAPPED, "")
            layers[f"{plain}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return layers


def _adapted_weight(layer: LoraLayer) -> nn.Parameter:
    if isinstance(layer, ParamWrapper):
        return layer.get_param()
    return layer.get_base_layer().weight


@torch.no_grad()
def compare_weights(adapted: PeftModel, written: CausalLM) -> Weights:
    """Compare every tensor of a written model with base + adapter.

    Each number must be the nearest one to the exact sum that its dtype has, so any fault of any size shows: a wrong
    base, a layer left out, an adapter scaled by 1.01.
    """
    unchecked = dict(written.named_parameters())
    layers = _lora_layers(adapted)
    problems: list[str] = []
    # The change the adapter asks for, D, and what is left of it, M - W, projected on D: <M - W, D> / <D, D>.
    change_wanted, change_written = 0.0, 0.0
    for name, base, deltas in _sums(layers):
        delta = torch.stack(deltas).sum(0)
        merged = unchecked.pop(name, None)
        if merged is None or merged.shape != base.shape:
            problems.append(f"{name}: missing from the written files, or of another shape")
            continue
        problems += [f"{name}: {fault}" for fault in _not_nearest(merged, base, deltas)]
        change_written += ((merged.double() - base) * delta).sum().item()
        change_wanted += delta.square().sum().item()

    # All sums are checked now; what is left must be the base's, or what the adapter has in its place.
    whole = _whole_weights(adapted)
    unadapted = {**_base_weights(adapted), **whole}
    for name, weight in unchecked.items():
        if name not in unadapted or not torch.equal(unadapted[name].to(weight.dtype), weight):
            problems.append(f"{name}: is not the adapter's" if name in whole else f"{name}: is not the base's")
    names = {name for name, _ in written.named_parameters(remove_duplicate=False)}
    for name in unadapted.keys() - names:
        problems.append(f"{name}: not in the written files")
    share_kept = change_written / change_wanted if change_wanted else 1.0
    return Weights(
        len(layers), len(unchecked), len(whole.keys() & unchecked.keys()), share_kept, tuple(sorted(problems))
    )


def _base_weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The base's weights, adapted ones too, by their names in the plain model; tied ones by each of theirs."""
    weights = {}
    for name, weight in adapted.get_base_model().named_parameters(remove_duplicate=False):
        # PEFT calls an adapted matrix q_proj.base_layer.weight and its bias q_proj.base_layer.bias.
        if not any(part in name for part in _OF_ADAPTERS):
            weights[name.replace(_WRAPPED, "")] = weight
    return weights


def _whole_weights(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """What an adapter has in place of the base's weights: layers that were trained whole, and single tokens' rows."""
    weights: dict[str, torch.Tensor] = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            (active,) = module.active_adapters
            for part, weight in module.modules_to_save[active].named_parameters():
                weights[f"{name}.{part}"] = weight
        elif isinstance(module, TrainableTokensWrapper):
            weights[f"{name}.weight"] = module.weight
    return weights


def _sums(layers: Mapping[str, LoraLayer]) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """Each tensor that adapters add to, in float64: its name, the base's, and what each active adapter adds."""
    for name, layer in layers.items():
        names = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
        yield name, _adapted_weight(layer).double(), [_delta(layer, adapter) for adapter in names]
        if with_bias := [adapter for adapter in names if layer.lora_bias[adapter]]:
            added = [layer.scaling[adapter] * layer.lora_B[adapter].bias.double() for adapter in with_bias]
            yield f"{name.removesuffix('weight')}bias", layer.get_base_layer().bias.double(), added


def _delta(layer: LoraLayer, name: str) -> torch.Tensor:
    """What an adapter adds to a matrix, in float64, written out here and not asked of PEFT's merging."""
    if name in layer.lora_magnitude_vector:
        return _delta_of_dora(layer, name)
    if layer.lora_variant.get(name) is not None:  # others have formulas of their own
        return layer.get_delta_weight(name).double()
    return _product(layer, name)


def _delta_of_dora(layer: LoraLayer, name: str) -> torch.Tensor:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): m (W + BA) / |W + BA|, less W; m has a number for each output."""
    base = _adapted_weight(layer).double()
    direction = base + _product(layer, name)
    inputs = 0 if isinstance(layer, Embedding) or layer.fan_in_fan_out else 1
    norm = direction.norm(dim=inputs, keepdim=True)
    return layer.lora_magnitude_vector[name].weight.double().reshape(norm.shape) * direction / norm - base


def _product(layer: LoraLayer, name: str) -> torch.Tensor:
    """Scale * B A.

    E experts, r the rank, I inputs, O outputs
    """
    if isinstance(layer, Embedding):  # [I, O], I the vocabulary
        return layer.scaling[name] * (layer.lora_embedding_B[name].double() @ layer.lora_embedding_A[name].double()).T
    down, up = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
    if isinstance(layer, ParamWrapper) and layer.get_param().dim() == 3:
        experts = layer.get_param().shape[0]
        down = down.unflatten(0, (experts, -1))  # [E * r, I] → [E, r, I]
        up = up.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [O, r * E] → [E, O, r]
        delta = layer.scaling[name] * (up @ down)  # [E, O, I]
        # Some models hold their experts' matrices as [E, I, O], and say so.
        return delta.mT if getattr(layer.get_base_layer(), "is_transposed", False) else delta
    delta = layer.scaling[name] * (up @ down)
    return delta.T if layer.fan_in_fan_out else delta


def _not_nearest(merged: torch.Tensor, base: torch.Tensor, deltas: Sequence[torch.Tensor]) -> list[str]:
    """What is wrong with a merged matrix: numbers that are not the nearest to base + all deltas in its dtype."""
    exact = base + torch.stack(list(deltas)).sum(0)
    largest = sum(float(delta.abs().max()) for delta in deltas)
    # Half a unit in the last place for the rounding, and the float32 sums before it.
    dtype = torch.finfo(merged.dtype)
    rounding = dtype.eps / 2 * exact.abs().clamp(min=dtype.smallest_normal)  # below that, numbers lie evenly
    sums = 8 * torch.finfo(torch.float32).eps * (base.abs() + largest)
    off_by = (merged.double() - exact).abs()
    wrong = int((off_by > rounding + sums).sum())
    if not wrong and bool(torch.isfinite(merged).all()):
        return []
    return [f"{wrong:,} of {merged.numel():,} numbers are not base + adapter"]


def _refuse_other_weights(weights: Weights) -> None:
    if weights.problems:
        raise CheckFailed(f"The merged weights are not base + adapter:\n{listing(weights.problems)}\n{_NOT_KEPT}")


def _refuse_changed(trained: _TrainedModel, out: Path, carried: Sequence[str]) -> None:
    folder = folder_of(trained.spec.path)
    if folder and (names := changed(folder, out, carried)):
        raise CheckFailed(f"These merged tensors are not the base's:\n{listing(names)}\n{_NOT_KEPT}")


def _refuse_other_prompts(template: Template, written: Template) -> None:
    for probe in PROBES:
        messages = [{"role": "user", "content": probe}]
        if prompt_ids(template, messages) != prompt_ids(written, messages):
            raise CheckFailed(
                f"The merged model's tokenizer turns {probe!r} into other tokens than in training. {_NOT_KEPT}"
            )


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
        ids = torch.tensor([prompt])  # [1, T]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # [T, V]
        rows.append(logits.double().log_softmax(-1))
    return torch.cat(rows)  # [N, V], N tokens of all prompts


def _refuse_other_answers(measures: Sequence[Measure]) -> None:
    failed = []
    for measure in measures:
        if not measure.holds:
            apart, noise, allowed = f"{measure.apart:.1e}", f"{measure.noise:.1e}", f"{measure.allowed:.1e}"
            failed.append(f"  {measure.name}: {apart} (two plain runs: {noise}, allowed: {allowed})")
    if failed:
        raise CheckFailed("The merged model does not answer like the adapter:\n" + "\n".join([*failed, _NOT_KEPT]))
