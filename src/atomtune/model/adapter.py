"""Adapter: LoRA layers on a base, created new, filled from a weights file, or loaded to generate answers.

Built on PEFT. LoRA: Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; DoRA: Liu et al.
2024, arXiv 2402.09353.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from atomtune.choices import ADAPTER_CONFIG
from atomtune.errors import BadModel, BadSettings, RunFailed, listing
from atomtune.model.adapter_folder import (
    PATTERNS,
    WEIGHTS,
    adapter_config,
    adapter_file,
    read_weights,
    refuse_whole_model,
)
from atomtune.model.adapter_keys import module_of, names_in, with_new_names
from atomtune.model.causal_lm import CausalLM
from atomtune.model.experts import endings, experts_of
from atomtune.model.load_errors import explained
from atomtune.model.lora_targets import (
    ALL_LINEAR,
    adapted_by,
    all_linear,
    for_text,
    matched,
    refuse_endless_patterns,
    shortest,
)
from atomtune.model.plain_lora import plain_lora

#: Dtypes that adapter weights may have; torch has no arithmetic for the 8-bit ones.
_OF_ADAPTERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Attribute of a model that keeps the base's own biases while an adapter's trained biases replace them.
_BIASES_OF_BASE = "biases_of_base"


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Size, place and kind of a LoRA adapter, which adds (alpha / rank) B A to each adapted matrix."""

    rank: int
    alpha: float
    dropout: float
    targets: Sequence[str]
    experts: bool = False  # also adapt the experts of a mixture-of-experts model
    rslora: bool = False  # alpha / √rank in place of alpha / rank
    dora: bool = False  # also learn the length of each row of the adapted matrices


def new_adapter(base: CausalLM, lora: LoraSpec) -> PeftModel:
    """Wrap the base in a new LoRA adapter. B starts at zero, so the model still answers like the base.

    Raises BadSettings if PEFT cannot adapt a target, or if lora.experts is set and the base has no experts.
    """
    has_all = ALL_LINEAR in lora.targets
    targets = shortest(base, adapted_by(base, lora.targets)) if has_all else for_text(base, lora.targets)
    tensors: Sequence[str] = ()
    if lora.experts:
        targets = [*targets, *experts_of(base).layers]
        tensors = expert_tensors(base, lora.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0 if tensors else lora.dropout,
        target_modules=list(targets),
        target_parameters=endings(base, tensors) if tensors else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:  # for example a norm or a whole attention block
        raise BadSettings([f"--lora_targets: {error}"]) from error
    if tensors:
        _drop_out_layers(model, lora.dropout)
    return _ready_to_save(model)


def adapter_tensors(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names for saving, without the base's embedding and output matrices."""
    tensors: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return tensors


def _ready_to_save(model: PeftModel) -> PeftModel:
    """Make the model save only its adapter, with the absolute path of its base, so that any program finds the base.

    If the output matrix has an adapter, PEFT would save that matrix too: a gigabyte per checkpoint, and vLLM refuses
    the file.
    """
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).absolute())
    return model


def has_expert_layers(model: PeftModel) -> bool:
    """Whether experts that are layers of their own have an adapter, so that some weights get no gradient in a step.

    An expert that no token of a step chose is not called then. Of experts in one tensor, all are in each step.
    """
    return any("experts" in name.split(".") for name, _ in _adapted_layers(model))


