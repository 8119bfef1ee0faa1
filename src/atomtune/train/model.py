"""Model: loads and checks the base and adapter of one run, and decides how they are computed.

That is: which layers are fused, which recompute their activations, and whether steps are replayed as CUDA graphs.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import peft
import torch
from transformers import TrainingArguments

from atomtune.choices import Layout
from atomtune.errors import BadSettings
from atomtune.language import translated
from atomtune.model import liger
from atomtune.model.adapter import (
    LoraSpec,
    adapter_tensors,
    expert_tensors,
    left_out_by_peft,
    new_adapter,
    start_from_weights,
    why_not_merged,
)
from atomtune.model.adapter_folder import AdapterMetadata, adapter_file
from atomtune.model.adapter_keys import refuse_unread
from atomtune.model.auto_class import auto_class
from atomtune.model.base_shape import refuse_too_few_positions
from atomtune.model.experts import count_of, experts_of
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.fused_layers import fuse_for_a_run
from atomtune.model.listed_modules import list_modules
from atomtune.model.load import BaseSpec, device_in_use, dtype_name, load_base, resolve_dtype
from atomtune.model.lora_targets import ALL_LINEAR, all_linear, match_targets
from atomtune.model.memory import ActivationMemory, free_bytes
from atomtune.model.recompute import recomputable_layers
from atomtune.model.step_graphs import GpuRecorder, StepGraphs
from atomtune.train.arguments import CHECKPOINTING
from atomtune.train.checkpoint.start import Fresh, FromWeights, Resumed
from atomtune.train.ranks import is_sharded
from atomtune.train.run_context import RunContext

#: Frozen layers are listed with their share of the weights if it is at least this large.
_WORTH_SAYING = 0.01


def device_of(args: TrainingArguments) -> torch.device:
    """The device on which a run computes."""
    return torch.device("cpu") if args.use_cpu else device_in_use()


def dtype_of(run: RunContext, *, notice: Callable[[str], None] = lambda text: None) -> torch.dtype:
    """The dtype of the base's weights in this run. `notice` is passed once, where the weights are loaded."""
    trainer = run.settings.trainer
    return resolve_dtype(
        run.settings.model.dtype,
        device_of(run.args),
        fp16=bool(trainer.get("fp16")),
        bf16=bool(trainer.get("bf16")),
        notice=notice,
    )


def load_model(run: RunContext, *, longest_tokens: int) -> Any:
    """The base with its adapter, either new or filled from the weights with which this run starts.

    longest_tokens  of the longest example; the base must have that many positions
    Raises BadModel or BadSettings if the base, the adapter and the settings do not fit together.
    """
    device, dtype = device_of(run.args), dtype_of(run, notice=run.console.notice)
    _say_what_is_not_used(run, device, dtype)
    run.console.say(translated(f"loading {run.settings.model.model_path} …"))
    base = load_base(BaseSpec(**run.settings.model.base(), dtype=dtype, device=device))
    run.record.update(auto_class=auto_class(base.config).__name__)
    refuse_too_few_positions(base.config, longest_tokens)
    model = _new_adapter(run, base) if isinstance(run.start, Fresh) else _adapter_of_start(run, base, run.start)
    refuse_unread(
        adapter_tensors(model),
        str(run.settings.model.model_path),
        trust_remote_code=run.settings.model.trust_remote_code,
    )
    _say_size(run, model, device, dtype)
    has_weights = not is_sharded(run.args)  # otherwise they are moved out of the layers between calls
    if has_weights and (left_out := left_out_by_peft(model)):
        run.console.notice(
            f"PEFT {peft.__version__} itself leaves out {len(left_out):,} adapted layers of this model when it loads "
            f"the adapter, first {left_out[0]}. atomtune's own commands have them; for other programs, merge the "
            "adapter or name other layers with --lora_targets."
        )
    if why := why_not_merged(model):
        run.console.notice(
            f"this adapter cannot be merged:\n{why}\nchat, serve and evaluate load it together with its base; "
            "--lora_targets names other layers."
        )
    if has_weights:
        list_modules(model)
    return model


def _say_what_is_not_used(run: RunContext, device: torch.device, dtype: torch.dtype) -> None:
    model = run.settings.model
    # With --dtype auto, the device decided, and a notice has said so.
    is_set = run.settings.trainer.get("bf16") and model.dtype != "auto"
    if device.type == "cpu" and is_set and dtype is not torch.bfloat16:
        run.console.notice(f"--bf16 is not used: on a CPU --dtype {model.dtype} alone decides.")
    if device.type == "cuda" and torch.cuda.device_count() > 1 and run.args.world_size == 1 and not model.device_map:
        gpus = torch.cuda.device_count()
        run.console.notice(
            f"this machine has {gpus} GPUs and this process uses one. To use all of them: "
            f"torchrun --nproc_per_node {gpus} -m atomtune train …"
        )


