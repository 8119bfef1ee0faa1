"""Names: each name from another tool is read as ours or answered with advice; none is silently ignored."""

import json
import re

import pytest
import yaml

from atomtune.errors import BadSettings
from atomtune.language import in_chinese
from atomtune.settings.command_settings import ChatSettings
from atomtune.settings.flags import types_of
from atomtune.settings.library import library_types
from atomtune.settings.names import ELSEWHERE, RENAMED, SYNONYMS, advice
from atomtune.settings.read import GROUPS, TRAIN_GROUPS, read_settings, read_train

BOTH = ("--dataset_path", "train.jsonl", "--model_path", "base")
LIBRARY = library_types()
TRAIN_TYPES = types_of(TRAIN_GROUPS)
TRAIN_NAMES = LIBRARY.keys() | TRAIN_TYPES.keys()
EVERY_NAME = TRAIN_NAMES | {name for groups in GROUPS.values() for name in types_of(groups)}

LLAMA_FACTORY = """\
### model
model_name_or_path: base
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: few
template: qwen
cutoff_len: 512
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 4
### output
output_dir: out
plot_loss: true
overwrite_output_dir: true
### train
learning_rate: 1.0e-4
warmup_ratio: 0.1
bf16: true
val_size: 0.1
"""
AXOLOTL = """\
base_model: base
load_in_4bit: true
strict: false
datasets:
  - path: few.jsonl
    type: alpaca
val_set_size: 0.05
adapter: qlora
lora_r: 32
lora_target_linear: true
sequence_len: 2048
sample_packing: true
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
flash_attention: true
bf16: auto
gradient_accumulation_steps: 4
gradient_checkpointing: true
tf32: false
evals_per_epoch: 4
saves_per_epoch: 1
special_tokens:
wandb_project: mine
"""


def problems(*words: str) -> list[str]:
    with pytest.raises(BadSettings) as caught:
        read_train(words)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (("--lr", "5e-4"), "learning_rate", 5e-4),
        (("--epochs", "2"), "num_train_epochs", 2.0),
        (("--batch_size", "4"), "per_device_train_batch_size", 4),
        (("--lora_r", "16"), "lora_rank", 16),
        (("--target_modules", "q_proj", "v_proj"), "lora_targets", ["q_proj", "v_proj"]),
        (("--lora_target_modules", "q_proj,v_proj"), "lora_targets", ["q_proj", "v_proj"]),
        (("--lora_target", "all"), "lora_targets", ["all-linear"]),
        (("--max-length", "512"), "max_seq_length", 512),
        (("--torch_dtype=bf16",), "dtype", "bfloat16"),
        (("--optimizer", "sgd"), "optim", "sgd"),
    ],
)
def test_a_common_flag_of_other_tools_is_accepted_with_a_notice(flags, name, value):
    notices = []
    settings = read_train([*BOTH, *flags], notice=notices.append)
    assert settings.resolved()[name]["value"] == value
    assert name in notices[0]


def test_model_data_and_output_are_accepted_under_their_usual_names():
    settings = read_train(["--model", "base", "--data", "train.jsonl", "--output", "out"])
    assert (settings.model.model_path, settings.data.dataset_path) == ("base", "train.jsonl")
    assert settings.trainer["output_dir"] == "out" and not settings.demo


def test_config_names_the_yaml_file(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_rank: 3\n", encoding="utf-8")
    for words in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}"]):
        assert read_train([*BOTH, "--fp16", *words]).lora.lora_rank == 3
    (said,) = problems(str(tmp_path / "run.yaml"), "--config", str(tmp_path / "run.yaml"), *BOTH)
    assert "one file of settings" in said


def test_a_name_of_another_command_is_not_taken_for_a_setting_of_this_one():
    # `adapter` means chat's adapter_path; train has no such setting and must say what to do.
    assert "leave it out: the adapter is always LoRA" in problems(*BOTH, "--adapter", "lora")[0]
    with pytest.raises(BadSettings, match="--lr: unknown"):
        read_settings(ChatSettings, ["--adapter_path", "a", "--lr", "1"], command="chat")


