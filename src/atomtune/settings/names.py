"""Names: what settings are called in other tools and older versions, and what they are called here."""

import difflib
from collections.abc import Collection, Mapping, Sequence

from atomtune.language import message


def _by_name(lists: Mapping[str, str]) -> dict[str, str]:
    """Inverted: `{"lora_rank": "lora_r rank"}` → lora_r → lora_rank, rank → lora_rank."""
    turned = {}
    for meaning, names in lists.items():
        for name in names.split():
            turned[name] = meaning
    return turned


#: Other names of a setting whose values have the same form: translated, with a notice.
SYNONYMS = _by_name(
    {
        "learning_rate": "lr learn_rate",
        "num_train_epochs": "epochs epoch num_epochs n_epochs train_epochs",
        "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_device_batch_size bs",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "gradient_accumulation_steps": "grad_accum gradient_accumulation grad_accum_steps accumulation_steps",
        "model_path": "model model_name model_id base_model model_name_or_path pretrained_model_name_or_path "
        "base_model_name_or_path",
        "dataset_path": "data dataset datasets data_path data_file data_files train_file train_data train_path "
        "dataset_name train_dataset",
        "eval_path": "eval_data eval_file eval_dataset validation_file val_data test_datasets",
        "eval_size": "val_size val_set_size test_size validation_split",
        "lora_rank": "lora_r rank r",
        "lora_alpha": "alpha",
        "use_rslora": "rslora peft_use_rslora",
        "use_dora": "dora peft_use_dora",
        "lora_targets": "target_modules lora_target_modules lora_target lora_modules",
        "max_seq_length": "max_length max_len max_seq_len seq_len seq_length sequence_len cutoff_len model_max_length",
        "optim": "optimizer",
        "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
        "warmup_steps": "warmup num_warmup_steps",
        "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm",
        "weight_decay": "wd",
        "adam_beta1": "beta1",
        "adam_beta2": "beta2",
        "output_dir": "output out out_dir output_path output_folder save_dir export_dir",
        "template": "chat_template prompt_template",
        "dtype": "torch_dtype",
        "seed": "random_seed random_state",
        "early_stopping_patience": "early_stopping early_stopping_steps patience",
        "logging_steps": "log_steps log_every log_interval",
        "save_steps": "save_every save_interval",
        "eval_steps": "eval_every eval_interval",
        "shuffle_buffer": "buffer_size shuffle_buffer_size",
        "hub_token": "hf_hub_token hf_token",
        "adapter_path": "adapter adapter_name_or_path adapter_dir lora_path peft_model peft_model_id",
        "for_class": "for",
        "system": "system_prompt",
        "max_new_tokens": "max_tokens max_new_token num_predict",
    }
)

#: Other names of a value.
VALUE_SYNONYMS = {
    ("lora_targets", "all"): "all-linear",
    ("dtype", "bf16"): "bfloat16",
    ("dtype", "fp16"): "float16",
    ("dtype", "half"): "float16",
    ("dtype", "fp32"): "float32",
    ("dtype", "float"): "float32",
}

#: Values of other tools that the setting with this name does not have, and what to do instead.
VALUES_ELSEWHERE = {
    ("bf16", "auto"): "Leave it out: --dtype auto uses bfloat16 if the device computes in it",
    ("fp16", "auto"): "Leave it out: --dtype auto uses bfloat16 if the device computes in it",
    # The packaged converter and llama.cpp cannot write these; Ollama contains llama.cpp's own quantizer.
    **{
        ("quantize", kind.lower()): f"Export bf16, then `ollama create NAME --quantize {kind} -f Modelfile` packs it"
        for kind in ("q2_K", "q3_K_S", "q3_K_M", "q3_K_L", "q4_0", "q4_K_S", "q4_K_M", "q5_K_S", "q5_K_M", "q6_K")
    },
}

#: Names from older transformers or the tutorial, and what to write now.
RENAMED = {
    "warmup_ratio": "--warmup_steps with a number below 1",
    "group_by_length": "--train_sampling_strategy group_by_length",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "no_cuda": "--use_cpu",
    "evaluation_strategy": "--eval_strategy",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "check_point": "--checkpoint",
}