def _new_adapter(run: RunContext, base: Any) -> Any:
    lora = LoraSpec(**run.settings.lora.lora())
    counts = match_targets(base, lora.targets)
    tensors = expert_tensors(base, lora.targets) if lora.experts else []
    if lora.experts:
        counts |= Counter(_short_name(name) for name in sorted([*tensors, *experts_of(base).layers]))
    names = ", ".join(f"{name} ({count})" for name, count in counts.items())
    run.console.say(f"LoRA of rank {lora.rank} on {sum(counts.values()):,} layers: {names}.")
    if tensors and lora.dropout:
        # PEFT adds B A to the experts' weights before they are used, so LoRA has no input of its own for dropout.
        run.console.say(f"--lora_dropout {lora.dropout:g} does not apply to the experts; the other layers have it.")
    _say_frozen(run, base, lora)
    _refuse_too_large(base, lora, counts)
    return new_adapter(base, lora)


def _refuse_too_large(base: Any, lora: LoraSpec, names: Collection[str]) -> None:
    """Raise BadSettings if the adapter's matrices alone would take more memory than is free."""
    layers = [layer for name, layer in base.named_modules() if name.rpartition(".")[2] in names]
    sides = sum(getattr(layer, "in_features", 0) + getattr(layer, "out_features", 0) for layer in layers)
    needed, free = sides * lora.rank * torch.float32.itemsize, free_bytes(base.device)
    if free is not None and needed > free:
        raise BadSettings(
            [
                f"--lora_rank {lora.rank:,}: the adapter alone would take {needed / 1e9:,.0f} GB, and "
                f"{free / 1e9:,.0f} GB are free. Ranks of 4 to 64 are usual."
            ]
        )


def _short_name(name: str) -> str:
    """`layers.0.mlp.experts.up_proj` → `experts.up_proj`, `layers.0.mlp.up_proj.weight` → `up_proj`"""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:] if "experts" in parts[-2:] else parts[-1:])


def _say_frozen(run: RunContext, base: Any, lora: LoraSpec) -> None:
    """Print which layers all-linear leaves out, one line per reason, and whether experts stay frozen."""
    weights = {f".{name}.": count_of(weight) for name, weight in base.named_parameters()}
    reached = all_linear(base)
    adapted = {name.rpartition(".")[2] for name in reached.shared} if lora.experts else set()
    by_reason: dict[str, list[str]] = {}
    for name, why in reached.left_out.items() if ALL_LINEAR in lora.targets else ():
        if name not in adapted:
            by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        inside = [weight for weight in weights if any(f".{name}." in weight for name in names)]
        share = sum(weights[weight] for weight in inside) / sum(weights.values())
        listed = ", ".join(names)
        if share >= _WORTH_SAYING:
            run.console.say(f"These stay frozen ({why}): {listed} ({100 * share:.0f} % of the weights).")
        else:
            run.console.say(f"These stay frozen ({why}): {listed}.")
    experts = experts_of(base)
    if experts and not lora.experts:
        share = experts.share
        run.console.say(f"The experts stay frozen: {100 * share:.0f} % of the weights; --lora_experts adapts them.")


def _adapter_of_start(run: RunContext, base: Any, start: Resumed | FromWeights) -> Any:
    """The adapter of a checkpoint or weights file. Raises BadModel if it was trained on another base."""
    path = start.checkpoint if isinstance(start, Resumed) else start.file
    metadata = AdapterMetadata.load(path if path.is_dir() else path.parent)
    refuse_other_base(
        str(run.settings.model.model_path),
        metadata.base if metadata else "",
        anyway=isinstance(start, FromWeights) or run.settings.run.resume_anyway,
        notice=run.console.notice,
    )
    file = adapter_file(path)
    if file is None:
        raise BadSettings([f"{path}: no adapter weights in this checkpoint."])
    return start_from_weights(base, file, LoraSpec(**run.settings.lora.lora()), notice=run.console.notice)


def _say_size(run: RunContext, model: peft.PeftModel, device: torch.device, dtype: torch.dtype) -> None:
    settings = run.settings.model
    trainable, total = model.get_nb_trainable_parameters()
    number_format = dtype_name(dtype) + (f", {settings.quantize}" if settings.quantize else "")
    run.console.say(
        f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %), the base in "
        f"{number_format} on {device}."
    )


