"""File schemas: valid keys and values in the JSON files of a model, a tokenizer, an adapter and a run's state.

Only keys that many architectures share are listed, with their valid ranges; transformers' own config classes check the
types of the others.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from atomtune.choices import LARGEST_RANK
from atomtune.model.json_files import JsonFile

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
#: head_dim may be 0: GLM-5 Next's keys are latent, and its heads have no others.
SizeOrNone = Annotated[int, Field(ge=0, le=2**31 - 1)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
#: -1 means "none" in some published configs.
TokenId = Annotated[int, Field(ge=-1, le=2**31 - 1)]
TokenIds = TokenId | list[TokenId] | None
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1, le=LARGEST_RANK)]
#: Scale of an adapter. At 1e30 all answers are one repeated token.
Factor = Annotated[float, Field(gt=0, le=1e6)]
Count = Annotated[int, Field(ge=0, le=2**53)]
Flag = bool | None
Names = list[str] | None
Values = dict[str, Any]


class Rope(JsonFile):
    """Parameters of rotary embeddings. If they differ by kind of layer, there is one such object per kind."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None
    partial_rotary_factor: Share | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    short_factor: list[Positive] | None = None
    long_factor: list[Positive] | None = None


class ModelConfig(JsonFile):
    """config.json. Sizes are later compared with the weight files (weight_sizes.py)."""

    model_type: str | None = None
    architectures: Names = None
    auto_map: Values | None = None
    dtype: str | Values | None = None
    torch_dtype: str | Values | None = None
    text_config: "ModelConfig | None" = None
    vision_config: Values | None = None
    audio_config: Values | None = None
    quantization_config: Values | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None

    vocab_size: Size | None = None
    hidden_size: Size | None = None
    n_embd: Size | None = None
    d_model: Size | None = None
    intermediate_size: Size | list[Size] | None = None
    moe_intermediate_size: Size | list[Size] | None = None
    n_inner: Size | None = None
    head_dim: SizeOrNone | None = None
    num_attention_heads: Size | list[Size] | None = None
    num_key_value_heads: Size | list[Size] | None = None
    n_head: Size | None = None
    num_hidden_layers: Layers | None = None
    n_layer: Layers | None = None
    n_layers: Layers | None = None
    num_layers: Layers | None = None
    # transformers' config classes build lists of these lengths, so a huge number would exhaust memory.
    num_mtp_layers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    num_nextn_predict_layers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    num_residual_layers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    num_labels: Annotated[int, Field(ge=0, le=2**20)] | None = None
    num_experts: Annotated[int, Field(ge=0, le=2**20)] | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=2**20)] | None = None
    n_routed_experts: Annotated[int, Field(ge=0, le=2**20)] | None = None
    max_position_embeddings: Size | None = None
    n_positions: Size | None = None
    sliding_window: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    layer_types: Names = None

    rms_norm_eps: Share | None = None
    layer_norm_eps: Share | None = None
    layer_norm_epsilon: Share | None = None
    norm_eps: Share | None = None
    initializer_range: NotNegative | None = None
    attention_dropout: Share | None = None
    hidden_dropout: Share | None = None
    embd_pdrop: Share | None = None
    attn_pdrop: Share | None = None
    resid_pdrop: Share | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Share | None = None
    logits_scaling: Positive | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    activation_function: str | None = None
    tie_word_embeddings: Flag = None
    attention_bias: Flag = None
    mlp_bias: Flag = None
    use_cache: Flag = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None


class GenerationConfig(JsonFile):
    """generation_config.json."""

    max_length: Annotated[int, Field(ge=0)] | None = None
    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    min_length: Annotated[int, Field(ge=0)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0)] | None = None
    max_time: Positive | None = None
    do_sample: Flag = None
    use_cache: Flag = None
    early_stopping: bool | str | None = None
    num_beams: Annotated[int, Field(ge=1, le=10_000)] | None = None
    num_return_sequences: Annotated[int, Field(ge=1, le=10_000)] | None = None
    temperature: NotNegative | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    typical_p: Share | None = None
    epsilon_cutoff: Share | None = None
    eta_cutoff: Share | None = None
    repetition_penalty: Positive | None = None
    encoder_repetition_penalty: Positive | None = None
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] | None = None
    bad_words_ids: list[list[TokenId]] | None = None
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    forced_bos_token_id: TokenIds = None
    forced_eos_token_id: TokenIds = None
    cache_implementation: str | None = None
    output_attentions: Flag = None
    output_hidden_states: Flag = None
    return_dict_in_generate: Flag = None


class SpecialToken(JsonFile):
    """A special token with its rules for whitespace and matching."""

    content: str
    lstrip: Flag = None
    rstrip: Flag = None
    normalized: Flag = None
    single_word: Flag = None
    special: Flag = None


Token = str | SpecialToken | None


class SpecialTokens(JsonFile):
    """special_tokens_map.json, and the same keys in tokenizer_config.json."""

    bos_token: Token = None
    eos_token: Token = None
    unk_token: Token = None
    pad_token: Token = None
    sep_token: Token = None
    cls_token: Token = None
    mask_token: Token = None
    additional_special_tokens: list[Token] | None = None