@pytest.mark.parametrize("name", sorted(SYNONYMS))
def test_a_synonym_means_a_setting_that_exists_and_hides_none(name):
    assert SYNONYMS[name] in EVERY_NAME
    assert name not in TRAIN_NAMES


@pytest.mark.parametrize("name", sorted(ELSEWHERE | RENAMED))
def test_every_setting_named_in_advice_exists(name):
    assert name not in TRAIN_NAMES, "then the advice is never said"
    advice = (ELSEWHERE | RENAMED)[name]
    advised = {word.strip(".,;:") for word in advice.split() if word.startswith("--")}
    assert {word[2:] for word in advised} <= TRAIN_NAMES


@pytest.mark.parametrize("text", [LLAMA_FACTORY, AXOLOTL], ids=["LLaMA-Factory", "Axolotl"])
def test_every_key_of_another_tools_file_is_accepted_or_explained(tmp_path, text):
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    notices = []
    with pytest.raises(BadSettings) as caught:
        read_train([str(path), *BOTH], notice=notices.append)
    said, values = f"{caught.value} {notices}", yaml.safe_load(text)
    assert "Did you mean" not in said and ": unknown" not in said
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.partition(":")[0]
        if line[0] not in "# " and values[name] is not None and name not in TRAIN_NAMES:
            assert f"other.yaml:{number}" in said, f"nothing is said of {name}"


def test_the_matching_setting_is_given_for_another_tools_key(tmp_path):
    path = tmp_path / "axo.yaml"
    path.write_text(AXOLOTL, encoding="utf-8")
    said = "\n".join(problems(str(path)))
    for line in (
        "axo.yaml:2: load_in_4bit: if true, use quantize nf4; else leave it out.",
        "axo.yaml:4: dataset_path: expected words, for example `dataset_path: few.jsonl`. Its format is detected from "
        "its records.",
        "axo.yaml:18: bf16 'auto': expected true or false. Leave it out: dtype auto uses bfloat16 if the device",
        "axo.yaml:12: sample_packing: use layout packed, or leave it out: layout auto finds the cheapest.",
    ):
        assert line in said


def test_a_setting_and_its_synonym_in_one_file_count_as_set_twice(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1\nlr: 2\n", encoding="utf-8")
    (said,) = problems(str(tmp_path / "run.yaml"), *BOTH)
    assert said == "run.yaml:2: learning_rate is set twice, here and at run.yaml:1. Remove one of them."


def test_the_notice_is_one_line_for_all_names(tmp_path):
    (tmp_path / "run.yaml").write_text("lora_r: 2\ncutoff_len: 99\n", encoding="utf-8")
    notices = []
    read_train([str(tmp_path / "run.yaml"), *BOTH, "--lr", "1"], notice=notices.append)
    expected = "--lr → --learning_rate, run.yaml:1 lora_r → lora_rank, run.yaml:2 cutoff_len → max_seq_length"
    assert notices == [f"names of other tools, read as atomtune's: {expected}."]


def test_a_synonym_is_recorded_under_the_real_setting_name():
    resolved = read_train([*BOTH, "--lr", "5e-4"]).resolved()
    assert json.loads(json.dumps(resolved))["learning_rate"] == {"value": 5e-4, "source": "--learning_rate"}
    assert "lr" not in resolved


@pytest.mark.parametrize("in_yaml", [False, True], ids=["flag", "file"])
@pytest.mark.parametrize("name", [*ELSEWHERE, *RENAMED])
def test_advice_is_fully_translated_to_chinese(name, in_yaml):
    english = advice(name, TRAIN_TYPES, in_yaml=in_yaml)
    place = f"run.yaml:3: {name}" if in_yaml else f"--{name}"
    chinese = in_chinese(f"{place}: {english}")
    assert name in chinese  # an English name that stays as it is
    assert not re.search(r"\b(the|is|it|use|leave|with|there|gone|always|or|and)\b", chinese.replace(name, "")), chinese
