"""Laws of the stream: every record once per epoch, in an order within a window that only the seed decides."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from atomtune.cli import main
from atomtune.data.encoded_source import Rules
from atomtune.data.encoding.choose_template import load_template
from atomtune.errors import BadData
from atomtune.train.streaming import Stream
from tests.conftest import DIALOGUES, write_jsonl
from tests.tiny import CHATML, tokenizer_of

RECORDS = 40
#: It leaves the thoughts of earlier answers out, so the next prompt does not continue the last answer.
TEMPLATE = ("--template", "qwen3")


@pytest.fixture
def files(tmp_path):
    records = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(RECORDS)]
    return [
        str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", records[:25]), ("b", records[25:]))
    ]


def stream(files, *, buffer: int = 8, seed: int = 1) -> Stream:
    template = load_template("auto", tokenizer_of("bytes", CHATML))
    return Stream(files, template, Rules(max_tokens=64), buffer=buffer, seed=seed, check=lambda ledger: None)


def origins(one: Stream, count: int) -> list[str]:
    return [row["origin"] for row in itertools.islice(one, count)]


@pytest.mark.parametrize("buffer", [1, 8, 1000])
def test_each_pass_yields_every_record_once_in_a_different_order(files, buffer):
    drawn = origins(stream(files, buffer=buffer), 3 * RECORDS)
    passes = [drawn[i : i + RECORDS] for i in range(0, len(drawn), RECORDS)]
    for one in passes:
        assert sorted(Counter(one).values()) == [1] * RECORDS
    assert passes[0] != passes[1] != passes[2]


def test_the_order_of_records_depends_only_on_the_seed(files):
    assert origins(stream(files), 90) == origins(stream(files), 90)
    assert origins(stream(files), 90) != origins(stream(files, seed=2), 90)


def test_no_record_is_yielded_earlier_than_the_shuffle_buffer_allows(files):
    # Catches a stream that reads everything before its first record: record n has at most n + buffer records before it.
    order = {f"a.jsonl:{n}": n - 1 for n in range(1, 26)} | {f"b.jsonl:{n}": n + 24 for n in range(1, 16)}
    for at, origin in enumerate(origins(stream(files, buffer=4), RECORDS)):
        assert order[origin] <= at + 4


def test_the_ledger_counts_one_pass_however_many_are_read(files):
    one = stream(files)
    origins(one, 3 * RECORDS)
    assert (one.ledger.records_read, one.ledger.records_used) == (RECORDS, RECORDS)


def test_a_stream_without_usable_records_raises_an_error(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"instruction": "x", "output": ""}])
    with pytest.raises(BadData, match="none of 1 records"):
        origins(stream([str(path)]), 1)


def test_a_stopped_streamed_run_resumes_bit_identically(models, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", DIALOGUES * 3)
    command = [
        *("train", "--model_path", str(models("qwen3")), "--dataset_path", str(data), "--streaming"),
        *("--shuffle_buffer", "5", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--save_steps", "5"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--max_steps", "15", "--output_dir", str(whole)]) == 0  # 2.5 epochs
    assert main([*command, "--max_steps", "15", "--output_dir", str(parts)]) == 0
    for name in ("adapter_model.safetensors", "run.json"):
        (parts / name).unlink()
    for step in (10, 15):
        for file in sorted((parts / f"checkpoint-{step}").iterdir()):
            file.unlink()
        (parts / f"checkpoint-{step}").rmdir()
    assert main([*command, "--max_steps", "15", "--output_dir", str(parts), "--resume"]) == 0
    weights = "adapter_model.safetensors"
    assert (parts / weights).read_bytes() == (whole / weights).read_bytes()
    run = json.loads((whole / "run.json").read_text())
    assert (run["records_read"], run["records_used"], run["records_copied"]) == (24, 24, None)
    assert run["status"] == "finished"


@pytest.mark.slow
def test_records_refused_from_a_stream_are_reported(models, tmp_path, capsys):
    data = write_jsonl(tmp_path / "train.jsonl", [*DIALOGUES, {"instruction": "x", "output": ""}])
    command = ["train", "--model_path", str(models("qwen3")), "--dataset_path", str(data), "--streaming", "--skip_bad"]
    assert main([*command, "--max_steps", "2", "--output_dir", str(tmp_path / "out")]) == 0
    assert "9 records read (alpaca), 8 used, 1 refused" in " ".join(capsys.readouterr().out.split())
    refused = json.loads((tmp_path / "out" / "run.json").read_text())["records_refused"]
    assert [one["origin"] for one in refused] == ["train.jsonl:9"]


def test_records_read_but_not_trained_on_are_reported(models, files, tmp_path):
    # The account covers all records that were read; many of them may still wait in the buffer when the run ends.
    command = ["train", "--model_path", str(models("llama")), "--dataset_path", *files, "--dtype", "float32"]
    command += ["--streaming", "true", "--per_device_train_batch_size", "2", "--save_strategy", "no"]
    command += ["--gradient_accumulation_steps", "2"]
    records = []
    for steps in (2, 20):
        out = tmp_path / str(steps)
        assert main([*command, "--max_steps", str(steps), "--output_dir", str(out)]) == 0
        records.append(json.loads((out / "run.json").read_text()))
    early, late = records
    assert early["records_waiting"] == early["records_used"] - 8 > 0
    assert late["records_waiting"] == 0
    said = [any("were still waiting to be shuffled" in notice for notice in record["notices"]) for record in records]
    assert said == [True, False]


def test_a_stream_of_records_with_several_examples_is_learned_whole(models, tmp_path):
    # Catches counting the examples that were read against the records that were drawn.
    turns = [("user", "Where?"), ("assistant", "Here.", "hm"), ("user", "And now?"), ("assistant", "There.")]
    messages = [dict(zip(("role", "content", "reasoning_content"), turn, strict=False)) for turn in turns]
    data = write_jsonl(tmp_path / "split.jsonl", [{"messages": messages}] * 8)
    out = tmp_path / "out"
    command = ["train", "--model_path", str(models("qwen3")), "--dataset_path", str(data), "--output_dir", str(out)]
    assert main([*command, "--streaming", "--max_steps", "2", "--per_device_train_batch_size", "4", *TEMPLATE]) == 0
    record = json.loads((out / "run.json").read_text())
    assert (record["examples"], record["records_used"], record["records_waiting"]) == (16, 8, 0)
    assert record["records_split_origins"] == [f"split.jsonl:{n}" for n in range(1, 9)]


@pytest.mark.parametrize("buffer", [2, 1000])
def test_broken_records_of_a_stream_are_all_in_run_json(models, tmp_path, capsys, buffer):
    broken = [{"instruction": "x", "outptu": "y"} for _ in range(30)]
    data = write_jsonl(tmp_path / "train.jsonl", [*DIALOGUES, *broken])
    out = tmp_path / "out"
    command = ["train", "--model_path", str(models("qwen3")), "--dataset_path", str(data), "--output_dir", str(out)]
    assert main([*command, "--streaming", "--max_steps", "2", "--shuffle_buffer", str(buffer)]) == 2
    assert "run.json lists them all." in capsys.readouterr().err
    refused = json.loads((out / "run.json").read_text())["records_refused"]
    assert [one["origin"] for one in refused] == [f"train.jsonl:{n}" for n in range(9, 39)]


def test_settings_unsupported_by_streaming_are_refused_before_reading_data(capsys):
    both = ["train", "--model_path", "m", "--dataset_path", "nowhere.jsonl", "--streaming"]
    assert main(both) == 2
    assert "--max_steps" in capsys.readouterr().err
    assert main([*both, "--max_steps", "5", "--eval_size", "0.1"]) == 2
    assert "--eval_size" in capsys.readouterr().err
    assert main([*both, "--max_steps", "5", "--dataloader_num_workers", "2"]) == 2
    assert "--dataloader_num_workers" in capsys.readouterr().err


@pytest.mark.parametrize("late", [False, True], ids=["in a pass", "between passes"])
def test_a_file_that_changes_while_it_is_read_is_named(files, late):
    rows = iter(stream(files, buffer=1))
    for _ in range(RECORDS if late else 5):
        next(rows)
    with Path(files[1]).open("a", encoding="utf-8") as file:
        file.write('{"instruction": "one more", "output": "record"}\n')
    with pytest.raises(BadData, match=r"b\.jsonl changed while the run was reading it"):
        for _ in range(RECORDS + 2):
            next(rows)