class NamedTemplate(JsonFile):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(SpecialTokens):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    model_max_length: Positive | None = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_bos_token: Flag = None
    add_eos_token: Flag = None
    add_prefix_space: Flag = None
    clean_up_tokenization_spaces: Flag = None
    legacy: Flag = None
    added_tokens_decoder: dict[str, SpecialToken] | None = None
    extra_special_tokens: Values | list[Token] | None = None
    model_input_names: Names = None
    auto_map: Values | None = None


class AdapterConfig(JsonFile):
    """adapter_config.json, as PEFT writes it."""

    peft_type: str
    base_model_name_or_path: Annotated[str, Field(max_length=1000)] | None = None
    task_type: str | None = None
    inference_mode: Flag = None
    r: Rank | None = None
    lora_alpha: Factor | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: Names = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Factor] | None = None
    target_parameters: Names = None
    bias: Literal["none", "all", "lora_only"] | None = None
    fan_in_fan_out: Flag = None
    use_rslora: Flag = None
    use_dora: Flag = None
    use_qalora: Flag = None
    qalora_group_size: Size | None = None
    lora_bias: Flag = None
    ensure_weight_tying: Flag = None
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^[a-z]\w*$")] | None = None
    layer_replication: list[list[int]] | None = None
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] | None = None
    alora_invocation_tokens: list[TokenId] | None = None
    megatron_core: str | None = None
    megatron_config: Values | None = None
    loftq_config: Values | None = None
    eva_config: Values | None = None
    corda_config: Values | None = None
    lora_ga_config: Values | None = None
    velora_config: Values | None = None
    monteclora_config: Values | None = None
    kasa_config: Values | None = None
    arrow_config: Values | None = None
    use_bdlora: Values | None = None
    runtime_config: Values | None = None


class LoraConfigFile(AdapterConfig):
    """adapter_config.json of a LoRA adapter."""

    r: Rank = 8
    lora_alpha: Factor = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class WeightIndex(JsonFile):
    """model.safetensors.index.json: which file holds each tensor."""

    weight_map: dict[str, str]
    metadata: Values | None = None


class RunSetting(JsonFile):
    """A setting of a run."""

    value: Any


class RunData(JsonFile):
    """Which records a run read."""

    sha256: str | None = None


class LossEntry(JsonFile):
    """A logged loss; null if it was not finite."""

    step: Count
    loss: float | None


class RunOutcome(JsonFile):
    """What a run's losses say, as far as other commands read it."""

    kept_step: Count | None = None


class RunRecordFile(JsonFile):
    """run.json, as far as other commands read it."""

    loss_history: list[LossEntry] | None = None
    eval_history: list[LossEntry] | None = None
    eval_step: Count | None = None
    outcome: RunOutcome | None = None
    settings: dict[str, RunSetting] | None = None
    records_held_out: list[str] | None = None
    data: RunData | None = None
    evaluation: RunData | None = None
    eval_records_like_trained_ones: list[str] | None = None
    exported_for: str | None = None


class Control(JsonFile):
    """The Trainer's control flags (stop, save, evaluate, log)."""

    args: dict[str, bool] | None = None
    attributes: dict[str, bool] | None = None


class WorkDone(JsonFile):
    """What atomtune's WorkCounter keeps across a resume."""

    tokens_computed: Count = 0
    tokens_padded: Count = 0
    examples: Count = 0
    seconds: NotNegative = 0.0
    skipped_steps: Count = 0
    steps_without_gradient: Count = 0
    owes_evaluation: bool = False


class Counter(JsonFile):
    """WorkCounter's entry among the callbacks."""

    attributes: WorkDone
    args: Values | None = None


class Callbacks(JsonFile):
    """State of callbacks that the Trainer saves with a checkpoint."""

    TrainerControl: Control | None = None
    WorkCounter: Counter | None = None


class LogEntry(JsonFile):
    """An entry of the Trainer's log, at one step."""

    step: Count
    loss: float | None = None
    eval_loss: float | None = None


class TrainerState(JsonFile):
    """trainer_state.json of a checkpoint."""

    global_step: Count
    max_steps: Annotated[int, Field(ge=-1, le=2**53)] | None = None
    epoch: NotNegative | None = None
    num_train_epochs: NotNegative | None = None
    train_batch_size: Annotated[int, Field(ge=1)] | None = None
    logging_steps: NotNegative | None = None
    eval_steps: NotNegative | None = None
    save_steps: NotNegative | None = None
    log_history: list[LogEntry] | None = None
    best_metric: Annotated[float, Field(allow_inf_nan=False)] | None = None
    best_global_step: Count | None = None
    best_model_checkpoint: str | None = None
    num_input_tokens_seen: NotNegative | None = None
    total_flos: NotNegative | None = None
    stateful_callbacks: Callbacks | None = None
    is_world_process_zero: Flag = None
    is_local_process_zero: Flag = None
    is_hyper_param_search: Flag = None
