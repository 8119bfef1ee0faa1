"""Laws of the rehearsal: what would end a run late is found before any record is read or a folder is created."""

import sys

import pytest
from transformers import TrainingArguments

import atomtune.train.model  # noqa: F401  # `atomtune.train` is also a function
from atomtune.cli import main
from atomtune.errors import BadSettings
from atomtune.settings.read import read_train
from atomtune.train import arguments
from atomtune.train.rehearsal import check_last_batch, rehearse


@pytest.fixture
def refused(models, dialogues, tmp_path, capsys):
    """The message of `train` with these flags, after exit code 2 and with nothing written."""

    def run(*flags: str, family: str = "llama") -> str:
        out = tmp_path / "out"
        words = ["train", "--model_path", str(models(family)), "--dataset_path", str(dialogues)]
        assert main([*words, "--output_dir", str(out), "--max_steps", "1", *flags]) == 2
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert not out.exists() and "records" not in printed.out, "found out too late"
        return printed.err

    return run


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--torch_compile", "true"), ("--torch_compile: rows of many records cannot be compiled",)),
        (("--torch_compile_backend", "inductor"), ("--torch_compile:",)),
        (("--lr_scheduler_type", "cosine_with_min_lr"), ("--lr_scheduler_type cosine_with_min_lr:", "min_lr")),
        (
            ("--lr_scheduler_type", "warmup_stable_decay"),
            ("--lr_scheduler_type warmup_stable_decay:", "num_decay_steps"),
        ),
        (
            ("--lr_scheduler_type", "polynomial", "--learning_rate", "1e-9"),
            ("--lr_scheduler_type polynomial:", "must be smaller than initial lr"),
        ),
        (
            ("--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"min_lr": 1}'),
            ("--lr_scheduler_type cosine --lr_scheduler_kwargs", "min_lr"),
        ),
        (("--optim", "adamw_torch", "--optim_args", "nonsense"), ("--optim adamw_torch --optim_args 'nonsense'",)),
        (("--optim", "adafactor", "--optim_args", "x=1"), ("--optim_args 'x=1': --optim adafactor takes none of",)),
        (("--optim", "lomo"), ("--optim lomo:",)),
        (("--optim", "galore_adamw"), ("--optim galore_adamw:",)),
    ],
)
def test_unusable_optimizer_scheduler_and_compile_settings_are_refused(refused, flags, named):
    said = refused(*flags)
    assert all(part in said for part in named)


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'),
        ("--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'),
        ("--lr_scheduler_type", "inverse_sqrt", "--warmup_steps", "1"),
        ("--lr_scheduler_type", "constant"),
        ("--optim", "sgd"),
        ("--optim", "adafactor"),
    ],
)
def test_valid_optimizer_and_scheduler_settings_are_accepted(models, dialogues, tmp_path, flags):
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), *flags]) == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--report_to", "nope"), "nope is not supported"),
        (("--accelerator_config", "nope.json"), "nope.json"),
        (("--dataloader_persistent_workers", "true"), "needs --dataloader_num_workers of 1 or more"),
        (("--dataloader_multiprocessing_context", "fork"), "needs --dataloader_num_workers of 1 or more"),
        (("--eval_on_start", "true", "--eval_size", "0"), "--eval_on_start needs records to evaluate on"),
        (("--early_stopping_patience", "2", "--eval_size", "0"), "--early_stopping_patience 2 needs records"),
        (("--load_best_model_at_end", "true", "--eval_size", "0"), "--load_best_model_at_end needs records"),
        (("--report_to", "comet_ml"), "comet-ml"),  # a tracker that is not installed
        (("--dataloader_num_workers", "5000"), "--dataloader_num_workers 5,000: at most"),
        (("--fsdp", "full_shard"), "--fsdp is not used here"),
        (
            ("--neftune_noise_alpha", "5", "--layout", "tree"),
            "--layout tree would not be exact for this run: the noise",
        ),
        (
            ("--neftune_noise_alpha", "1e300"),
            "--neftune_noise_alpha '1e300': expected a number, at least 0 and at most",
        ),
        (("--lora_rank", "1000000"), "--lora_rank '1000000': expected a whole number, at least 1 and at most 65,536"),
    ],
)
def test_settings_that_would_fail_late_or_silently_are_refused_up_front(refused, flags, named):
    # Found by trying similar flags: five failed after the model was loaded, in a traceback, or were never reported.
    assert named in refused(*flags)


def test_an_adapter_that_is_larger_than_the_memory_is_refused(models, dialogues, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["atomtune.train.model"], "free_bytes", lambda device: 10**8)
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "1"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--lora_rank", "65536"]) == 2
    assert "--lora_rank 65,536: the adapter alone would take 0 GB" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--dataset_path", "--eval_path"])
def test_a_missing_data_file_leaves_no_output_folder(refused, flag):
    # Each wrong name once left a folder runs/NAME-1, runs/NAME-2, …
    assert "nowhere.jsonl: no such file" in refused(flag, "nowhere.jsonl")


def test_an_unknown_lora_target_is_refused_with_the_list_of_layers(refused):
    said = refused("--lora_targets", "W_pack")
    assert "no module is called W_pack" in said and "q_proj (2)" in said