def _adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """The adapted layers and their names; an adapted tensor, as that of all experts, belongs to none."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            yield name, module


def expert_tensors(base: CausalLM, targets: Sequence[str]) -> list[str]:
    """Full names of the tensors that --lora_experts adapts.

    These are the experts' tensors and, with all-linear, the weights that PEFT can adapt only as tensors
    (`AllLinear.shared`). Raises BadSettings if the base has no experts.
    """
    experts = experts_of(base)
    if not experts:
        raise BadSettings(["--lora_experts: this model has no experts. Leave it out."])
    shared = all_linear(base).shared if ALL_LINEAR in targets else ()
    return [*experts.tensors, *(f"{name}.weight" for name in shared)]


def why_not_merged(model: PeftModel) -> str:
    """Why an adapter cannot be merged into its base's weights; "" if it can.

    Two layers may compute with one matrix (Zamba 2's shared blocks, an output layer tied to the embedding): what is
    merged for one of them would change the other too. A trained bias can be merged only into a bias that the base has.
    """
    holders: dict[int, list[str]] = {}
    for name, module in model.get_base_model().named_modules():
        for weight in module.parameters(recurse=False):
            holders.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    reasons = []
    for _, layer in _adapted_layers(model):
        names = holders[id(layer.get_base_layer().weight)]
        if len(names) > 1:
            reasons.append(f"{' and '.join(names)} share one matrix")
        if any(layer.lora_bias.values()) and layer.get_base_layer().bias is None:
            reasons.append(f"{names[0]} has a trained bias (lora_bias), but none in the base")
    return listing(list(dict.fromkeys(reasons)), 3)


def _drop_out_layers(model: PeftModel, dropout: float) -> None:
    """Add dropout to the layers that support it, because PEFT's own dropout fails for an adapter with adapted tensors.

    It is not written to the saved config: generation needs no dropout, and PEFT would refuse to load such a config.
    """
    if dropout > 0:
        for _, layer in _adapted_layers(model):
            for adapter in layer.lora_dropout:
                layer.lora_dropout[adapter] = nn.Dropout(dropout)


def start_from_weights(base: CausalLM, file: Path, lora: LoraSpec, *, notice: Callable[[str], None]) -> PeftModel:
    """Create a trainable adapter and fill it from a weights file.

    If an adapter_config.json lies beside the file, it decides the adapter's shape, and each of the run's settings that
    differs gets a notice. Without one (checkpoints of the self-llm tutorial), rank and targets are read from the
    tensors, and alpha and dropout are the run's settings.

    Raises BadModel if the adapter is not LoRA or does not fit the base.
    """
    weights = read_weights(file)
    if (file.parent / ADAPTER_CONFIG).is_file():
        config = adapter_config(file.parent)
        if not isinstance(config, LoraConfig):
            raise BadModel(f"{file.parent}: its adapter is not LoRA, so it cannot be trained further here.")
        config.inference_mode = False
        config.base_model_name_or_path = None  # otherwise PEFT warns if the base has moved
        refuse_endless_patterns(config, base, file.parent / ADAPTER_CONFIG)
        weights = _named_as_in(base, weights, config)
        _notice_unused(config, base, lora, notice=notice)
        init, rank = config.init_lora_weights, config.r
        weights = plain_lora(base, config, weights, file.parent / ADAPTER_CONFIG)
        if config.r != rank:
            notice(
                f"the checkpoint's adapter was initialised with {init}. Its training continues as plain LoRA of rank "
                f"{config.r}, which leaves the base's weights as they are."
            )
        with explained(str(file.parent), "adapter", files=ADAPTER_CONFIG):
            model = get_peft_model(base, config)
        _keep_biases_of_base(model)
        if config.target_parameters:
            _drop_out_layers(model, lora.dropout)
    else:
        weights = _named_as_in(base, weights)
        model = new_adapter(base, _spec_in(weights, file, base, lora, notice=notice))
    _fill(model, weights, file)
    return _ready_to_save(model)


def _spec_in(
    weights: Mapping[str, torch.Tensor],
    file: Path,
    base: CausalLM,
    lora: LoraSpec,
    *,
    notice: Callable[[str], None],
) -> LoraSpec:
    """The run's LoRA settings, with the tensors' rank and targets. Raises BadModel unless all have one rank."""
    ranks = {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name}  # A is [rank, inputs]
    if len(ranks) != 1:
        raise BadModel(f"{file}: holds no LoRA tensors of one rank (found ranks: {sorted(ranks) or 'none'}).")
    rank = ranks.pop()
    if rank != lora.rank:
        notice(f"{file.name} holds an adapter of rank {rank}. It is used instead of --lora_rank {lora.rank}.")
    modules = {module_of(name) for name in weights}
    return replace(
        lora,
        rank=rank,
        targets=shortest(base, modules),
        experts=False,
        dora=any("lora_magnitude_vector" in name for name in weights),
    )


def _named_as_in(
    base: CausalLM, weights: Mapping[str, torch.Tensor], config: PeftConfig | None = None
) -> dict[str, torch.Tensor]:
    """The tensors under the names that this base's class gives their layers; `config` is changed to these names too."""
    names = names_in(base, weights)
    modules = {module_of(old): module_of(new) for old, new in names.items() if old != new}
    targets = getattr(config, "target_modules", None)
    if config is not None and modules and targets is not None:
        # Full names are needed: q_proj alone would match the vision tower too. Adapted tensors are listed apart, in
        # target_parameters, by endings that match in both classes.
        tensors = tuple(f".{name}" for name in getattr(config, "target_parameters", None) or ())
        of_tensors = {name.rpartition(".")[0] for name, _ in base.named_parameters() if name.endswith(tensors)}
        config.target_modules = {name for name in modules.values() if name not in of_tensors}
        for patterns in PATTERNS:
            setattr(config, patterns, with_new_names(getattr(config, patterns, None) or {}, modules))
    return {names[name]: tensor for name, tensor in weights.items()}


def _notice_unused(config: LoraConfig, base: CausalLM, lora: LoraSpec, *, notice: Callable[[str], None]) -> None:
    """Give a notice for each setting of the command line that the checkpoint's own adapter overrides."""
    for name, setting, in_checkpoint in (
        ("rank", lora.rank, config.r),
        ("alpha", lora.alpha, config.lora_alpha),
        ("dropout", lora.dropout, config.lora_dropout),
    ):
        if name == "dropout" and config.target_parameters:
            continue  # dropout is the run's, because the config of adapted tensors has none
        if setting != in_checkpoint:
            notice(f"--lora_{name} {setting:g} is not used: the checkpoint's adapter has {in_checkpoint:g}.")
    if lora.experts != bool(config.target_parameters):
        state = "adapts them" if config.target_parameters else "leaves them as they are"
        notice(f"--lora_experts {str(lora.experts).lower()} is not used: the checkpoint's adapter {state}.")
    for name, setting, in_checkpoint in (
        ("use_rslora", lora.rslora, bool(config.use_rslora)),
        ("use_dora", lora.dora, bool(config.use_dora)),
    ):
        if setting != in_checkpoint:
            state = "has it" if in_checkpoint else "has none"
            notice(f"--{name} {str(setting).lower()} is not used: the checkpoint's adapter {state}.")
    if not isinstance(config.target_modules, set | list):  # a regex
        return
    adapted = matched(base, config.target_modules)
    if adapted != adapted_by(base, lora.targets):
        names = ",".join(shortest(base, adapted))
        notice(f"--lora_targets {','.join(lora.targets)} is not used: the checkpoint's adapter has {names}.")


def _fill(model: PeftModel, weights: Mapping[str, torch.Tensor], file: Path, adapter: str = "default") -> None:
    """Load every tensor of a file. Raises BadModel naming each one that does not fit, is missing or is not finite."""
    own = adapter_tensors(model, adapter)
    if weights.keys() - own.keys():  # PEFT also saves the whole output matrix if it has an adapter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own |= get_peft_model_state_dict(model, adapter_name=adapter)
    problems = [f"{name}: not in the file" for name in own.keys() - weights.keys()]
    problems += [f"{name}: not in this model" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        tensor, shape = weights[name], tuple(own[name].shape)
        if tuple(tensor.shape) != shape:
            problems.append(f"{name}: {tuple(tensor.shape)} in the file, {shape} in this model")
        elif fault := _fault(name, tensor):
            problems.append(fault)
    if problems:
        raise BadModel(f"{file} does not fit this base and these LoRA settings:\n{listing(sorted(problems))}")
    set_peft_model_state_dict(model, dict(weights), adapter_name=adapter)
    # PEFT renames tensors with the rules that transformers has for base files, and ignores tensors that then match
    # nothing. A rule may break a correct name: Laguna's rule for `shared_expert.` is a regex, and its dot also matches
    # the s of shared_experts. Copying by name fills what PEFT left out.
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)  # own[name] is the model's own memory, not a copy


def _fault(name: str, tensor: torch.Tensor) -> str:
    """Why this tensor cannot be part of any adapter; "" if it can."""
    if tensor.dtype not in _OF_ADAPTERS:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{name}: holds {dtype}; expected float32, bfloat16, float16 or float64"
    if not bool(torch.isfinite(tensor).all()):
        return f"{name}: holds values that are not finite (NaN or infinity)"
    return ""


def fill_again(model: PeftModel, folder: Path) -> None:
    """Overwrite the adapter's tensors with those of a checkpoint. Raises BadModel if one of them does not fit."""
    _fill(model, read_weights(folder / WEIGHTS), folder / WEIGHTS)


@torch.no_grad()
def left_out_by_peft(model: PeftModel) -> list[str]:
    """Names of the layers whose tensors PEFT itself, and so other programs too, would not load from this adapter."""
    own = adapter_tensors(model)
    before = {name: tensor.clone() for name, tensor in own.items()}
    others = {name: tensor + 1 for name, tensor in before.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model, dict(others))
    left_out = {module_of(name) for name, tensor in own.items() if not torch.equal(tensor, others[name])}
    for name, tensor in own.items():
        tensor.copy_(before[name])
    return sorted(left_out)


def load_trained(base: CausalLM, folder: Path) -> PeftModel:
    """Put a saved adapter on its base, in eval mode. Raises BadModel unless all tensors match."""
    file, config, weights = _saved(base, folder)
    with _fitting(folder):
        model = get_peft_model(base, config)
    _keep_biases_of_base(model)
    _fill(model, weights, file)
    return model.eval()


def load_another(model: PeftModel, folder: Path, name: str) -> None:
    """Load one more saved adapter into the model, under a name. Raises BadModel unless every tensor fits."""
    file, config, weights = _saved(model.get_base_model(), folder)
    with _fitting(folder):
        model.add_adapter(name, config)
    try:
        _keep_biases_of_base(model, name)
        _fill(model, weights, file, name)
    except KeyError as error:  # PEFT looks up the trained embedding rows under this adapter's name too
        raise BadModel(
            f"{folder} cannot be loaded together with an adapter that trained embeddings of single tokens: PEFT does "
            "not keep them apart. Load one at a time."
        ) from error


def _keep_biases_of_base(model: PeftModel, adapter: str = "default") -> None:
    """Remember the base's own biases before they are overwritten with those of an adapter."""
    weights = dict(model.named_parameters())
    kept = getattr(model, _BIASES_OF_BASE, {})
    kept[adapter] = []
    for name in adapter_tensors(model, adapter):
        if name.endswith(".bias") and ".lora_" not in name and name in weights:
            kept[adapter].append((weights[name], weights[name].detach().clone()))
    setattr(model, _BIASES_OF_BASE, kept)


@contextlib.contextmanager
def answering_as(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Within this context, this adapter is active; if it is None, the base without any adapter.

    PEFT leaves biases that another adapter trained (bias "all" or "lora_only") in the base. They are replaced here by
    the base's own.
    """
    kept = getattr(model, _BIASES_OF_BASE, {})
    others = [pair for name, pairs in kept.items() if name != adapter for pair in pairs]
    trained = [bias.data for bias, _ in others]
    for bias, of_base in others:
        bias.data = of_base
    try:
        with contextlib.ExitStack() as stack:
            if adapter is not None:
                model.set_adapter(adapter)
            else:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Careful, disabling adapter layers with bias")
                    stack.enter_context(model.disable_adapter())
            yield
    finally:
        for (bias, _), value in zip(others, trained, strict=True):
            bias.data = value


def refuse_damaged(folder: Path, *, is_computed: bool = True) -> None:
    """Raise BadModel if a saved adapter is unusable whatever its base is.

    To be checked before the base is loaded: a large base takes minutes to load, an adapter a second to read.
    is_computed  whether the adapter is going to be computed here, and not only copied
    """
    file = _weights_file(folder)
    if is_computed:
        adapter_config(folder)
    problems = [fault for name, tensor in read_weights(file).items() if (fault := _fault(name, tensor))]
    if problems:
        raise BadModel(f"{file} cannot be used:\n{listing(sorted(problems))}")


def _weights_file(folder: Path) -> Path:
    """The weights file of a saved adapter. Raises BadModel if the folder has none."""
    refuse_whole_model(folder)
    file = adapter_file(folder)
    if file is None:
        raise BadModel(
            f"{folder}: no adapter weights here ({WEIGHTS}). Copy the folder again from where it was trained."
        )
    return file


def _saved(base: CausalLM, folder: Path) -> tuple[Path, PeftConfig, dict[str, torch.Tensor]]:
    """A saved adapter: its weights file, its config, and its tensors under this base's names for their layers."""
    file = _weights_file(folder)
    config = adapter_config(folder)
    config.inference_mode = True
    config.base_model_name_or_path = None  # otherwise PEFT warns if the base has moved; the fingerprint decides
    refuse_endless_patterns(config, base, folder / ADAPTER_CONFIG)
    weights = _named_as_in(base, read_weights(file), config)
    return file, config, plain_lora(base, config, weights, folder / ADAPTER_CONFIG)


@contextlib.contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """While PEFT puts a saved adapter on a base in this context, errors become a BadModel."""
    with explained(str(folder), "adapter", files=ADAPTER_CONFIG):
        try:
            yield
        except ValueError as error:  # a target that matches no module of this base
            raise BadModel(f"{folder} does not fit this base: {str(error)[:1500]}") from error


def refuse_unlike(folder: Path, model: PeftModel) -> None:
    """Raise RunFailed unless the adapter in a folder equals the one in memory, bit for bit."""
    written, own = read_weights(folder / WEIGHTS), adapter_tensors(model)
    unlike = [name for name, tensor in own.items() if name not in written or not same_bits(written[name], tensor)]
    unlike += sorted(written.keys() - own.keys())
    if unlike:
        raise RunFailed(
            f"{folder / WEIGHTS} does not hold what was written (first difference: {unlike[0]}).\nThe disk may be "
            "failing; --resume continues from the last complete checkpoint."
        )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit: 0.0 differs from -0.0, and NaN equals itself."""
    b = b.detach().cpu()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # A tensor without dimensions cannot be viewed as bytes.
    bytes_a, bytes_b = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (a, b))
    return torch.equal(bytes_a, bytes_b)


def refuse_not_finite(model: nn.Module) -> None:
    """Raise RunFailed if a trained weight is not finite: one step that is too large does that, unseen in the loss."""
    for weight in model.parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise RunFailed("The adapter holds values that are not finite; it is not saved. Lower --learning_rate.")


def refuse_empty(model: PeftModel) -> None:
    """Raise RunFailed if a trained adapter changes nothing, because every B is still zero."""
    tensors = adapter_tensors(model)
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name):
        raise RunFailed(
            "The adapter is empty: after training every B matrix is still zero, so it would change nothing.\n"
            "Check that --max_steps is at least 1, --learning_rate is above 0 and the loss moved."
        )
