"""What makes a resumed run another one: every setting that changes the adapter, and none that does not."""

from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atomtune.settings.read import read_train
from atomtune.train import run_identity
from atomtune.train.arguments import trainer_arguments

#: flag → a value that gives another adapter, or another choice of the best one.
CHANGES_THE_RUN = {
    "seed": "7",
    "data_seed": "7",
    "per_device_train_batch_size": "3",
    "gradient_accumulation_steps": "3",
    "learning_rate": "1e-5",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": '{"num_cycles": 2}',
    "warmup_steps": "3",
    "weight_decay": "0.1",
    "optim": "sgd",
    "optim_args": "x=1",
    "adam_beta1": "0.8",
    "adam_beta2": "0.8",
    "adam_epsilon": "1e-5",
    "max_grad_norm": "2",
    "label_smoothing_factor": "0.1",
    "neftune_noise_alpha": "5",
    "train_sampling_strategy": "sequential",
    "dataloader_drop_last": "true",
    "max_seq_length": "64",
    "overlength": "skip",
    "eval_size": "9",
    "layout": "padded",
    "mix": "0.5",
    "format": "alpaca",
    "roles": "bot=assistant",
    "learn": "last",
    "dtype": "bfloat16",
    "quantize": "nf4",
    "lora_rank": "4",
    "lora_alpha": "4",
    "lora_dropout": "0.3",
    "lora_targets": "q_proj",
    "lora_experts": "true",
    "skip_nonfinite": "3",
}
#: flag → a value that leaves every step as it is; the length has a notice of its own.
LEAVES_IT = {
    "max_steps": "9",
    "num_train_epochs": "9",
    "save_steps": "9",
    "save_total_limit": "9",
    "logging_steps": "9",
    "eval_steps": "9",
    "per_device_eval_batch_size": "9",
    "dataloader_num_workers": "1",
    "gradient_checkpointing": "true",
    "max_minutes": "9",
    "output_dir": "elsewhere",
}


@pytest.fixture
def identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`identity("--seed", "7")`: the identity of a run with these flags."""
    monkeypatch.setattr(run_identity, "tokenizer_text", lambda tokenizer: "words")
    template = SimpleNamespace(source="{{ x }}", tokenizer=None, names_the_day=False, day=date(2026, 1, 2))
    data = SimpleNamespace(data_hash="a", eval_hash="", origins_held_out=[])

    def of(*flags: str) -> dict[str, Any]:
        words = ["--model_path", str(tmp_path), "--dataset_path", "d.jsonl", "--output_dir", str(tmp_path / "out")]
        settings = read_train([*words, "--use_cpu", "true", *flags])
        run = SimpleNamespace(settings=settings, args=trainer_arguments(settings))
        return run_identity.identity(run, template, data)

    return of


@pytest.mark.parametrize("name", CHANGES_THE_RUN)
def test_a_setting_that_changes_the_adapter_is_part_of_the_identity(identity, name):
    before, now = identity(), identity(f"--{name}", CHANGES_THE_RUN[name])
    assert [key for key in now if now[key] != before[key]] == [name]


@pytest.mark.parametrize("name", LEAVES_IT)
def test_a_setting_that_changes_no_step_may_change_on_resume(identity, name):
    assert identity(f"--{name}", LEAVES_IT[name]) == identity()