@pytest.mark.parametrize(
    ("target", "kind"), [("embed_tokens", "Embedding"), ("mlp", "MLP"), ("input_layernorm", "RMSNorm")]
)
def test_a_lora_target_that_is_not_a_linear_layer_is_refused(refused, target, kind):
    said = refused("--lora_targets", "q_proj", target)
    assert f"--lora_targets {target}: " in said and kind in said and "q_proj (2)" in said


def test_an_output_layer_tied_to_the_embedding_is_refused_as_target(refused):
    said = refused("--lora_targets", "c_attn", "lm_head", family="gpt2")  # its weights are tied
    assert "--lora_targets lm_head: in this model the output layer and the embedding are one matrix" in said


def test_an_untied_output_layer_may_be_a_target(models, dialogues, tmp_path):
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "2"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--lora_targets", "q_proj", "lm_head"]) == 0


def test_a_batch_size_that_is_found_by_trying_is_refused(refused):
    said = refused("--auto_find_batch_size")
    assert "--auto_find_batch_size: it would repeat steps" in said and "--per_device_train_batch_size" in said


def test_skipping_steps_with_deepspeed_is_refused(models):
    settings = read_train(["--model_path", str(models("llama")), "--dataset_path", "x.jsonl", "--skip_nonfinite", "2"])
    args = arguments.trainer_arguments(settings)
    args.deepspeed = "zero2.json"  # as an argument it would need the package
    with pytest.raises(BadSettings, match="--skip_nonfinite: DeepSpeed has changed the weights"):
        rehearse(settings, args)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_settings_of_accelerate_that_change_the_batches_of_several_processes_are_refused(models, monkeypatch, name):
    # The first ended the run in a TypeError; with the second, a run of 9 steps was planned and resumed as one of 5.
    words = ["--model_path", str(models("llama")), "--dataset_path", "x.jsonl", "--use_cpu"]
    settings = read_train([*words, "--accelerator_config", f'{{"{name}": true}}'])
    args = arguments.trainer_arguments(settings)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(BadSettings, match=f"--accelerator_config {name}: "):
        rehearse(settings, args)


def test_processes_that_would_have_different_numbers_of_batches_are_refused(models, monkeypatch):
    # At the end of the epoch the run ended: "Is there a distributed collective mismatch in your code?"
    words = ["--model_path", str(models("llama")), "--dataset_path", "x.jsonl", "--use_cpu"]
    words += ["--per_device_train_batch_size", "2", "--accelerator_config", '{"even_batches": false}']
    args = arguments.trainer_arguments(read_train(words))
    check_last_batch(args, 37)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    check_last_batch(args, 39)  # 20 batches, the last one smaller
    with pytest.raises(BadSettings, match="37 records make 19 batches, which 2 processes cannot share evenly"):
        check_last_batch(args, 37)
    args.dataloader_drop_last = True
    check_last_batch(args, 37)


def test_a_push_to_a_hub_that_cannot_be_reached_is_refused(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = refused("--push_to_hub", "--hub_token", "hf_x")
    assert "--push_to_hub: the hub at" in said and "cannot be reached" in said and "hf upload" in said
    assert "hf_x" not in said


def test_a_push_without_a_login_is_refused(refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    assert "hf auth login" in refused("--push_to_hub")


def test_dataloader_drop_last_is_refused_if_no_batch_would_be_full(models, dialogues, tmp_path, capsys):
    # The records (40 dialogues) have to be counted first, but the model is not loaded.
    words = ["train", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "1"]
    flags = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", "41"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    printed = capsys.readouterr()
    assert "40 records do not fill one of 41" in printed.err and "loading" not in printed.out
    flags[-1] = "40"
    assert main([*words, "--output_dir", str(tmp_path / "two"), *flags]) == 0


def test_the_best_checkpoint_by_perplexity_is_the_lowest_one(models, dialogues, tmp_path):
    # For every metric not called loss, the library would treat a larger value as better.
    from atomtune.settings.read import read_train
    from atomtune.train.arguments import trainer_arguments

    flags = ["--eval_size", "4", "--load_best_model_at_end", "--save_strategy", "epoch"]
    for metric in ("perplexity", "eval_perplexity", "loss"):
        words = ["--model_path", "m", "--dataset_path", "d", *flags, "--metric_for_best_model", metric]
        assert trainer_arguments(read_train(words)).greater_is_better is False


def test_a_metric_that_is_never_computed_is_refused(refused):
    said = refused("--eval_size", "4", "--metric_for_best_model", "accuracy")
    assert "--metric_for_best_model 'accuracy': expected one of loss, perplexity." in said


def test_gpu_defaults_do_not_overwrite_the_users_accelerator_config(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    values = {"accelerator_config": "nope.json"}  # once treated as a dictionary, which ended in a traceback
    arguments._feed_the_gpu(values, streaming=True)
    assert values["accelerator_config"] == "nope.json"
    values = {"accelerator_config": {"split_batches": True}}
    arguments._feed_the_gpu(values, streaming=True)
    assert values["accelerator_config"] == {"split_batches": True, "non_blocking": True}
