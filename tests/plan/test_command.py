"""The run does what was planned: the same steps and layout, and about the same tokens."""

import functools
import json
import subprocess
import sys

import pytest
from transformers import AutoConfig

from atomtune.cli import main
from atomtune.plan import command
from tests.conftest import DIALOGUES, write_jsonl
from tests.tiny import CHATML, SIZE, build, tokenizer_of


@pytest.fixture(scope="module", autouse=True)
def rate_measured_once():
    """The plans of this file use one measurement of the device, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "matmul_rate", functools.cache(command.matmul_rate))
        yield


def planned(capsys, *flags: str) -> dict:
    capsys.readouterr()
    assert main(["plan", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags",
    [
        ("--num_train_epochs", "2", "--per_device_train_batch_size", "8"),
        ("--num_train_epochs", "1.5", "--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "4"),
        ("--max_steps", "5", "--per_device_train_batch_size", "4"),
        ("--max_steps", "3", "--layout", "padded"),
        ("--max_steps", "3", "--neftune_noise_alpha", "5"),
    ],
    ids=" ".join,
)
def test_the_plan_matches_the_run(models, dialogues, tmp_path, capsys, flags):
    run = ("--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--eval_size", "0", *flags)
    plan = planned(capsys, *run)
    assert main(["train", *run, "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (plan["steps"], plan["layout"]) == (record["steps"], record["layout"])
    # Batches are drawn anew, so a tree saves a little more or less than in the sampled batches.
    assert plan["tokens_computed"] == pytest.approx(record["tokens_computed"], rel=0.2)
    assert plan["tokens_padded"] == pytest.approx(record["tokens_padded"], rel=0.2)


@pytest.mark.parametrize("mix", [("2", "0.5"), ("0", "1.5")], ids=" ".join)
def test_the_plan_of_a_mix_matches_the_run(models, tmp_path, capsys, mix):
    files = [
        write_jsonl(tmp_path / name, [{"instruction": f"{name} {n * 7919}", "output": answer} for n in range(count)])
        for name, count, answer in (("short.jsonl", 20, "Yes."), ("long.jsonl", 40, "No, never. " * 9))
    ]
    run = ("--model_path", str(models("llama")), "--dataset_path", *map(str, files), "--mix", *mix)
    run = (*run, "--eval_size", "4", "--num_train_epochs", "1", "--per_device_train_batch_size", "4")
    plan = planned(capsys, *run)
    assert main(["train", *run, "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert plan["records_held_out"] == len(record["records_held_out"]) == 4
    assert plan["steps"] == pytest.approx(record["steps"], abs=1)
    assert plan["tokens_padded"] == pytest.approx(record["tokens_padded"], rel=0.2)


def test_a_base_without_shared_row_support_is_planned_padded_with_the_reason(dialogues, tmp_path, capsys):
    # Llama 4's chunked attention: the plan once promised a tree that its run did not use.
    tokenizer = tokenizer_of("bytes", CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    size = {**SIZE, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("llama4_text", **size, layer_types=["chunked_attention", "full_attention"])
    config.save_pretrained(tmp_path / "base")  # plan reads no weights
    run = ("--model_path", str(tmp_path / "base"), "--dataset_path", str(dialogues))
    plan = planned(capsys, *run)
    assert plan["layout"] == "padded" and plan["tokens_computed"] == plan["tokens_padded"]
    assert main(["plan", *run]) == 0
    assert "because it has layers of the kind chunked_attention" in " ".join(capsys.readouterr().out.split())
    assert main(["plan", *run, "--layout", "tree"]) == 2


def test_the_json_has_all_parts_and_they_sum_to_the_peak(models, dialogues, capsys):
    plan = planned(capsys, "--model_path", str(models("llama")), "--dataset_path", str(dialogues))
    assert plan["peak_bytes"] == sum(plan["parts"].values())
    assert set(plan["parts"]) == {
        "base", "adapter", "gradients", "optimizer", "activations", "logits", "kernels", "libraries"
    }  # fmt: skip
    assert plan["fits"]["8 GB GPU"] is True
    assert plan["seconds"] > 0


def test_a_cpu_plan_counts_kernels_per_length_and_attention_weights_of_rows(models, tmp_path, capsys):
    """A CPU keeps kernels per length, so sixteen records of one length need less than sixteen different lengths."""
    alike, unlike = tmp_path / "alike.jsonl", tmp_path / "unlike.jsonl"
    write_jsonl(alike, [{"instruction": "Say it.", "output": "晚安。"}] * 16)
    write_jsonl(unlike, [{"instruction": "Say it.", "output": "晚安。" * n} for n in range(1, 17)])
    run = ("--model_path", str(models("llama")), "--per_device_train_batch_size", "1", "--eval_size", "0")
    run += ("--num_train_epochs", "1", "--use_cpu", "true", "--gradient_checkpointing", "false")

    def parts(data, layout: str) -> dict[str, int]:
        return planned(capsys, *run, "--dataset_path", str(data), "--layout", layout)["parts"]

    padded, unlike_padded, packed = parts(alike, "padded"), parts(unlike, "padded"), parts(alike, "packed")
    assert unlike_padded["kernels"] > 5 * padded["kernels"] > 0
    assert packed["activations"] > padded["activations"]


@pytest.mark.slow
def test_the_memory_of_a_run_on_a_cpu_is_about_what_was_planned(tmp_path):
    """Both run in processes of their own; half a gigabyte belongs to the step, the rest to libraries."""
    base = build("llama", tmp_path / "base", hidden_size=256, intermediate_size=688, num_hidden_layers=8)
    records = [{**record, "instruction": f"{record['instruction']} {n}"} for n in range(24) for record in DIALOGUES]
    data = write_jsonl(tmp_path / "data.jsonl", records)
    run = ["--model_path", str(base), "--dataset_path", str(data), "--dtype", "float32", "--layout", "padded"]
    run += ["--max_steps", "6", "--per_device_train_batch_size", "64", "--eval_size", "0", "--use_cpu", "true"]
    run += ["--gradient_checkpointing", "false"]  # `auto` depends on what other programs leave free
    atomtune = [sys.executable, "-m", "atomtune"]
    plan = json.loads(subprocess.run([*atomtune, "plan", *run, "--json"], capture_output=True, check=True).stdout)
    subprocess.run([*atomtune, "train", *run, "--output_dir", str(tmp_path / "out")], capture_output=True, check=True)
    measured = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["peak_memory_bytes"]
    assert plan["parts"]["activations"] > 0.3 * measured
    assert plan["peak_bytes"] == pytest.approx(measured, rel=0.3)


def test_plan_takes_the_settings_of_train_and_reports_the_same_errors(models, dialogues, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    run.write_text(f"model_path: {models('llama')}\ndataset_path: {dialogues}\nmax_steps: 7\nlearning_rate: 1e-3\n")
    assert planned(capsys, str(run))["steps"] == 7
    assert main(["plan", str(run), "--lora_rnak", "4"]) == 2
    assert "Did you mean --lora_rank?" in capsys.readouterr().err


def test_a_plan_of_a_stream_is_refused_with_a_way_to_plan_it_anyway(models, dialogues, capsys):
    # "Leave --streaming out" is no help to someone whose records are too many to store.
    words = ["--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--max_steps", "9"]
    assert main(["plan", *words, "--streaming"]) == 2
    assert "pass a file with a few thousand of them" in " ".join(capsys.readouterr().err.split())


def test_the_text_output_shows_memory_devices_and_time(models, dialogues, capsys):
    assert main(["plan", "--model_path", str(models("llama")), "--dataset_path", str(dialogues)]) == 0
    text = capsys.readouterr().out
    for words in ("steps; layout", "Memory of a heavy step", "8 GB GPU", "Time: about"):
        assert words in text
    assert "12 GB GPU" not in text, "cards after the first that holds all activations"
    assert text.splitlines()[-1].endswith(f" train --model_path {models('llama')} --dataset_path {dialogues}")


def test_the_suggested_train_command_contains_no_secret(models, dialogues, capsys):
    named = ["--model_path", str(models("llama")), "--dataset_path", str(dialogues)]
    assert main(["plan", *named, "--hub_token", "hf_secret", "--lora_rank", "4"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].endswith(" --lora_rank 4") and "hf_secret" not in text


def test_plan_creates_no_output_folder(models, dialogues, tmp_path, capsys):
    planned(
        capsys, "--model_path", str(models("llama")), "--dataset_path", str(dialogues),
        "--output_dir", str(tmp_path / "out"),
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_fit_here_is_told_what_to_change(models, dialogues, capsys, monkeypatch):
    """Regression: a table said "no", and the next step was to train."""
    run = ("plan", "--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu", "true")
    run = (*run, "--per_device_train_batch_size", "6")
    assert main([*run]) == 0
    assert "does not fit" not in capsys.readouterr().out
    monkeypatch.setattr(command, "free_bytes", lambda device: 10**6)
    assert main([*run]) == 0
    said = capsys.readouterr().out
    assert "It does not fit on cpu, where" in said
    assert "--per_device_train_batch_size 3 --gradient_accumulation_steps 2: the same updates" in said


def test_mapped_files_of_this_process_are_not_counted_as_free_twice(models, dialogues, capsys, monkeypatch):
    """Regression: in a small container, 688 MB were said to fit where 660 were left."""
    run = ("--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu", "true")
    held, mapped = 500 * 10**6, 300 * 10**6
    monkeypatch.setattr(command, "held_bytes", lambda: held)
    monkeypatch.setattr(command, "mapped_bytes", lambda: mapped)
    monkeypatch.setattr(command, "free_bytes", lambda device: mapped)
    assert planned(capsys, *run)["fits"]["cpu"] is False, "no room for a step beside this process"
    monkeypatch.setattr(command, "free_bytes", lambda device: mapped + 10**9)
    assert planned(capsys, *run)["fits"]["cpu"] is True


def test_fit_is_unknown_when_the_system_reports_no_memory(models, dialogues, capsys, monkeypatch):
    """In a container without /proc, psutil raises an error."""

    def unmounted(*arguments: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr("psutil.virtual_memory", unmounted)
    monkeypatch.setattr("psutil.Process", unmounted)
    monkeypatch.setattr("atomtune.container.memory_left", lambda: None)
    run = ("--model_path", str(models("llama")), "--dataset_path", str(dialogues), "--use_cpu", "true")
    plan = planned(capsys, *run)
    assert plan["fits"]["cpu"] is None and plan["fits"]["8 GB GPU"] is True and plan["activations_recomputed"] is True
    assert main(["plan", *run]) == 0
    assert "unknown" in capsys.readouterr().out