#: Names of LLaMA-Factory, Axolotl, TRL and Unsloth without an equivalent here, and what to do instead.
ELSEWHERE = _by_name(
    {
        "leave it out: this is always supervised fine-tuning": "stage rl task_type lora_task_type",
        "leave it out: the adapter is always LoRA": "finetuning_type use_peft peft_type",
        "leave it out: the adapter is always LoRA; for QLoRA use --quantize nf4": "adapter peft_method",
        "if true, use --quantize nf4; else leave it out": "load_in_4bit",
        "if true, use --quantize int8; else leave it out": "load_in_8bit",
        "use --quantize nf4 for 4 bits, --quantize int8 for 8": "quantization_bit quantization bits",
        "leave it out: --quantize nf4 includes it": "double_quantization quantization_type bnb_4bit_quant_type "
        "bnb_4bit_compute_dtype bnb_4bit_use_double_quant quantization_method",
        "leave it out: all linear layers are the default; --lora_targets names others": "lora_target_linear",
        "use --layout packed, or leave it out: --layout auto finds the cheapest": "packing sample_packing neat_packing "
        "eval_packing eval_sample_packing packing_strategy",
        "leave it out: batches are padded only as far as needed": "pad_to_sequence_len pad_to_multiple_of padding_free",
        "leave it out: only answers are learned": "train_on_inputs train_on_prompt completion_only_loss "
        "assistant_only_loss",
        "use --learn last": "mask_history",
        "leave it out: the attention is chosen for model and layout": "flash_attention flash_attn attn_implementation "
        "sdp_attention xformers_attention s2_attention eager_attention use_flash_attn",
        "leave it out: it is read from the model's own files": "model_type tokenizer_type model_revision "
        "is_llama_derived_model tokenizer_name use_fast_tokenizer tokenizer_use_fast",
        "leave it out: settings are always checked": "strict",
        "leave it out: reading uses all processor cores": "preprocessing_num_workers dataset_processes "
        "dataset_num_proc",
        "leave it out: encoded records are cached, and encoded again when file or settings change": "overwrite_cache "
        "dataset_prepared_path tokenized_path preprocessing_batch_size",
        "leave it out: --dataset_path takes the file itself": "dataset_dir media_dir",
        "leave it out: loss.png is always drawn": "plot_loss",
        "leave it out: adapters are always saved as safetensors": "save_safetensors",
        "there is no such setting; make a smaller file": "max_samples",
        message("use --mix"): "interleave_probs mix_strategy",
        "use --streaming with --max_steps": "pretraining_dataset",
        "use --eval_strategy epoch, or --eval_steps with a share of all steps, for example 0.1": "evals_per_epoch",
        "use --save_strategy epoch, or --save_steps with a share of all steps, for example 0.1": "saves_per_epoch",
        "use --continue_training --checkpoint FOLDER": "adapter_name_or_path lora_model_dir",
        "removed; use --resume, or another --output_dir": "overwrite_output_dir",
        message("use --resume"): "auto_resume_from_checkpoints",
        message("use --gradient_checkpointing"): "use_gradient_checkpointing",
        message("use --use_liger_kernel"): "enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation",
        "use --report_to wandb and the environment variable WANDB_PROJECT": "wandb_project use_wandb",
        "use --report_to wandb and its environment variables": "wandb_entity wandb_watch wandb_log_model wandb_mode",
        message("use --run_name"): "wandb_name wandb_run_id",
        "use --report_to swanlab": "use_swanlab swanlab_project swanlab_mode swanlab_run_name",
        "there is no such setting: control strings come from tokenizer and template": "special_tokens tokens "
        "added_tokens_overrides new_special_tokens add_special_tokens resize_vocab eos_token pad_token",
        "there is no such setting: LoRA is trained plain, or with --use_rslora or --use_dora": "pissa_init "
        "loraplus_lr_ratio loraplus_lr_embedding lora_modules_to_save additional_target "
        "peft_layers_to_transform lora_fan_in_fan_out bias init_lora_weights",
        "there is no such setting; leave it out": "use_unsloth use_unsloth_gc cut_cross_entropy lora_mlp_kernel "
        "lora_qkv_kernel lora_o_kernel rope_scaling freeze_trainable_layers plugins "
        "dataset_text_field model_init_kwargs shuffle_merged_datasets",
        "use --overlength and --max_seq_length": "excess_length_strategy truncation_side",
        "pass the file as the first argument: atomtune train run.yaml": "config_file yaml",
        "use `atomtune merge`": "export_size export_device export_legacy_format merge_lora",
    }
)


def synonym(name: str, types: Collection[str]) -> str | None:
    """The setting of this command that other tools call `name`; None if there is none."""
    ours = SYNONYMS.get(name)
    return ours if ours in types else None


def value_advice(name: str, value: object, *, in_yaml: bool, choices: Sequence[str] = ()) -> str:
    """Advice about a value that a setting does not accept, for a message; "" if there is none.

    It may be a value of another tool's setting with this name, or one of these choices misspelled.
    """
    text = VALUES_ELSEWHERE.get((name, str(value).lower()), "")
    if text:
        return f" {text.replace(' --', ' ') if in_yaml else text}."
    similar = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.7)
    return f" Did you mean {similar[0]}?" if similar else ""


def advice(name: str, types: Mapping[str, object], *, in_yaml: bool) -> str:
    """Advice about a name that is not a setting of this command."""
    if name in RENAMED:
        text = f"removed; use {RENAMED[name]}."
    elif name in ELSEWHERE and "dataset_path" in types:
        text = f"{ELSEWHERE[name]}."
    else:
        similar = difflib.get_close_matches(name, types, n=1, cutoff=0.6)
        text = f"unknown. Did you mean --{similar[0]}?" if similar else "unknown. `--help all` lists every setting."
    return text.replace(" --", " ") if in_yaml else text
