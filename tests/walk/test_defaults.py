"""A run with only model and data: records are held out, the best adapter is kept, and the outcome is reported."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.errors import BadModel
from atomtune.model import base_shape
from tests.conftest import write_jsonl
from tests.walk.test_pages import wrong_next_steps


@pytest.fixture
def numbers(tmp_path) -> Path:
    """60 records that are too different to form one group."""
    words = ["lamp", "boat", "tea", "gull", "rope", "fog"]
    records = []
    for n in range(60):
        word, other = words[n % 6], words[n // 6 % 6]
        question = f"{n * 7919 % 1000} {word} {n * n} {other}?"
        records.append({"instruction": question, "output": f"{other} {n * 31} and {word} {n}."})
    return write_jsonl(tmp_path / "numbers.jsonl", records)


def command(base, data, out, *more) -> list[str]:
    short = ["--dtype", "float32", "--num_train_epochs", "2"]
    return ["train", "--model_path", str(base), "--dataset_path", str(data), "--output_dir", str(out), *short, *more]


def record_of(out) -> dict:
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def test_a_run_reports_whether_it_worked(models, numbers, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(models("llama"), numbers, out)) == 0
    record = record_of(out)
    assert len(record["records_held_out"]) == 6
    assert record["settings"]["eval_size"]["source"].startswith("auto: ")
    assert record["settings"]["learning_rate"]["value"] == 6e-3, "the tiny base is narrow, the run short"

    evaluations = record["eval_history"]
    assert [entry["step"] for entry in evaluations] == [0, 14, 28], "before the first step, and after each epoch"
    best = min(evaluations[1:], key=lambda entry: entry["loss"])
    told = record["outcome"]
    assert (told["before"], told["best"], told["best_step"]) == (evaluations[0]["loss"], best["loss"], best["step"])
    assert told["kept_step"] == best["step"] and record["eval_loss"] == best["loss"]
    kept = out / f"checkpoint-{best['step']}" / "adapter_model.safetensors"
    assert (out / "adapter_model.safetensors").read_bytes() == kept.read_bytes()

    said = capsys.readouterr().out
    for sentence in told["sentences"]:
        assert sentence in " ".join(said.split())
    assert not wrong_next_steps(said)

    page = (out / "report.html").read_text(encoding="utf-8")
    assert told["sentences"][0] in page and "numbers.jsonl" in page
    assert f"started {record['started'][:10]} {record['started'][11:16]} UTC" in page
    assert 'src="http' not in page and "<script" not in page
    assert len(record["samples"]) == 3
    held_out = {json.loads(line)["output"] for n, line in enumerate(numbers.read_text().splitlines(), 1)
                if f"numbers.jsonl:{n}" in record["records_held_out"]}  # fmt: skip
    assert {sample["reference"] for sample in record["samples"]} <= held_out


@pytest.mark.slow
def test_a_far_too_high_learning_rate_is_reported_before_the_run(models, numbers, tmp_path, capsys):
    for rate, is_told in (("0.05", False), ("0.07", True)):  # by default the run would take 6e-3
        words = [*command(models("llama"), numbers, tmp_path / rate), "--learning_rate", rate, "--max_steps", "1"]
        assert main(words) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("times the automatic value (0.006)" in said) == is_told


@pytest.mark.slow
def test_a_resumed_run_keeps_the_automatic_settings_of_the_original_run(models, numbers, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(models("llama"), numbers, whole)) == 0
    assert main(command(models("llama"), numbers, out, "--max_minutes", "0.0001")) == 75
    resume = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("  "))
    words = shlex.split(resume.partition(" train ")[2])
    limit = words.index("--max_minutes")
    monkeypatch.setattr(base_shape, "tokens_in_memory", lambda config, memory_bytes: 256)  # another machine
    assert main(["train", *words[:limit], *words[limit + 2 :]]) == 0
    before, after = record_of(whole), record_of(out)
    for name in before["settings"]:
        if name not in ("output_dir", "resume"):
            assert after["settings"][name]["value"] == before["settings"][name]["value"], name
    for name in ("eval_history", "loss_history", "records_held_out", "samples"):
        assert after[name] == before[name], name
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (whole / weights).read_bytes()


def test_few_records_are_not_held_out_and_json_prints_run_json(models, dialogues, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(models("llama"), dialogues, out, "--num_train_epochs", "1", "--json")) == 0
    record, printed = record_of(out), capsys.readouterr()
    assert json.loads(printed.out) == record and "json" not in record["settings"]
    assert "records_held_out" not in record and "eval_loss" not in record and record["samples"] == []
    assert record["outcome"]["verdict"] == "untold" and "--eval_size" in printed.err


def test_too_similar_records_are_not_held_out_and_this_is_reported(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "same.jsonl", [{"instruction": "Hello?", "output": f"Yes {n}."} for n in range(60)])
    out, words = tmp_path / "out", ["--max_steps", "31", "--per_device_train_batch_size", "64"]
    assert main(command(models("llama"), data, out, *words)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no records are held out: " in said
    assert "fewer than 50 records" not in said, "there are 60"
    assert record_of(out)["settings"]["eval_size"]["source"] == "auto: the records are too alike to hold some out"
    assert "--max_steps 31 goes through the 60 records 31 times" in said, "a batch larger than the file holds it once"
    assert "records_held_out" not in record_of(tmp_path / "out")


@pytest.mark.parametrize(
    ("before", "after", "strategies"),
    [
        (["--num_train_epochs", "1"], ["--num_train_epochs", "3"], ("epoch", "epoch")),
        pytest.param([], ["--save_steps", "5"], ("steps", "steps"), marks=pytest.mark.slow),
        pytest.param([], ["--eval_steps", "5"], ("steps", "steps"), marks=pytest.mark.slow),
        pytest.param(["--save_steps", "5"], [], ("epoch", "epoch"), marks=pytest.mark.slow),
    ],
    ids=["longer", "saves", "evaluations", "saves no longer set"],
)
def test_a_resumed_run_evaluates_and_saves_together_whatever_was_changed(  # noqa: PLR0917  # pytest's fixtures
    models, numbers, tmp_path, before, after, strategies
):
    # Once a strategy of the original run met an interval of the resumed one, and the library refused both.
    out = tmp_path / "out"
    stopped = [] if before[:1] == ["--num_train_epochs"] else ["--max_minutes", "0.0001"]
    assert main(command(models("llama"), numbers, out, *before, *stopped)) == (75 if stopped else 0)
    assert main(command(models("llama"), numbers, out, *after, "--resume")) == 0
    settings = {name: entry["value"] for name, entry in record_of(out)["settings"].items()}
    assert (settings["eval_strategy"], settings.get("save_strategy", "steps")) == strategies
    assert settings["load_best_model_at_end"]


def test_early_stopping_ends_a_run_that_no_longer_improves(models, numbers, tmp_path, capsys):
    out = tmp_path / "out"
    # Such a rate changes the weights too little for the loss: no evaluation is better than the first.
    flags = ["--learning_rate", "1e-12", "--eval_steps", "2", "--early_stopping_patience", "2"]
    assert main(command(models("llama"), numbers, out, *flags)) == 0
    assert record_of(out)["steps"] == 6
    assert "--early_stopping_patience 2" in capsys.readouterr().out
    assert main([*command(models("llama"), numbers, out, *flags), "--resume"]) == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["atom", "chatml", "plain"])
def test_a_sample_prompt_is_shown_without_text_added_by_the_template(models, tmp_path, template, capsys):
    """atom writes `请回答用户问题:` after the instruction, and chatml writes role names; the user wrote neither."""
    records = [
        {"instruction": f"Say {n * 7919 % 1000} politely {n}.", "input": f"Go {n * n} away!", "output": f"Please {n}."}
        for n in range(60)
    ]
    data, out = write_jsonl(tmp_path / "polite.jsonl", records), tmp_path / "out"
    flags = ["--max_steps", "1", "--template", template]
    assert main(command(models("llama"), data, out, *flags)) == 0
    samples = record_of(out)["samples"]
    texts = {f"{record['instruction']}\n{record['input']}": record["output"] for record in records}
    assert len(samples) == 3
    assert all(texts[sample["prompt"]] == sample["reference"] for sample in samples)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert samples[0]["prompt"] in page and "请回答用户问题" not in page


def test_an_instruction_shared_by_all_records_is_omitted_from_sample_prompts(models, tmp_path, capsys):
    records = [
        {
            "instruction": "You are a lamp. Answer the user.",
            "input": f"{n * 7919 % 1000} and {n * n}?",
            "output": f"{n}.",
        }
        for n in range(60)
    ]
    data, out = write_jsonl(tmp_path / "lamp.jsonl", records), tmp_path / "out"
    assert main(command(models("llama"), data, out, "--max_steps", "1")) == 0
    samples = record_of(out)["samples"]
    assert {sample["prompt"] for sample in samples} <= {record["input"] for record in records} and samples
    assert "\n  reference" in capsys.readouterr().out


def test_a_base_with_fewer_positions_than_any_record_needs_is_refused(models, tmp_path):
    # The limit became the run's max_seq_length, below the smallest value of that setting: a traceback.
    shutil.copytree(models("llama"), tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1}))
    with pytest.raises(BadModel, match="has 1 positions"):
        base_shape.base_shape(str(tmp_path / "base"))