def fuse(run: RunContext, model: Any) -> None:
    """Let the model compute in fewer, larger steps; print whether it uses Liger's kernels, or how to get them."""
    args = run.args
    circumstances = liger_circumstances(run.settings.trainer, args)
    if circumstances.hint:
        run.console.say(circumstances.hint)
    if circumstances.wanted:  # under FSDP and DeepSpeed the Trainer applies them
        args.liger_kernel_config = liger.kernel_config(args.liger_kernel_config)
    used = fuse_for_a_run(model, circumstances, say=run.console.say)
    if circumstances.tries:
        args.use_liger_kernel = False  # they are applied already; the Trainer would apply them again
    run.record.update(liger_kernels=used or bool(args.use_liger_kernel))


def liger_circumstances(trainer: Mapping[str, Any], args: TrainingArguments) -> liger.Circumstances:
    """The circumstances of a run; `trainer` has the settings as the user gave them, `args` as the Trainer has them."""
    return liger.Circumstances(
        wanted=trainer.get("use_liger_kernel"),
        device=device_of(args).type,
        is_installed=liger.is_installed(),
        is_sharded=is_sharded(args),
        config=args.liger_kernel_config,
    )


def keep_or_recompute(run: RunContext, model: Any, *, layout: Layout, heaviest_tokens: int) -> float:
    """Decide how many layers recompute their activations, print why, and return their share (0 to 1).

    heaviest_tokens  computed tokens of the heaviest step expected in this layout
    """
    args, choice = run.args, run.settings.run.gradient_checkpointing
    share = 1.0 if getattr(args, CHECKPOINTING) or choice == "true" else 0.0
    if not share and choice == "auto":
        memory = activation_memory(run, model, layout=layout, tokens=heaviest_tokens)
        share = _share_to_recompute(run, model, memory)
        if share == 1:
            run.console.notice(f"activations are recomputed: {memory} (--gradient_checkpointing false keeps them).")
        elif share:
            run.console.notice(
                f"activations of {memory.layers_to_recompute} of {memory.layers} layers are recomputed: {memory} "
                "(--gradient_checkpointing false keeps them all)."
            )
        elif device_of(args).type == "cuda":
            run.console.say(f"activations are kept: {memory}.")
    setattr(args, CHECKPOINTING, share > 0)
    run.record.update(activations_recomputed=share > 0, share_of_layers_recomputed=round(share, 3))
    if share:
        kwargs = getattr(args, f"{CHECKPOINTING}_kwargs") or {}
        setattr(args, f"{CHECKPOINTING}_kwargs", {"use_reentrant": False, **kwargs})
        model.enable_input_require_grads()
    return share


def _share_to_recompute(run: RunContext, model: Any, memory: ActivationMemory) -> float:
    """The share of layers to recompute; 0 or 1 if they cannot be told apart, or are wrapped for several GPUs."""
    number = memory.layers_to_recompute
    if is_sharded(run.args) or len(recomputable_layers(model)) != memory.layers:
        return float(number > 0)
    return number / max(memory.layers, 1)


def activation_memory(run: RunContext, model: Any, *, layout: Layout, tokens: int) -> ActivationMemory:
    """The memory that a step with this many computed tokens needs for its backward pass, and the free memory."""
    return ActivationMemory.of(
        model.config,
        tokens=tokens,
        element_bytes=dtype_of(run).itemsize,
        dropout=run.settings.lora.lora_dropout > 0,
        dora=run.settings.lora.use_dora,
        in_rows=layout != "padded",
        device=device_of(run.args),
    )


def step_graphs(run: RunContext, model: Any) -> StepGraphs | None:
    """The object that replays small steps as CUDA graphs; None if graphs would not help or cannot be recorded."""
    args, device = run.args, device_of(run.args)
    recomputes = getattr(args, CHECKPOINTING)  # it reads the random generator's state, which cannot be recorded
    if not run.settings.run.cuda_graphs or device.type != "cuda" or args.world_size > 1 or recomputes:
        return None
    if is_sharded(args) or run.settings.model.device_map:
        return None
    if args.mixed_precision == "fp16":  # its loss scale has to be in a backward pass, and a recording's is over
        return None
    return StepGraphs(
        model,
        recorder=GpuRecorder(device),
        label_smoothing=args.label_smoothing_factor,
        notice=run.console.notice,
    )
